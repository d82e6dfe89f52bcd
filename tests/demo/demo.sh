#!/usr/bin/env bash
# The whole story on a real device, told step by step; any difference ends it with
# status 1. Run by "make demo"; by hand: as root, on a kernel with ublk.
#
# It touches nothing that is there already: its disk is a loop device over a file
# in memory, its daemon has a run directory of its own.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export PATH="$here/../../bin:$PATH"
work=$(mktemp -d "${DEMO_DIR:-/dev/shm}/ublk-blksnap-demo.XXXXXX")
run=/run/ublk-blksnap-demo.$$
name=demo$$
loop=

ours() { ublk-blksnap --run-dir "$run" "$@"; }

if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
n=0
step() { n=$((n + 1)); printf '\n%s%2d. %s%s\n' "$bold" $n "$*" "$plain"; }
tell() { printf '    %s\n' "$*"; }
show() { printf '    $ %s\n' "$*"; "$@" 2>&1 | sed 's/^/      /'; }
differ() { printf '\n%sDIFFERENT: %s%s\n' "$bold" "$*" "$plain" >&2; exit 1; }

cleanup() {
	status=$?
	set +e
	if [ $status -ne 0 ]; then
		printf '\n%sThe demo failed (status %d).%s\n' "$bold" $status "$plain" >&2
		[ -f "$run/daemon.log" ] && { echo "The daemon's log:"; tail -n 20 "$run/daemon.log"; } >&2
	fi
	for m in "$work"/image "$work"/mnt "$work"/disk; do mountpoint -q "$m" && umount "$m"; done
	if [ -S "$run/control.sock" ]; then
		for id in $(ours snapshot_collect 2>/dev/null); do ours snapshot destroy --force "$id"; done
		ours list 2>/dev/null | grep -q "^$name " && ours remove --force $name
		pid=$(cat "$run/daemon.lock")
		kill "$pid"
		for _ in $(seq 100); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
	fi
	mountpoint -q "$run/state" && umount "$run/state"
	[ -n "$loop" ] && losetup -d "$loop"
	rm -rf "$work" "$run"
	exit $status
}
trap cleanup EXIT
trap 'echo "demo.sh: line $LINENO: \"$BASH_COMMAND\" failed" >&2' ERR

[ "$(id -u)" = 0 ] || { echo "demo.sh: run this as root" >&2; exit 1; }
mkdir "$work"/mnt "$work"/disk "$work"/image

# sums writes the checksums of all files of a directory, by name.
sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 -r sha256sum); }
# must_equal compares what a directory holds with checksums taken earlier.
must_equal() { sums "$1" | diff - "$2" || differ "$1 and $3"; tell "$(wc -l <"$2") checksums: all equal to $3"; }

step "What this machine has"
show uname -sr
show ublk-blksnap version
ublk-blksnap doctor >"$work/doctor" || { cat "$work/doctor"; exit 1; }
tell "doctor: everything needed is there"

step "A disk of 64 MiB"
modprobe -q loop || true
truncate -s 64M "$work/disk.img"
loop=$(losetup --find --show "$work/disk.img")
tell "$loop, over a file in memory"

step "A filter over it"
link=$(ours add "$loop" --name $name)
dev=$(readlink -f "$link")
tell "$link -> $dev; the first command has started the daemon"
show ours list

step "A filesystem on the filter device, and files"
mkfs.ext4 -q -m 0 "$link"
mount "$link" "$work/mnt"
mkdir "$work/mnt/books"
for i in $(seq 1 40); do head -c $((RANDOM * 8 + 1)) /dev/urandom >"$work/mnt/books/$i"; done
cp /etc/passwd /etc/services "$work/mnt" 2>/dev/null || cp /etc/passwd "$work/mnt"
sync
sums "$work/mnt" >"$work/sums.1"
tell "$(wc -l <"$work/sums.1") files, $(du -sh "$work/mnt" | cut -f1)"

step "The disk cannot be used beside its filter, nor the filter removed under its users"
if mount "$loop" "$work/disk" 2>/dev/null; then differ "the original disk was mounted beside the filter"; fi
tell "mount $loop: refused by the kernel"
if refusal=$(ours remove $name 2>&1); then differ "a mounted filter was removed"; fi
tell "$refusal"

step "A first snapshot, while the filesystem is mounted"
image1=$(ours snapshot create $name --name first --storage "$work" --limit 40M --take)
tell "image: $image1 -> $(readlink -f "$image1")"
show ours cbt info $name
take1=$(ours cbt info $name | sed -n 's/^take=//p')

step "Files change: some overwritten, some deleted, some new"
for i in 3 7 21; do head -c 200000 /dev/urandom >"$work/mnt/books/$i"; done
rm "$work"/mnt/books/1?
mkdir "$work/mnt/new"
for i in 1 2 3; do head -c 500000 /dev/urandom >"$work/mnt/new/$i"; done
sync
sums "$work/mnt" >"$work/sums.2"
tell "$(diff "$work/sums.1" "$work/sums.2" | grep -c '^[<>]') lines of the list of checksums differ now"

step "The image beside the original: there everything is as it was"
fsck.ext4 -fn "$image1" >"$work/fsck" 2>&1 || { cat "$work/fsck"; differ "the image is not a clean filesystem"; }
tell "fsck of the image: clean"
mount -o ro "$image1" "$work/image"
must_equal "$work/image" "$work/sums.1" "the files before the snapshot"
must_equal "$work/mnt" "$work/sums.2" "the files after the changes"
umount "$work/image"

step "A full backup: a copy of the image"
dd if="$image1" of="$work/backup" bs=1M conv=sparse status=none
cmp "$work/backup" "$image1" || differ "the backup and the image"
tell "$(stat -c %s "$work/backup") bytes, equal to the image"

step "Writing to the image: the original does not notice"
mount "$image1" "$work/image"
echo "a note for the backup" >"$work/image/note"
rm -r "$work/image/books"
umount "$work/image"
mount -o ro "$image1" "$work/image"
[ "$(cat "$work/image/note")" = "a note for the backup" ] || differ "the image and what was written to it"
[ ! -e "$work/image/books" ] || differ "the image and what was deleted in it"
umount "$work/image"
must_equal "$work/mnt" "$work/sums.2" "the files before writing to the image"

step "A second snapshot, while the first one is held"
image2=$(ours snapshot create $name --name second --storage "$work" --limit 40M --take)
show ours snapshot list
echo "written after the second snapshot" >"$work/mnt/late"
sync

step "The change map: which blocks have changed between the two"
block=$(ours cbt info $name | sed -n 's/^block_size=//p')
ours cbt changes $name --since "$take1" >"$work/changes"
tell "$(wc -l <"$work/changes") ranges in blocks of $((block / 1024)) KiB, in sectors of 512 bytes:"
head -n 5 "$work/changes" | sed 's/^/      /'
[ "$(wc -l <"$work/changes")" -le 5 ] || tell "  …"
# Both lists are of block numbers; what differs must have been reported.
awk -F: -v b=$((block / 512)) '{ for (s = $1; s < $1 + $2; s += b) print s / b }' "$work/changes" | sort >"$work/reported"
{ cmp -l "$work/backup" "$image2" || true; } | awk -v b="$block" '{ k = int(($1 - 1) / b); if (k != last || NR == 1) print k; last = k }' | sort -u >"$work/differing"
missed=$(comm -13 "$work/reported" "$work/differing")
[ -z "$missed" ] || differ "blocks that changed and were not reported: $missed"
tell "$(wc -l <"$work/differing") blocks differ, all of them among the $(wc -l <"$work/reported") reported"

step "An incremental backup: the changed blocks of the second image, laid over the copy of the first"
bytes=0
while IFS=: read -r sector count; do
	dd if="$image2" of="$work/backup" bs=512 skip="$sector" seek="$sector" count="$count" conv=notrunc status=none
	bytes=$((bytes + count * 512))
done <"$work/changes"
cmp "$work/backup" "$image2" || differ "the incremental backup and the second image"
tell "$((bytes / 1024)) KiB copied; now the backup equals the second image bit by bit"

step "The first snapshot goes, the second stays as it is"
ours snapshot destroy first
[ ! -e "$image1" ] || differ "the image of a destroyed snapshot is still there"
cmp "$work/backup" "$image2" || differ "the second image after the first one's end"
mount -o ro "$image2" "$work/image"
must_equal "$work/image" "$work/sums.2" "the files at the second snapshot"
umount "$work/image"
ours snapshot destroy second
tell "both destroyed"

step "The filter is removed"
sums "$work/mnt" >"$work/sums.3"
show ours status $name
umount "$work/mnt"
ours remove $name
[ ! -e "$link" ] || differ "the link of a removed filter is still there"
tell "$link is gone"

step "The original disk, used directly, holds everything"
fsck.ext4 -fn "$loop" >"$work/fsck" 2>&1 || { cat "$work/fsck"; differ "the original is not a clean filesystem"; }
tell "fsck: clean"
mount -o ro "$loop" "$work/disk"
must_equal "$work/disk" "$work/sums.3" "the files seen through the filter"
umount "$work/disk"

printf '\n%sAll as it should be.%s\n' "$bold" "$plain"
