package machine

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Disk is a virtio disk of the guest, at /dev/disk/by-vm/Name.
type Disk struct {
	Name string // serial number too; at most 20 bytes
	File string // raw image; the guest's writes stay in it
	// Volatile gives the disk a write cache that the machine's end takes with it: only what the guest has flushed is in
	// File then, and of a flush under way any part. Discards do nothing.
	Volatile bool
}

// attach returns what gives QEMU the disk, as its drive of that number.
func (r *run) attach(i int, d Disk) ([]string, error) {
	// Writes return once the page cache of the host has them, which outlives QEMU. See the package's doc.
	drive := fmt.Sprintf("if=none,id=disk%d,format=raw,cache=writeback,discard=unmap,file=%s", i, commas(d.File))
	if d.Volatile {
		fd, err := r.cached(d.File)
		if err != nil {
			return nil, err
		}
		// A discard would go past nbdkit's cache: what it has there would be read until the power fails, and zeroes after that.
		drive = fmt.Sprintf("if=none,id=disk%d,format=raw,cache=writeback,discard=ignore,file.driver=nbd,file.server.type=fd,file.server.str=%d", i, fd)
	}
	return []string{"-drive", drive, "-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=%s", i, d.Name)}, nil
}

// commas writes a value of an option of QEMU's.
func commas(value string) string { return strings.ReplaceAll(value, ",", ",,") }

// cached serves file with a write cache, by NBD, and returns the descriptor of the connection in QEMU. nbdkit keeps what
// it was given in a nameless file of its own until it is told to flush, and does not flush when the connection ends.
func (r *run) cached(file string) (fd int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("create socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[0]), "nbd")
	defer theirs.Close()
	fd = r.give(os.NewFile(uintptr(pair[1]), "nbd"))
	nbdkit := exec.Command("nbdkit", "--single", "--filter=cache", "file", "file="+file, "cache=writeback", "cache-min-block-size=4096")
	nbdkit.Stdin, nbdkit.Stdout, nbdkit.Stderr = theirs, theirs, &r.said
	return fd, r.spawn(nbdkit)
}
