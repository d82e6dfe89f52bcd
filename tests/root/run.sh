#!/bin/bash
# run.sh has a Debian whose root filesystem is a logical volume get its filter while it runs: make root [LOAD=seconds].
set -e -o pipefail
cd "$(dirname "$0")/../.."
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
# The image that make boot uses too, which becomes a logical volume.
bin/vm -again -timeout 10m -root "$disks/plain" true
echo "# root: a Debian on a logical volume"
bin/vm -again -timeout 10m -disk-file "plain=$disks/plain" -disk-file "root=$disks/root:1536M" "exec tests/root/make.sh"
rm "$disks/plain"
echo "# root: a filter for $SECONDS_UNDER_LOAD s of load"
bin/vm -timeout "$((SECONDS_UNDER_LOAD / 60 + 12))m" -mem 1G -e "SECONDS_UNDER_LOAD=$SECONDS_UNDER_LOAD" -root "$disks/root" -disk "store=1G" \
	"exec tests/root/root.sh"
# Whoever looks past LVM finds a whole filesystem: the volume begins at 1 MiB, and has one stretch.
e2fsck -f -n "$disks/root?offset=1048576"
echo "# the root filesystem is whole"
