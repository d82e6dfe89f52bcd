#!/bin/bash
# run.sh boots a Debian of its own three times, from disks that stay, and runs a part of boot.sh in each: make boot.
set -e -o pipefail
cd "$(dirname "$0")/../.."
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
specs=()
for name in uuid label name late group; do specs+=(-disk-file "$name=$disks/$name:64M"); done
for boot in install filtered broken; do
	echo "# boot: $boot"
	bin/vm -again -timeout 10m -root "$disks/root" "${specs[@]}" "exec tests/boot/boot.sh $boot"
done
echo "# filesystems are mounted from filters alone"
