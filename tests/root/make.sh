#!/bin/bash
# make.sh TARGET makes the disk "root" a volume group, with a logical volume that holds what is on the disk "plain": as it is, or
# behind LUKS if the target is crypt. "make.sh TARGET check" checks what is there.
set -e -o pipefail
disk=/dev/disk/by-vm
modprobe -a dm-mod dm-crypt
lvm() { command "$@" --config 'devices{use_devicesfile=0} activation{monitoring=0}' >/dev/null; }
luks() { echo -n vm | cryptsetup "$@" --key-file -; }
case $1 in
linear) volume=root filesystem=/dev/machine/root ;;
crypt) volume=locked filesystem=/dev/mapper/unlocked ;;
esac
if [ "$2" = check ]; then
	lvm vgchange -q -ay machine
else
	lvm pvcreate -q $disk/root
	lvm vgcreate -q machine $disk/root
	lvm lvcreate -q -y -Wn -Zn -L 1040m -n $volume machine
	[ $volume = root ] || luks luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/machine/locked
fi
# With its key in the table, not in the kernel's keyring: only so can a volume get a filter.
[ $volume = root ] || luks open --disable-keyring /dev/machine/locked unlocked
if [ "$2" = check ]; then
	e2fsck -f -n $filesystem
else
	# All of it: what nobody wrote to an encrypted volume is no zeroes.
	dd if=$disk/plain of=$filesystem bs=1M conv=fsync status=none
fi
[ $volume = root ] || cryptsetup close unlocked
lvm vgchange -q -an machine
