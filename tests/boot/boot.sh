#!/bin/bash
# boot.sh PART runs in a Debian of its own, after its boot. The parts are three boots of it:
#
#	install   the package; disks get filters with "add --boot", fstab names the filters; a backup by a timer; an upgrade
#	filtered  everything is mounted from filters, with its history, and backed up; a disk is missing, another comes late
#	broken    the daemon does not start: nothing is mounted, until an administrator takes a disk out; then the package goes
set -e -o pipefail
part=$1
PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
id=/dev/disk/by-id/virtio-
config=/etc/ublk-blksnap.conf
rules=/etc/udev/rules.d/63-ublk-blksnap-disks.rules
uuid=11111111-2222-3333-4444-555555555555
late=66666666-7777-8888-9999-aaaaaaaaaaaa
missing=bbbbbbbb-cccc-dddd-eeee-ffffffffffff
volume=cccccccc-dddd-eeee-ffff-111111111111
backup=/root/backup

fail() { echo "boot $part: $*" >&2; exit 1; }
at_end() {
	status=$?
	[ $status = 0 ] || journalctl -b -o short-monotonic -n 250 >&2
	exit $status
}
trap at_end EXIT

# await COMMAND… waits until it succeeds.
await() {
	local n=0
	until "$@"; do
		n=$((n + 1))
		((n < 600)) || fail "in vain: $*"
		sleep 0.2
	done
}

source_of() { findmnt -n -o SOURCE "/mnt/$1"; }
state_of() { systemctl show -p ActiveState --value "$1"; }
is_state() { [ "$(state_of "$1")" = "$2" ]; }
unit_of() { systemd-escape -p --suffix=device "$1"; }
is_link() { [ -L "$1" ]; }
settled() { [[ $(state_of "mnt-$1.mount") != activating && -z $(systemctl list-jobs --no-legend "mnt-$1.mount") ]]; }

# filtered NAME… says that /mnt/NAME is mounted from a filter.
filtered() {
	local name from
	for name; do
		from=$(source_of "$name") || fail "/mnt/$name is not mounted"
		[[ $from == /dev/ublkb* ]] || fail "/mnt/$name is mounted from $from"
	done
}

# take makes a snapshot of the disk with a UUID: image is its image, token names it.
take() {
	image=$(ublk-blksnap snapshot create uuid --storage /var/tmp --take)
	token=$(ublk-blksnap snapshot info latest --field take)
}

# backed_up N waits until the timer's service has made backup N.
backed_up() {
	await test -d /backup/uuid/"$1"
	await is_state backup-uuid.service inactive
}

# write NAME changes the filesystem with a UUID.
write() { dd if=/dev/urandom of="/mnt/uuid/$1" bs=64K count=20 conv=fsync status=none; }

processes() { grep -lxs ublk-blksnap /proc/[0-9]*/comm; }
daemon() { systemctl show -p MainPID --value ublk-blksnap; }

# busy writes to a filesystem, and reads that again past the cache, until it is told that it is enough.
busy() {
	local n=0
	until [ -e /run/enough ]; do
		n=$((n + 1))
		head -c 300000 /dev/urandom >/run/busy
		dd if=/run/busy of=/mnt/label/busy-$((n % 4)) bs=64K conv=fsync status=none || return 1
		dd if=/mnt/label/busy-$((n % 4)) bs=64K iflag=direct status=none | cmp - /run/busy || return 1
	done
}

# At the end of the machine, when nothing is mounted any more.
at_poweroff() {
	cat >/run/vm/last <<-END
		set -e -o pipefail
		not() { if "\$@" >&2; then echo "not expected: \$*" >&2; exit 1; fi; }
		not ls /dev/ublkb*
		for disk in $*; do
			[ -e $id\$disk ]
			dumpe2fs -h $id\$disk >/run/vm/super 2>/dev/null
			not grep needs_recovery /run/vm/super
			grep -qE "Filesystem state: *clean$" /run/vm/super
			e2fsck -f -n $id\$disk >/dev/null 2>&1
		done
		[ ! -e /usr/sbin/ublk-blksnap ] || ls /var/lib/ublk-blksnap | grep -q .
		echo "the disks are whole"
	END
}

case $part in
install)
	dpkg -i .cache/test/deb/now/*.deb
	[ "$(systemctl is-enabled ublk-blksnap)" = disabled ] || fail "the package enables the unit"
	! processes || fail "the package starts the daemon"
	systemctl enable -q ublk-blksnap
	mkfs.ext4 -q -U $uuid ${id}uuid
	# One partition of sectors 2048 to 131071, because this Debian has no fdisk.
	printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\370\001\0' | dd of=${id}label bs=1 seek=446 conv=notrunc status=none
	printf '\125\252' | dd of=${id}label bs=1 seek=510 conv=notrunc status=none
	blockdev --rereadpt ${id}label
	udevadm settle
	mkfs.ext4 -q -L "a label" ${id}label-part1
	mkfs.ext4 -q ${id}name
	mkfs.ext4 -q -U $late ${id}late
	udevadm settle
	mkdir -p /mnt/{uuid,label,name,late,missing,volume}

	# A volume that is mounted by its own path and attached meanwhile cannot have its filter at the boot as well.
	pvcreate -q ${id}group >/dev/null
	vgcreate -q vg0 ${id}group >/dev/null
	lvcreate -q -y -n volume -L 32M vg0 >/dev/null
	mkfs.ext4 -q -U $volume /dev/vg0/volume
	echo "/dev/vg0/volume /mnt/volume ext4 defaults 0 2" >/etc/fstab
	systemctl daemon-reload
	systemctl start mnt-volume.mount
	[ "$(ublk-blksnap add /dev/vg0/volume --name volume)" = /dev/mapper/vg0-volume ]
	for dry in "" --dry-run; do
		said=$(ublk-blksnap add /dev/vg0/volume --boot $dry 2>&1) && fail "a volume that is attached is named for the boot: $said"
		[[ $said == *"the filter volume came under it"*"remove volume, unmount it, add it with --boot"* ]] || fail "add $dry says: $said"
	done
	[ ! -e /etc/ublk-blksnap.d/volume.conf ] || fail "$(cat /etc/ublk-blksnap.d/*)"
	# A table that somebody writes all the same does not take it from its users, and the check says what it would do at the boot.
	mkdir -p /etc/ublk-blksnap.d
	printf '[[device]]\nname = "volume"\npath = "/dev/mapper/vg0-volume"\n' >/etc/ublk-blksnap.d/mine.conf
	said=$(ublk-blksnap config check)
	[[ $said == *"/etc/fstab:1 names /dev/vg0/volume, which is kept from systemd at the boot: "*"or /dev/ublk-blksnap/volume"* ]] || fail "config check says: $said"
	ublk-blksnap config apply
	ready() { [[ $(udevadm info -q property /dev/vg0/volume) != *SYSTEMD_READY=0* ]]; }
	udevadm trigger --settle /dev/vg0/volume
	ready || fail "a mounted volume is taken from systemd"
	systemctl stop mnt-volume.mount
	udevadm trigger --settle /dev/vg0/volume
	ready || fail "a volume with a filter under it is taken from systemd"
	ublk-blksnap remove volume
	udevadm trigger --settle /dev/vg0/volume
	! ready || fail "a volume without a filter is not kept from systemd"
	rm /etc/ublk-blksnap.d/mine.conf
	ublk-blksnap config apply
	udevadm trigger --settle /dev/vg0/volume
	said=$(ublk-blksnap add /dev/vg0/volume --name volume --boot 2>&1)
	[[ $said == *"/etc/fstab:1 names /dev/vg0/volume, which is kept"* ]] || fail "add says: $said"
	grep -qx "path = '/dev/vg0/volume'" /etc/ublk-blksnap.d/volume.conf || fail "$(cat /etc/ublk-blksnap.d/*)"

	# A path that may be another disk next time becomes one that stays.
	said=$(ublk-blksnap add "$(readlink -f ${id}uuid)" --name uuid --boot 2>&1)
	[[ $said == *"uuid: at the boot the disk is ${id}uuid,"* ]] || fail "add says: $said"
	grep -qx "path = '${id}uuid'" /etc/ublk-blksnap.d/uuid.conf || fail "$(cat /etc/ublk-blksnap.d/*)"
	# One that has its filter already is only written down.
	ublk-blksnap add ${id}label --name label >/dev/null
	ublk-blksnap add ${id}label --boot --queues 1
	ublk-blksnap add ${id}name --name name --boot
	ublk-blksnap add ${id}late --name late --boot
	# What a person has written stays as it is.
	printf '\n# my own\n[[device]]\n  name = "missing" # one day\n  path = "%s"\n' ${id}missing >>$config
	cp $config /root/config
	said=$(ublk-blksnap config check)
	[[ $said == *"$config: ok"*"${id}missing is not there now"*"$rules is not from this configuration"* ]] || fail "config check says: $said"
	ublk-blksnap config apply
	said=$(ublk-blksnap config check)
	[[ $said != *"$rules"* ]] || fail "config check says: $said"
	cmp $config /root/config

	cat >/etc/fstab <<-END
		UUID=$uuid /mnt/uuid ext4 x-systemd.device-timeout=10min 0 2
		LABEL=a\040label /mnt/label ext4 x-systemd.device-timeout=10min 0 2
		/dev/ublk-blksnap/name /mnt/name ext4 x-systemd.device-timeout=10min 0 2
		UUID=$late /mnt/late ext4 nofail,x-systemd.device-timeout=10min 0 2
		UUID=$missing /mnt/missing ext4 nofail,x-systemd.device-timeout=5s 0 2
		UUID=$volume /mnt/volume ext4 x-systemd.device-timeout=10min 0 2
	END
	systemctl daemon-reload
	systemctl start mnt-{uuid,label,name,late,volume}.mount
	filtered uuid label name late volume
	# The shell completes names, which it has from the daemon. The package bash-completion is played, which loads the file.
	said=$(
		_get_comp_words_by_ref() { cur=${COMP_WORDS[COMP_CWORD]} words=("${COMP_WORDS[@]}") cword=$COMP_CWORD; }
		. /usr/share/bash-completion/completions/ublk-blksnap
		COMP_WORDS=(ublk-blksnap status lab) COMP_CWORD=2 COMP_LINE="ublk-blksnap status lab" COMP_POINT=23 COMP_TYPE=9
		__start_ublk-blksnap ublk-blksnap 2>/dev/null
		echo "${COMPREPLY[*]}"
	)
	[ "$said" = label ] || fail "completed: $said"
	write first
	take
	dd if="$image" of=$backup bs=1M conv=sparse status=none
	echo "$token" >/root/token
	ublk-blksnap snapshot destroy "$image"

	# Backups by a timer, in the words of the manual as the package has it. But that one comes at once, and at every boot.
	install -m 755 /usr/share/doc/ublk-blksnap/docs/backup.sh /usr/local/sbin/backup-disk
	sed -n '/^cat >.*service <</,/^systemctl enable/p' /usr/share/doc/ublk-blksnap/docs/backup.md |
		sed 's/data/uuid/g; s/^OnCalendar=.*/OnActiveSec=1s\nAccuracySec=1ms/' >/run/nightly
	grep -q OnActiveSec /run/nightly || fail "the manual has no timer: $(</run/nightly)"
	bash -e /run/nightly
	backed_up 1
	[ -e /backup/uuid/1/full ] || fail "the first backup is not full"
	write second

	# The next version takes over under the mounted filters. Whoever writes only waits.
	pid=$(daemon)
	busy &
	said=$(dpkg -i .cache/test/deb/next/*.deb 2>&1) || fail "the upgrade: $said"
	[[ $said == *"99.0.0 has taken over from "*": I/O waited for "* ]] || fail "the upgrade says: $said"
	touch /run/enough
	wait $! || fail "a write failed in the upgrade"
	[ "$(daemon)" = "$pid" ] || fail "another process serves"
	[[ $(blksnap version) == 99.0.0.0 && $(ublk-blksnap --version) == "ublk-blksnap 99.0.0 ("*")" ]] || fail "$(ublk-blksnap --version)"
	[ "$(systemctl is-enabled ublk-blksnap)" = enabled ] || fail "the upgrade disables the unit"
	filtered uuid label name late

	# The late disk is not there from the next boot on, until somebody plugs it in.
	cat >/etc/vm-early <<-'END'
		cd /sys/block
		for disk in vd*; do
			[ "$(<"$disk/serial")" != late ] || basename "$(readlink -f "$disk/device")" >/run/late
		done
		cat /run/late >/sys/bus/virtio/drivers/virtio_blk/unbind
	END
	at_poweroff uuid label-part1 name late
	;;
filtered)
	filtered uuid label name volume
	[ ! -e ${id}late ] || fail "the late disk is there"
	for name in uuid label name volume; do
		ublk-blksnap cbt info $name | grep -qx history=continued || fail "$name: $(ublk-blksnap cbt info $name)"
	done
	said=$(ublk-blksnap list 2>&1)
	for name in late missing; do
		[[ $said == *"$name: ${id}$name has no filter yet: it is not there"* ]] || fail "list says: $said"
	done
	# The boot is over, whatever it misses, while what is mounted from there is still waited for.
	[[ $(systemctl list-jobs) == *mnt-late.mount* ]] || fail "nothing waits for the late disk: $(systemctl list-jobs)"
	await settled missing
	[ "$(state_of mnt-missing.mount)" != active ] || fail "a disk that is not there is mounted"
	# The timer has made a backup at this boot, of what was written before the boot: an increment, which restores the disk.
	backed_up 2
	systemctl disable -q --now backup-uuid.timer
	[[ ! -e /backup/uuid/2/full && ! -e /backup/uuid/3 ]] || fail "backups: $(journalctl -b -u backup-uuid -o cat)"
	(($(stat -c %s /backup/uuid/2/data) >= 1310720)) || fail "the increment has $(stat -c %s /backup/uuid/2/data) bytes"
	backup-disk restore /backup/uuid /root/restored
	mount -o loop,ro /root/restored /media
	for name in first second; do cmp /mnt/uuid/$name /media/$name || fail "$name is not as it was backed up"; done
	umount /media
	rm /root/restored
	# Nobody has the disk beside its filter.
	! mount ${id}uuid /media 2>/dev/null || fail "the disk itself is mounted"

	# Whatever was written before and after the boot.
	write third
	take
	dd if="$image" of=/root/now bs=1M conv=sparse status=none
	! cmp -s /root/now $backup || fail "nothing has changed"
	bytes=0
	while IFS=: read -r sector count; do
		dd if="$image" of=$backup bs=512 skip="$sector" seek="$sector" count="$count" conv=notrunc status=none
		bytes=$((bytes + count * 512))
	done < <(ublk-blksnap cbt changes uuid --since "$(cat /root/token)")
	cmp /root/now $backup || fail "the increment does not restore the disk"
	((bytes >= 2621440 && bytes < 32 << 20)) || fail "the increment has $bytes bytes"
	ublk-blksnap snapshot destroy "$image"

	# A disk that comes late gets its filter, and is mounted from it.
	cat /run/late >/sys/bus/virtio/drivers/virtio_blk/bind
	await is_link /dev/ublk-blksnap/late
	await source_of late >/dev/null
	filtered late
	[[ $(ublk-blksnap list 2>&1) != *"${id}late has no filter"* ]] || fail "$(ublk-blksnap list 2>&1)"

	# A filter that somebody has removed stays away, and so do mounts from the disk.
	systemctl stop mnt-name.mount
	ublk-blksnap remove name
	sleep 3
	! ublk-blksnap list | grep -q ^name || fail "a filter that was removed has come back"
	udevadm settle
	[ "$(state_of "$(unit_of ${id}name)")" != active ] || fail "systemd may mount the disk itself"
	ublk-blksnap add ${id}name --name name
	systemctl start mnt-name.mount
	filtered name

	# The next boot has no daemon. Nothing but the waiting shall end it.
	chmod -x /usr/sbin/ublk-blksnap
	sed -i 's/ext4 [^ ]* /ext4 nofail,x-systemd.device-timeout=5s /' /etc/fstab
	rm /etc/vm-early
	at_poweroff uuid label-part1 name late
	;;
broken)
	[ "$(state_of ublk-blksnap)" != active ] || fail "the daemon runs"
	for name in uuid label name late volume; do
		await settled $name
		! source_of $name || fail "/mnt/$name is mounted behind the filter's back"
	done
	# The group was activated by udev, and LVM's own link leads to the volume, but systemd may not mount it.
	await is_link /dev/vg0/volume
	udevadm settle
	[ "$(state_of "$(unit_of /dev/vg0/volume)")" != active ] || fail "systemd may mount the volume itself"
	for link in by-uuid/$uuid by-uuid/$late by-uuid/$volume 'by-label/a\x20label'; do
		! is_link "/dev/disk/$link" || fail "$link leads to $(readlink "/dev/disk/$link")"
	done
	! systemctl start mnt-uuid.mount 2>/dev/null || fail "/mnt/uuid can be mounted"
	# The way out for one boot: a parameter of the kernel.
	{ tr -d '\n' </proc/cmdline; echo " ublk_blksnap.boot=off"; } >/run/cmdline
	mount --bind /run/cmdline /proc/cmdline
	udevadm trigger --settle ${id}label
	udevadm trigger --settle ${id}label-part1
	[ "$(readlink -f '/dev/disk/by-label/a\x20label')" = "$(readlink -f ${id}label-part1)" ] || fail "the kernel's parameter does not help"
	umount /proc/cmdline
	udevadm trigger --settle ${id}label
	udevadm trigger --settle ${id}label-part1
	! is_link '/dev/disk/by-label/a\x20label' || fail "the link stays"
	# The way out, without a daemon.
	cp /usr/sbin/ublk-blksnap /root/program
	chmod +x /root/program
	/root/program remove uuid --boot
	udevadm settle
	systemctl start mnt-uuid.mount
	[ "$(source_of uuid)" = "$(readlink -f ${id}uuid)" ] || fail "/mnt/uuid is mounted from $(source_of uuid)"
	for name in first second third; do [ -s /mnt/uuid/$name ] || fail "$name is not there"; done
	[ ! -e /etc/ublk-blksnap.d/uuid.conf ] || fail "the table is there"
	! grep -q virtio-uuid $rules || fail "$(cat $rules)"
	cmp $config /root/config
	# The others have their filters once there is a daemon again.
	chmod +x /usr/sbin/ublk-blksnap
	systemctl start ublk-blksnap
	systemctl start mnt-{label,name,late,volume}.mount
	filtered label name late volume
	[ "$(source_of uuid)" = "$(readlink -f ${id}uuid)" ]

	# The package goes when no filter is in use, at first but for what was configured and what is kept of the disks, and when
	# it is purged leaves nothing. The disks are used as any others then.
	said=$(dpkg -P ublk-blksnap-compat ublk-blksnap 2>&1) && fail "removed under its users: $said"
	[[ $said == *"mounted on /mnt/"*"not removed, because filters are in use"* ]] || fail "dpkg says: $said"
	filtered label name late volume
	systemctl stop mnt-{label,name,late,volume}.mount
	said=$(dpkg -r ublk-blksnap 2>&1) || fail "dpkg says: $said"
	[[ $said == *"/etc/fstab names filters"* ]] || fail "dpkg says: $said"
	! processes || fail "a daemon runs"
	[ "$(systemctl show -p LoadState --value ublk-blksnap)" = not-found ] || fail "the unit is there"
	for file in /usr/sbin/ublk-blksnap $rules /run/ublk-blksnap /dev/ublkb*; do [ ! -e $file ] || fail "left by the package: $file"; done
	cmp $config /root/config
	for name in label name late; do [ -s /etc/ublk-blksnap.d/$name.conf ] || fail "the table of $name is gone"; done
	[ -n "$(ls /var/lib/ublk-blksnap)" ] || fail "the change maps are gone"
	said=$(dpkg -P ublk-blksnap 2>&1) || fail "dpkg says: $said"
	left=$(find /etc /usr /var /run /dev -xdev -name '*blksnap*' -not -path '/run/host/*' -not -path '/run/systemd/generator/*' -not -path '/var/log/*')
	[ -z "$left" ] || fail "left by the package: $left"
	systemctl daemon-reload
	systemctl start mnt-{label,late}.mount
	for disk in label-part1 late; do [ "$(source_of ${disk%-*})" = "$(readlink -f $id$disk)" ] || fail "$disk is not mounted"; done
	[ -s /mnt/label/busy-1 ] || fail "what was written in the upgrade is not there"
	at_poweroff uuid label-part1 name late
	;;
*) fail "no such part" ;;
esac
