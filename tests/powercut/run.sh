#!/bin/bash
# run.sh CUTS cuts the power of one machine that many times under load, on disks that stay: make powercut. SEED repeats what
# was chosen; when exactly the cut comes, no seed can say. By turns the cut takes with it what the guest did not flush, of
# the original, the state and the storage, of the first of them, of the others, or of none: what must have been flushed shows
# where what depends on it is kept.
set -e -o pipefail
cd "$(dirname "$0")/../.."
cuts=$1 seed=${SEED:-$RANDOM}
echo "# $cuts cuts, SEED=$seed"
disks=$(mktemp -d)
trap 'rm -rf "$disks"' EXIT
boot() { # CUT FLAGS…
	local cut=$1 original= others=
	shift
	case $(((cut + cut / 8 + seed) % 4)) in # boots that are alike but for this are eight apart: see variant
	0) original=,volatile others=,volatile ;;
	1) others=,volatile ;;
	2) original=,volatile ;;
	esac
	bin/vm -again -timeout 15m -disk-file "data=$disks/data:192M$original" -disk-file "state=$disks/state:64M$others" \
		-disk-file "storage=$disks/storage:1G$others" -disk-file "backup=$disks/backup:192M" \
		-disk-file "notes=$disks/notes:64M" "$@" \
		"exec .cache/test/powercut -boot $cut -cuts $cuts -seed $seed -caches original${original:-,kept},others${others:-,kept}"
}
for ((n = 0; n < cuts; n++)); do
	boot "$n" -kill-on "the power fails now"
done
boot "$cuts"
echo "# the changes are known over $cuts power failures"
