#!/bin/bash
# lost.sh PART is what becomes of snapshots when the power fails. Three boots of a machine:
#
#	hold     snapshots whose storage is a new file, a file that lends its space, a directory, a device, and one that is
#	         encrypted; then the power fails
#	without  the daemon starts without the filesystem of the storage, and says what is lost and not cleared
#	with     with it: nothing of the disk can be read there, the file that lent its space has it back, the disk is right
set -e -o pipefail
data=/dev/disk/by-vm/data state=/dev/disk/by-vm/state storage=/dev/disk/by-vm/storage raw=/dev/disk/by-vm/raw
kept=/var/lib/ublk-blksnap there=/mnt
program=$PWD/bin/ublk-blksnap
PATH=/usr/sbin:/usr/bin:/sbin:/bin
secret="this is on the disk, and nobody else may read it"

fail() {
	echo "lost $part: $*" >&2
	tail -n 30 /run/ublk-blksnap/daemon.log >&2 || true
	exit 1
}
part=$1

# content is 16 MiB of a text.
content() { head -c $((16 << 20)) < <(yes "$1"); }

# readable counts the pieces of the disk that can be read on $1.
readable() { dd if="$1" bs=1M iflag=direct status=none | { grep -a -o "$secret" || true; } | wc -l; }

# awaits waits until $2… succeeds; $1 says what for.
awaits() {
	local what=$1 n
	shift
	for ((n = 0; n < 60; n++)); do
		! "$@" || return 0
		sleep 1
	done
	fail "no end of the wait for $what: $("$program" list 2>&1)"
}

mkdir -p "$kept"
if [ "$part" = hold ]; then
	mkfs.ext4 -q -F "$state"
	mkfs.ext4 -q -F "$storage"
fi
mount "$state" "$kept"
chmod 700 "$kept"
[ "$part" = without ] || mount "$storage" "$there"

case $part in
hold)
	content "$secret" | dd of="$data" bs=1M iflag=fullblock oflag=direct status=none
	fallocate -l 24M "$there/lender"
	"$program" add "$data" --name data
	mkdir "$there/dir"
	for place in "$there/file" "$there/lender" "$there/dir" "$raw"; do
		"$program" snapshot create data --storage "$place" --take
	done
	"$program" snapshot create data --storage "$there/encrypted" --encrypt --take
	content "the second content" | dd of=/dev/ublk-blksnap/data bs=1M iflag=fullblock oflag=direct conv=fsync status=none
	# All of it is stored, and durable, as bad as it can be.
	for id in $("$program" snapshot list --json | grep -o '"id": *"[^"]*"' | cut -d'"' -f4); do
		stored() { [ "$("$program" snapshot info "$id" --json | grep -o '"stored": *[0-9]*' | grep -o '[0-9]*$')" -ge $((16 << 20)) ]; }
		awaits "the store of $id" stored
	done
	sync
	cp --sparse=never "$there/encrypted" "$kept/copy"
	[ "$(readable "$kept/copy")" = 0 ] || fail "what is encrypted can be read"
	rm "$kept/copy"
	n=$(readable "$storage") m=$(readable "$raw")
	((n > 0 && m > 0)) || fail "$n and $m pieces are found: the test does not see them"
	sync
	echo "the power fails now"
	sleep 1000
	;;
without)
	"$program" add "$data" --name data
	"$program" list >/tmp/list 2>&1
	[ "$({ grep -o "lost in a restart or a loss of power, of data ($(realpath "$data"))" /tmp/list || true; } | wc -l)" = 5 ] || fail "list says: $(cat /tmp/list)"
	# And what the power failure means for change tracking, which goes on by the write-intent log.
	for said in list status "status data"; do
		"$program" $said >/tmp/said 2>&1
		grep -q "change tracking goes on after a power failure" /tmp/said || fail "$said says: $(cat /tmp/said)"
	done
	cleared() { [ "$(readable "$raw")" = 0 ]; }
	awaits "the clearing of $raw" cleared
	"$program" list >/tmp/list 2>&1
	grep -q "is not mounted on $there: data of the snapshot may remain there" /tmp/list || fail "list does not say what waits: $(cat /tmp/list)"
	# The events were told while nobody could listen yet.
	timeout 15 "$program" snapshot watch >/tmp/events 2>&1 || true
	[ "$(grep -c " lost: lost in a restart or a loss of power, of data ($(realpath "$data"))" /tmp/events)" = 5 ] || fail "the events are: $(cat /tmp/events)"
	"$program" doctor >/tmp/doctor 2>&1 || true
	grep -q "lost snapshot" /tmp/doctor || fail "doctor does not say what waits: $(cat /tmp/doctor)"
	[ "$(dd if="$data" bs=1M count=16 iflag=direct status=none | sha256sum)" = "$(content "the second content" | sha256sum)" ] || fail "the disk is not right"
	"$program" daemon stop
	umount "$kept"
	sync
	;;
with)
	"$program" add "$data" --name data
	gone() { [ -z "$(ls "$kept/snapshots")" ]; }
	awaits "the end of all notes" gone
	timeout 15 "$program" snapshot watch >/tmp/events 2>&1 || true
	for id in $(grep " lost: " /tmp/events | cut -d' ' -f2); do
		ended() { "$program" snapshot watch "$id" >/tmp/events.one && grep -q " $id destroyed: " /tmp/events.one; }
		awaits "the last event of $id" ended
	done
	[ "$(grep -c " lost: " /tmp/events)" -ge 4 ] || fail "the events are: $(cat /tmp/events)"
	[ "$(ls -A "$there")" = "$(printf 'dir\nlender\nlost+found')" ] || fail "left: $(ls -A "$there")"
	[ -z "$(ls -A "$there/dir")" ] || fail "left: $(ls -A "$there/dir")"
	(($(stat -c '%b * 512' "$there/lender") >= 24 << 20)) || fail "the lender has $(stat -c %b "$there/lender") blocks"
	"$program" daemon stop
	umount "$there" "$kept"
	sync
	fsck.ext4 -f -n "$storage" >/dev/null || fail "the filesystem of the storage is damaged"
	;;
esac
