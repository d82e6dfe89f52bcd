package snapimage

import (
	"bytes"
	"errors"
	"io"
	"os"
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

// signature says what the device at path seems to hold, empty if nothing.
func signature(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 128<<10)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", err
	}
	for _, s := range signatures {
		if end := s.at + int64(len(s.magic)); end <= int64(n) && bytes.Equal(head[s.at:end], []byte(s.magic)) {
			return s.what, nil
		}
	}
	return "", nil
}
