#!/bin/bash
# backup.sh DISK COPY DIR: a full and several incremental backups of DISK to COPY, as a script for blksnap does it.
# Knows nothing but blksnap's command line.
set -euo pipefail
disk=$1 copy=$2 dir=$3
mnt=$dir/mnt image_mnt=$dir/image
mkdir -p "$mnt" "$image_mnt" "$dir/diff"

fail() { echo "FAILED: $*" >&2; exit 1; }

sums() { (cd "$1" && find . -type f -not -path './lost+found*' -print0 | sort -z | xargs -0 md5sum); }

# field NAME: the value of one line of cbtinfo, as $info holds it
field() { sed -n "s/^$1=//p" <<<"$info"; }

blksnap version
blksnap attach -d "$disk"
attached=yes
snapshot=
cleanup() {
	status=$?
	if mountpoint -q "$image_mnt"; then umount "$image_mnt"; fi
	if mountpoint -q "$mnt"; then umount "$mnt"; fi
	if [ -n "$snapshot" ]; then blksnap snapshot_destroy -i "$snapshot" || status=1; fi
	if [ -n "$attached" ]; then blksnap detach -d "$disk" || status=1; fi
	exit $status
}
trap cleanup EXIT

filter=/dev/ublk-blksnap/${disk#/dev/}
mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$filter"
mount "$filter" "$mnt"

last_generation= last_number=0
for round in 1 2 3; do
	mkdir -p "$mnt/round$round"
	for i in 1 2 3 4 5; do
		head -c $((i * 30000 + round)) /dev/urandom >"$mnt/round$round/file$i"
	done
	[ "$round" != 3 ] || rm -r "$mnt/round1"
	sums "$mnt" >"$dir/sums"

	snapshot=$(blksnap snapshot_create -d "$disk" -f "$dir/diff/$round" -l 64M)
	[ "$(blksnap snapshot_collect)" = "$snapshot" ] || fail "the snapshot is not listed"
	blksnap snapshot_take -i "$snapshot"
	image=$(blksnap snapshot_info -d "$disk" -f image)

	# Life goes on.
	echo "after snapshot $round" >"$mnt/after"
	head -c 1000000 /dev/urandom >"$mnt/round$round/file3"
	sync

	# In one go: a number without its generation means nothing.
	info=$(blksnap cbtinfo -d "$disk")
	block=$(field block_size)
	generation=$(field generation_id)
	number=$(field changes_number)
	if [ "$generation" != "$last_generation" ]; then
		echo "round $round: full backup"
		dd if="$image" of="$copy" bs=1M status=none
	else
		blksnap readcbtmap -d "$disk" -f "$dir/map"
		[ "$(blksnap cbtinfo -d "$disk")" = "$info" ] || fail "another take while the map was read"
		# The bytes above the last number are the blocks of the increment.
		blocks=$(od -An -v -t u1 -w1 "$dir/map" | awk -v last="$last_number" '$1 > last { print NR - 1 }')
		echo "round $round: increment of $(wc -w <<<"$blocks") blocks of $(field block_count)"
		[ "$(wc -w <<<"$blocks")" -lt $(($(field block_count) / 2)) ] || fail "the increment is too large"
		for b in $blocks; do
			dd if="$image" of="$copy" bs="$block" skip="$b" seek="$b" count=1 conv=notrunc status=none
		done
	fi
	last_generation=$generation last_number=$number
	cmp "$image" "$copy" || fail "the copy differs from the image"

	mount -o ro "$image" "$image_mnt"
	sums "$image_mnt" | cmp - "$dir/sums" || fail "the files in the image differ"
	umount "$image_mnt"
	[ "$(blksnap snapshot_info -d "$disk" -f error_code)" = 0 ] || fail "the snapshot broke"
	blksnap snapshot_destroy -i "$snapshot"
	snapshot=
	[ ! -e "$dir/diff/$round" ] || fail "the storage is left"
	rm -f "$mnt/after"
done

# The copy is a sound filesystem with the files of the last snapshot.
e2fsck -f -n "$copy" >"$dir/fsck" || { cat "$dir/fsck"; fail "the copy is not sound"; }
mount -o ro "$copy" "$image_mnt"
sums "$image_mnt" | cmp - "$dir/sums" || fail "the files in the copy differ"
umount "$image_mnt"

umount "$mnt"
blksnap detach -d "$disk"
attached=
echo "done"
