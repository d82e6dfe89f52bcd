#!/bin/bash
# make.sh makes the disk "root" a volume group, with a logical volume that holds what is on the disk "plain".
set -e -o pipefail
disk=/dev/disk/by-vm
modprobe dm-mod
lvm() { command "$@" --config 'devices{use_devicesfile=0} activation{monitoring=0}' >/dev/null; }
lvm pvcreate -q $disk/root
lvm vgcreate -q machine $disk/root
lvm lvcreate -q -y -Wn -Zn -L 1g -n root machine
dd if=$disk/plain of=/dev/machine/root bs=1M conv=sparse,fsync status=none
lvm vgchange -q -an machine
