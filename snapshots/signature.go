package snapshots

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// signatures are what tells that a block device holds something, as the kernel
// and its tools find it: magic bytes at an offset.
var signatures = []struct {
	what  string
	at    int64
	magic string
}{
	{"an ext2, ext3 or ext4 filesystem", 0x438, "\x53\xef"},
	{"an xfs filesystem", 0, "XFSB"},
	{"a btrfs filesystem", 0x10040, "_BHRfS_M"},
	{"an f2fs filesystem", 0x400, "\x10\x20\xf5\xf2"},
	{"an LVM physical volume", 0x200, "LABELONE"},
	{"a LUKS volume", 0, "LUKS\xba\xbe"},
	{"swap space", 4096 - 10, "SWAPSPACE2"},
	{"an md array's member", 0x1000, "\xfc\x4e\x2b\xa9"},
	{"an md array's member", 0, "\xfc\x4e\x2b\xa9"},
	{"a bcache device", 0x1018, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"a partition table", 512, "EFI PART"},
	{"a partition table", 4096, "EFI PART"},
	{"a partition table or a boot sector", 510, "\x55\xaa"},
}

// checkUnused refuses a block device that holds something, as far as that can be known.
// The list above has what blkid does not report if it is damaged.
func (c StorageConfig) checkUnused() error {
	const way = "if it is not needed, wipe it (wipefs -a) or overwrite it (--overwrite)"
	fd, err := reopen(c.Place.File, unix.O_RDONLY)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), c.Place.Path)
	defer f.Close()
	what, err := signature(f)
	if err == nil && what == "" {
		what, err = c.Probe(c.Place.File)
	}
	switch {
	case errors.Is(err, disk.ErrNoTool):
		return fmt.Errorf("%w: cannot tell what the device holds: %w: install util-linux; %s", ErrStorageInUse, err, way)
	case err != nil:
		return fmt.Errorf("%w: cannot tell what the device holds: %w: %s", ErrStorageInUse, err, way)
	case what != "":
		return fmt.Errorf("%w: the device seems to hold %s: %s", ErrStorageInUse, what, way)
	}
	return nil
}

// signature says what a device seems to hold, empty if nothing. It fails if it cannot
// read both ends of the device, because blkid takes what it cannot read for empty.
func signature(f *os.File) (string, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return "", err
	}
	head := make([]byte, min(size, 128<<10))
	if _, err := f.ReadAt(make([]byte, len(head)), size-int64(len(head))); err != nil {
		return "", err
	}
	if _, err := f.ReadAt(head, 0); err != nil {
		return "", err
	}
	for _, s := range signatures {
		if end := s.at + int64(len(s.magic)); end <= int64(len(head)) && bytes.Equal(head[s.at:end], []byte(s.magic)) {
			return s.what, nil
		}
	}
	return "", nil
}
