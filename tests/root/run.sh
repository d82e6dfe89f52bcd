#!/bin/bash
# run.sh has a Debian whose root filesystem is a logical volume get its filter while it runs, and then one behind LUKS: make root
# [LOAD=seconds] [TARGET=linear|crypt].
set -e -o pipefail
cd "$(dirname "$0")/../.."
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
for target in ${TARGET:-linear crypt}; do
	# The image that make boot uses too, which becomes a volume.
	bin/vm -again -timeout 10m -root "$disks/plain" true
	echo "# root: a Debian on a volume, $target"
	bin/vm -again -timeout 10m -disk-file "plain=$disks/plain" -disk-file "root=$disks/root:1536M" "exec tests/root/make.sh $target"
	echo "# root: a filter for $SECONDS_UNDER_LOAD s of load"
	bin/vm -timeout "$((SECONDS_UNDER_LOAD / 60 + 12))m" -mem 1G -e "SECONDS_UNDER_LOAD=$SECONDS_UNDER_LOAD" -root "$disks/root" -disk "store=1G" \
		"exec tests/root/root.sh $target"
	bin/vm -again -timeout 10m -disk-file "root=$disks/root:1536M" "exec tests/root/make.sh $target check"
	echo "# the root filesystem is whole"
	rm "$disks"/*
done
