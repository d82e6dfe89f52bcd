# Second stage of the guest, on the host's tree: mounts the rest, runs the job, tells its status.
#
# With systemd it runs three times. As process 1 it mounts the rest and becomes systemd. As "guest.sh job", systemd's only
# service, it runs the job and asks for the end of the machine. As "guest.sh last", when all services have ended and all
# filesystems are unmounted, it tells the status. On a root of its own it does the same, but that its systemd boots as on
# any machine, with all its services.
exec 2>/dev/console
. /run/vm/env.sh

fail() { echo "vm: $*" >/dev/console; echo "failed $*" >&5; sleep 60; }

for port in /sys/class/virtio-ports/*; do
	case "$(<"$port/name")" in
	vm.stdout) exec 3>"/dev/${port##*/}" ;;
	vm.stderr) exec 4>"/dev/${port##*/}" ;;
	vm.status) exec 5>"/dev/${port##*/}" ;;
	esac
done

set_up() {
	ln -s /proc/self/fd /dev/fd
	for fd in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${fd#*:}" "/dev/${fd%:*}"; done
	release=$(uname -r)
	mkdir -p "/lib/modules/$release"
	mount --bind "$VM_MODULES" "/lib/modules/$release" || fail "mount the kernel's modules"
	# The nodes that load their module when they are opened, /dev/loop-control for one.
	while IFS=' :' read -r _ node major minor; do
		case $major in
		c*)
			node=/dev/$node
			[ -d "${node%/*}" ] || mkdir "${node%/*}"
			[ -e "$node" ] || mknod "$node" c "${major#c}" "$minor"
			;;
		esac
	done <"$VM_MODULES/modules.devname"
	mount -t cgroup2 cgroup2 /sys/fs/cgroup
	mount -t debugfs debugfs /sys/kernel/debug
	mount -t tracefs tracefs /sys/kernel/tracing
	# To note the names of tasks too, tracing would patch the scheduler in full run: see init.sh.
	echo 0 >/sys/kernel/tracing/options/record-cmd
	if [ -n "$VM_OUT" ]; then
		mkdir -p "$VM_OUT"
		mount -t virtiofs out "$VM_OUT" || fail "mount VM_OUT"
	fi
	echo vm >/proc/sys/kernel/hostname
	busybox ifconfig lo up
}

# own_systemd boots the systemd of a root of its own. The initramfs of such a system has a udev, with the rules of its
# distribution alone, so that systemd begins with what that one has found. A script /etc/vm-early runs before it.
own_systemd() {
	release=$(uname -r)
	mkdir -p "/lib/modules/$release"
	mount --bind "/run/host$VM_MODULES" "/lib/modules/$release" || fail "mount the kernel's modules"
	[ ! -e /etc/vm-early ] || bash /etc/vm-early || fail "run /etc/vm-early"
	mkdir -p /run/vm/none
	mount --bind /run/vm/none /etc/udev/rules.d
	/lib/systemd/systemd-udevd --daemon && udevadm trigger && udevadm settle && udevadm control --exit || fail "run udev"
	umount /etc/udev/rules.d
	mkdir -p /run/systemd/system/multi-user.target.wants
	cat >/run/systemd/system/vm.service <<-END
		[Unit]
		After=local-fs.target
		[Service]
		Type=exec
		ExecStart=/bin/bash /run/vm/guest.sh job
		KillMode=process
	END
	ln -s ../vm.service /run/systemd/system/multi-user.target.wants
	printf '#!/bin/bash\nexec bash /run/vm/guest.sh last\n' >/lib/systemd/system-shutdown/vm
	chmod 755 /lib/systemd/system-shutdown/vm
	exec -c /sbin/init 3>&- 4>&- 5>&-
}

add_disks() {
	if [ -n "$VM_DISKS" ]; then
		modprobe virtio_blk || fail "load virtio_blk"
		mkdir -p /dev/disk/by-vm
		for disk in /sys/block/vd*; do
			ln -s "/dev/${disk##*/}" "/dev/disk/by-vm/$(<"$disk/serial")"
		done
	fi
}

start_udev() {
	if [ -n "$VM_UDEV" ]; then
		unset DM_DISABLE_UDEV
		udevd=/lib/systemd/systemd-udevd
		[ -x $udevd ] || udevd=/usr/bin/udevadm
		# It writes /run/udev/control once it listens.
		(exec -a systemd-udevd $udevd --daemon) && udevadm trigger && udevadm settle || fail "start udev"
	else
		export DM_DISABLE_UDEV=1
	fi
}

become_systemd() {
	[ -x /lib/systemd/systemd ] || fail "find systemd"
	>/etc/fstab
	# By these files systemd knows a container, in which it leaves swap and device-mapper alone.
	rm -f /.dockerenv /run/.containerenv
	mkdir -p /run/systemd/system
	# What takes time, and nobody here misses.
	for unit in {dev-hugepages,dev-mqueue,sys-kernel-config,sys-fs-fuse-connections}.mount \
		proc-sys-fs-binfmt_misc.automount kmod-static-nodes.service modprobe@{configfs,dm_mod,drm,efi_pstore,fuse,loop}.service \
		systemd-{binfmt,journal-flush,machine-id-commit,pstore,random-seed,sysctl,sysusers,timesyncd,update-utmp}.service; do
		ln -s /dev/null "/run/systemd/system/$unit"
	done
	cat >/run/systemd/system/vm.target <<-END
		[Unit]
		Requires=sysinit.target
		Wants=vm.service
	END
	cat >/run/systemd/system/vm.service <<-END
		[Unit]
		Requires=sysinit.target
		After=sysinit.target
		[Service]
		Type=exec
		ExecStart=/bin/bash /run/vm/guest.sh job
		KillMode=process
	END
	printf '#!/bin/bash\nexec bash /run/vm/guest.sh last\n' >/lib/systemd/system-shutdown/vm
	chmod 755 /lib/systemd/system-shutdown/vm
	exec -c /lib/systemd/systemd --unit=vm.target 3>&- 4>&- 5>&-
}

# run runs a script, to its end and that of its output.
run() {
	# The job writes to pipes, not to the ports: a port cannot be opened twice, so /dev/stderr would be out of reach.
	exec 6> >(exec cat >&3)
	out=$!
	exec 7> >(exec cat >&4)
	err=$!
	bash "$1" </dev/null >&6 2>&7 3>&- 4>&- 5>&- 6>&- 7>&-
	status=$?
	exec 6>&- 7>&-

	# All it said has to leave. A process it left behind may hold the pipe open for ever: then silence is the end.
	for cat in $out $err; do
		before=
		while now=$(cat "/proc/$cat/io" 2>/dev/null) && [ "$now" != "$before" ]; do
			before=$now
			sleep 0.2
		done
	done
}

case $1 in
"")
	[ -z "$VM_ROOT" ] || own_systemd
	set_up
	if [ -n "$VM_SYSTEMD" ]; then
		add_disks
		become_systemd
	fi
	start_udev
	add_disks
	echo running >&5
	run /run/vm/job.sh
	;;
job)
	echo running >&5
	run /run/vm/job.sh
	echo $status >/run/vm/status
	systemctl poweroff || fail "ask systemd for the end"
	exit
	;;
last)
	status=0
	[ ! -e /run/vm/last ] || run /run/vm/last
	before=$(</run/vm/status)
	[ "$before" = 0 ] || status=$before
	;;
esac
echo "status $status" >&5
sync
echo "end" >&5
sleep 60
