// Package machine boots a stock Debian kernel in QEMU on the file tree of the host and runs one command in it.
//
//	host                                   guest
//	/ ────────── virtiofs, read-only ────> lower layer ┐
//	                                       tmpfs       ┴ overlay ─> /   (the host's programs and the working tree,
//	VM_OUT ───── virtiofs, writable ─────> VM_OUT                        at their own paths; writes are lost)
//	disk images  virtio-blk ─────────────> /dev/disk/by-vm/NAME
//	stdout, stderr, status <─ virtio-serial ports, one each; the kernel's own messages go elsewhere (the console log)
//
// So a program, script or compiled test of the host runs in the guest unchanged, as root, with the kernel that the test
// asks for. The guest has no network. It has an init system and udev only if they are asked for.
//
// With Config.Systemd, process 1 is the host's systemd. It brings up sysinit.target of the host's tree, with udev and the
// journal, but with an empty /etc/fstab. The command is a service after that. When the command has ended, systemd powers
// the machine off. The command may leave a script, /run/vm/last, which runs when nothing else runs any more and nothing is
// mounted. The script's output is added to the command's. Its exit status counts if the command's was 0.
//
// With Config.Root, the guest has a root of its own: the Debian on that disk, which keeps what is written to it. Its systemd
// boots as on any machine, and the command is a service of multi-user.target. The host's tree is at /run/host.
//
// A guest that is killed loses what its kernel had not yet handed to the disk: the page cache of the guest, and any
// write still in flight. What the guest's disk had already taken, flushed or not, lies in the page cache of the host
// and survives. A kill is therefore a power failure of a machine whose disks have no volatile cache. A disk that is
// Volatile has one: what was not flushed is lost.
//
// Nothing outlives Machine.Wait. Nothing outlives the calling process either, even if it is killed: everything is started
// with a parent-death signal, and the sockets in between have no name in the file tree.
package machine
