#!/bin/bash
# run.sh boots one machine four times, on disks that stay, and runs a part of boot.sh in each: make reboot.
set -e -o pipefail
cd "$(dirname "$0")/../.."
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
for boot in first second behind third; do
	echo "# boot: $boot"
	bin/vm -again -timeout 10m -disk-file "data=$disks/data:128M" -disk-file "state=$disks/state:64M" \
		-disk-file "backup=$disks/backup:128M" "exec tests/reboot/boot.sh $boot"
done
echo "# the changes are known over a restart of the machine"

for boot in hold without with; do
	echo "# boot: $boot"
	kill=()
	[ "$boot" != hold ] || kill=(-kill-on "the power fails now")
	bin/vm -again -timeout 10m "${kill[@]}" -disk-file "data=$disks/original:32M" -disk-file "state=$disks/notes:64M" \
		-disk-file "storage=$disks/storage:256M" -disk-file "raw=$disks/raw:64M" "exec tests/reboot/lost.sh $boot"
done
echo "# nothing is left of snapshots after a power failure"
