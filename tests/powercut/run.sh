#!/bin/bash
# run.sh CUTS cuts the power of one machine that many times under load, on disks that stay: make powercut. SEED repeats what
# was chosen; when exactly the cut comes, no seed can say.
set -e -o pipefail
cd "$(dirname "$0")/../.."
cuts=$1 seed=${SEED:-$RANDOM}
echo "# $cuts cuts, SEED=$seed"
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
boot() { # CUT FLAGS…
	local cut=$1
	shift
	bin/vm -again -timeout 15m -disk-file "data=$disks/data:192M" -disk-file "state=$disks/state:64M" \
		-disk-file "storage=$disks/storage:1G" -disk-file "backup=$disks/backup:192M" "$@" \
		"exec .cache/test/powercut -boot $cut -cuts $cuts -seed $seed"
}
for ((n = 0; n < cuts; n++)); do
	boot "$n" -kill-on "the power fails now"
done
boot "$cuts"
echo "# the changes are known over $cuts power failures"
