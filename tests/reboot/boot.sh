#!/bin/bash
# boot.sh PART is what happens to a disk in one boot of a machine. Four of them:
#
#	first    a filter, a filesystem on it, a full backup; then changes; a clean end
#	second   the filter again, more changes; an increment of all of them restores exactly; a clean end
#	behind   no filter: the disk is mounted, and a file is changed
#	third    the filter again: it must not believe what it knew
set -e -o pipefail
data=/dev/disk/by-vm/data backup=/dev/disk/by-vm/backup state=/dev/disk/by-vm/state
kept=/var/lib/ublk-blksnap
program=$PWD/bin/ublk-blksnap
PATH=/usr/sbin:/usr/bin:/sbin:/bin

fail() { echo "boot $part: $*" >&2; exit 1; }
part=$1

mkdir -p "$kept" /srv
[ "$part" != first ] || mkfs.ext4 -q -F "$state"
mount "$state" "$kept"
chmod 700 "$kept"

# change writes to the filesystem on the device $1.
change() {
	mount "$1" /srv
	dd if=/dev/urandom of="/srv/$2" bs=64K count=20 conv=fsync status=none
	echo "$2" >>/srv/log
	umount /srv
}

# take makes a snapshot: image is its image, token names it.
take() {
	image=$("$program" snapshot create data --storage /dev/shm --take)
	token=$("$program" snapshot info "$image" --field take)
}

end() {
	"$program" daemon stop
	umount "$kept"
	sync
}

case $part in
first)
	"$program" add "$data" --name data
	"$program" cbt info data | grep -qx history_reason=no-state || fail "a disk that is new is not told as such"
	filter=/dev/ublk-blksnap/data
	mkfs.ext4 -q -F "$filter"
	change "$filter" before
	take
	dd if="$image" of="$backup" bs=1M oflag=direct status=none
	echo "$token" >"$kept/token"
	"$program" snapshot destroy "$image"
	change "$filter" first
	end
	;;
second)
	"$program" add "$data" --name data
	"$program" cbt info data | grep -qx history=continued || fail "$("$program" cbt info data)"
	change /dev/ublk-blksnap/data second
	take
	! cmp -s "$image" "$backup" || fail "nothing has changed"
	bytes=0
	while IFS=: read -r sector count; do
		dd if="$image" of="$backup" bs=512 skip="$sector" seek="$sector" count="$count" conv=notrunc status=none
		bytes=$((bytes + count * 512))
	done < <("$program" cbt changes data --since "$(cat "$kept/token")")
	cmp "$image" "$backup" || fail "the increment does not restore the disk"
	# Twice 1.25 MiB of data, and what ext4 writes beside it.
	((bytes >= 2621440 && bytes < 64 << 20)) || fail "the increment has $bytes bytes"
	echo "the increment of $bytes bytes restores the disk"
	echo "$token" >"$kept/token"
	"$program" snapshot destroy "$image"
	end
	;;
behind)
	change "$data" behind
	umount "$kept"
	;;
third)
	said=$("$program" add "$data" --name data 2>&1)
	[[ $said == *"change tracking begins anew"*"ext superblock"* ]] || fail "add says: $said"
	"$program" cbt info data | grep -qx history_reason=written || fail "$("$program" cbt info data)"
	take
	status=0
	"$program" cbt changes data --since "$(cat "$kept/token")" || status=$?
	((status == 6)) || fail "an increment over a write that nobody saw: status $status"
	"$program" snapshot destroy "$image"
	end
	;;
*) fail "no such part" ;;
esac
