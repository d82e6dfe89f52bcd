#!/bin/busybox sh
# First process of the guest, in the initramfs: builds the root out of the host's tree and goes there.
# /vm holds the orders: modules (to load, in order), kept (paths that must stay visible), guest.sh, env.sh, job.sh.
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

while read -r module; do insmod "/vm/$module"; done </vm/modules

mount -t virtiofs -o ro host /host
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
