#!/bin/bash
# root.sh TARGET runs in a Debian whose root filesystem is a volume with such a table, linear or crypt, and puts a filter under
# it; then under the volume below, if there is one. Everybody goes on working, with little memory, while the daemon is killed
# again and again. See run.sh.
set -e -o pipefail
PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin

fail() { echo "root: $*" >&2; exit 1; }
at_end() {
	status=$?
	[ $status = 0 ] || { journalctl -b -o short-monotonic -n 150; cat /run/ublk-blksnap/daemon.log; } >&2
	exit $status
}
trap at_end EXIT

table() { dmsetup table "$volume"; }
through_filter() { [[ $(table) == "0 "*" linear "* && $(basename "$(readlink "/sys/dev/block/$(table | cut -d' ' -f4)")") == ublkb* ]]; }
main_pid() { systemctl show -p MainPID --value ublk-blksnap; }
restarts() { systemctl show -p NRestarts --value ublk-blksnap; }

# await COMMAND… waits until it succeeds.
await() {
	local n=0
	until "$@"; do
		n=$((n + 1))
		((n < 600)) || fail "in vain: $*"
		sleep 0.1
	done
}

# Each writer reads back what it wrote, past the cache.
writer() {
	local n=0
	until [ -e /run/enough ]; do
		n=$((n + 1))
		head -c 1000000 /dev/urandom >/run/data-$1
		dd if=/run/data-$1 of=/var/tmp/load/$1-$((n % 4)) bs=64K conv=fsync status=none || return 1
		dd if=/var/tmp/load/$1-$((n % 4)) bs=64K iflag=direct status=none | cmp - /run/data-$1 || return 1
		((n % 8)) || sync
	done
	echo $n >/run/writes-$1
}

# Memory that is asked for again and again, so that nothing of a file stays that nobody has locked.
pressure() {
	until [ -e /run/enough ]; do
		head -c "$(awk '/MemAvailable/ { print int($2 * 1024 * 7 / 10) }' /proc/meminfo)" /dev/zero | tail -n 1 >/dev/null || true
		sleep 0.5
	done
}

# load SECONDS kills the daemon again and again under load.
load() {
	local pid one two three end=$((SECONDS + $1)) kills=$(restarts)
	rm -f /run/enough
	writer 1 & one=$!
	writer 2 & two=$!
	pressure & three=$!
	while ((SECONDS < end)); do
		pid=$(main_pid)
		[ "$pid" != 0 ] && [[ $(stat -L -c %d "/proc/$pid/exe") == "$(stat -c %d /run/ublk-blksnap/state)" ]] || fail "process $pid is not resident"
		echo 3 >/proc/sys/vm/drop_caches
		kill -9 "$pid"
		kills=$((kills + 1))
		another() { local now; now=$(main_pid) && [ "$now" != 0 ] && [ "$now" != "$pid" ] && [ "$(systemctl is-active ublk-blksnap)" = active ]; }
		await another
		sleep 5
	done
	touch /run/enough
	wait $one && wait $two || fail "a write failed, or was lost"
	wait $three
	through_filter || fail "the table is $(table)"
	[ "$(restarts)" -ge "$kills" ] || fail "systemd has not noticed every death"
	echo "# root, $volume: $(cat /run/writes-1) and $(cat /run/writes-2) files written, $kills daemons killed by now"
}

# The initramfs had no udev: this one takes the nodes of its volumes away when it comes to them, and that may be only now.
udevadm settle
dmsetup mknodes
mkfs.ext4 -q /dev/disk/by-id/virtio-store
mkdir -p /mnt/store /mnt/image /var/tmp/load
mount /dev/disk/by-id/virtio-store /mnt/store
dpkg -i .cache/test/deb/now/*.deb >/dev/null
systemctl start ublk-blksnap
root=/sys/dev/block/$(mountpoint -d /)
volumes=$(cat "$root"/dm/name "$root"/slaves/*/dm/name 2>/dev/null || true)
volume=${volumes%%$'\n'*}
before=$(table)
[[ $before == "0 "*" $1 "* ]] || fail "/ is $(findmnt -n -o SOURCE /), $before"

# Not by a daemon that nobody could start again.
for volume in $volumes; do
	if said=$(ublk-blksnap add "/dev/mapper/$volume" 2>&1) || [[ $said != *"the root filesystem lies on it"*"resident = true"* ]]; then fail "add says: $said"; fi
done
volume=${volumes%%$'\n'*}
[ "$(table)" = "$before" ] || fail "a refusal has changed the table"
sed -i 's/^resident = .*/resident = true/; s/^state_dir = .*/state_dir = ""/' /etc/ublk-blksnap.conf
ublk-blksnap daemon reload >/dev/null
[ "$(ublk-blksnap add "/dev/mapper/$volume" --name root)" = "/dev/mapper/$volume" ] || fail "add names another path"
through_filter || fail "the table is $(table)"

# What a snapshot shows.
dd if=/dev/urandom of=/root/file bs=1M count=8 conv=fsync status=none
sum=$(sha256sum </root/file)
image=$(ublk-blksnap snapshot create root --storage /mnt/store --take)
dd if=/dev/urandom of=/root/file bs=1M count=8 conv=notrunc,fsync status=none

load "$SECONDS_UNDER_LOAD"
ublk-blksnap status >&2

mount -o ro,noload "$image" /mnt/image
[ "$(sha256sum </mnt/image/root/file)" = "$sum" ] || fail "the image does not show the file as it was"
umount /mnt/image
ublk-blksnap snapshot destroy "$image"

# The next version takes over, read from the volume itself.
pid=$(main_pid)
dpkg -i .cache/test/deb/next/*.deb >/dev/null 2>&1 || fail "no upgrade"
[[ $(main_pid) == "$pid" && $(blksnap version) == 99.0.0.0 ]] || fail "after the upgrade $(blksnap version) runs, process $(main_pid)"

ublk-blksnap remove root
[ "$(table)" = "$before" ] || fail "the table was $before and is $(table)"
# It comes once more, and the machine's end takes it away.
for volume in $volumes; do
	ublk-blksnap add "/dev/mapper/$volume" --name root >/dev/null
	through_filter || fail "the table is $(table)"
	load 10
	[ "$volume" = "${volumes##*$'\n'}" ] || ublk-blksnap remove root
done
cat >/run/vm/last <<-END
	if ls /dev/ublkb* >&2; then exit 1; fi
END
