#!/bin/busybox sh
# First process of the guest, in the initramfs: builds the root out of the host's tree and goes there.
# /vm holds the orders: modules (to load, in order), kept (paths that must stay visible), guest.sh, env.sh, job.sh.
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

# The kernel patches its code while it comes up and when it takes the TSC for its clock. QEMU 7.2's emulated processors
# may run a patched place as it was for a moment, a breakpoint, and the kernel then dies (5 boots in 100 with four
# processors): it has only one until that is over. See ErrStale too.
n=0
while read -r clock </sys/devices/system/clocksource/clocksource0/current_clocksource &&
	[ "$clock" = tsc-early ] && [ $n -lt 50 ]; do
	n=$((n + 1))
	sleep 0.1
done
for processor in /sys/devices/system/cpu/cpu[1-9]*/online; do
	[ ! -e "$processor" ] || echo 1 >"$processor"
done

while read -r module; do insmod "/vm/$module"; done </vm/modules

mount -t virtiofs -o ro host /host
if [ -e /vm/own-root ]; then
	for disk in /sys/block/vd*; do
		[ "$(cat "$disk/serial")" != root ] || root=/dev/${disk##*/}
	done
	if ! mount -t ext4 "$root" /root; then
		# A volume group, with the volume "root", or "locked" that is LUKS with the passphrase "vm": the host's LVM finds
		# it, as an initramfs would.
		for dir in proc sys dev; do mount -o bind /$dir /host/$dir; done
		mount -t tmpfs run /host/run
		DM_DISABLE_UDEV=1 chroot /host lvm vgchange -q --nolocking --config 'devices{use_devicesfile=0}' -a y
		for locked in /dev/*/locked; do
			[ ! -e "$locked" ] || echo -n vm | DM_DISABLE_UDEV=1 chroot /host cryptsetup open --disable-keyring --key-file - "$locked" root
		done
		for dir in run dev sys proc; do umount /host/$dir; done
		mount -t ext4 /dev/*/root /root
	fi
	mount -t tmpfs -o mode=755 run /root/run
	mkdir /root/run/host
	for dir in proc sys dev; do mount -o move /$dir /root/$dir; done
	mount -o move /host /root/run/host
	cp -r /vm /root/run/vm
	exec switch_root /root /bin/bash /run/vm/guest.sh
fi
mount -t tmpfs -o mode=755,size=90% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /root
mount -o bind /root /tree

for dir in tmp run; do mount -t tmpfs -o mode=1777 $dir /root/$dir; done
chmod 755 /root/run
for dir in proc sys dev; do mount -o move /$dir /root/$dir; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /root/dev/pts

# What lies in one of the directories just covered, and is needed, is put back.
while read -r path; do
	mkdir -p "/root$path"
	mount -o bind "/tree$path" "/root$path"
done </vm/kept

cp -r /vm /root/run/vm
exec switch_root /root /bin/bash /run/vm/guest.sh
