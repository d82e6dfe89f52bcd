# Second stage of the guest, on the host's tree: mounts the rest, runs the job, tells its status.
exec 2>/dev/console
. /run/vm/env.sh

fail() { echo "vm: $*" >/dev/console; echo "failed $*" >&5; sleep 60; }

ln -s /proc/self/fd /dev/fd
for fd in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${fd#*:}" "/dev/${fd%:*}"; done

for port in /sys/class/virtio-ports/*; do
	case "$(<"$port/name")" in
	vm.stdout) exec 3>"/dev/${port##*/}" ;;
	vm.stderr) exec 4>"/dev/${port##*/}" ;;
	vm.status) exec 5>"/dev/${port##*/}" ;;
	esac
done

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

if [ -n "$VM_UDEV" ]; then
	unset DM_DISABLE_UDEV
	udevd=/lib/systemd/systemd-udevd
	[ -x $udevd ] || udevd=/usr/bin/udevadm
	# It writes /run/udev/control once it listens.
	(exec -a systemd-udevd $udevd --daemon) && udevadm trigger && udevadm settle || fail "start udev"
else
	export DM_DISABLE_UDEV=1
fi

if [ -n "$VM_DISKS" ]; then
	modprobe virtio_blk || fail "load virtio_blk"
	mkdir -p /dev/disk/by-vm
	for disk in /sys/block/vd*; do
		ln -s "/dev/${disk##*/}" "/dev/disk/by-vm/$(<"$disk/serial")"
	done
fi

echo running >&5
# The job writes to pipes, not to the ports: a port cannot be opened twice, so /dev/stderr would be out of reach.
exec 6> >(exec cat >&3)
out=$!
exec 7> >(exec cat >&4)
err=$!
bash /run/vm/job.sh </dev/null >&6 2>&7 3>&- 4>&- 5>&- 6>&- 7>&-
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
echo "status $status" >&5
sync
echo "end" >&5
sleep 60
