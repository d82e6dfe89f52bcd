package cbt

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// TestSuperblockDurable: the superblock that is on record for a power failure is durable, whoever wrote it and whether or
// not he flushed the disk. Otherwise the power could fail, the disk lose it, and the history with it.
func TestSuperblockDurable(t *testing.T) {
	guest.NeedEither(t)
	p := newFailing(t, guest.Ext4.Minimum)
	guest.Ext4.Make(t, p.disk)
	dev := p.add()
	awaitCovered(t, p.d, dev, true, "")
	record := func() string {
		p.saved = p.files()
		return string(p.saved[p.named(".running")])
	}
	was, before := record(), flushes(t, p.disk)
	f := direct.MustOpen(t, dev.Path, unix.O_RDWR)
	defer f.Close()
	head := direct.Pages(t, 4096)
	if err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	head[1024+0x78] ^= 1 // its label
	if err := f.WriteAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if n := flushes(t, p.disk); n != before {
		t.Fatalf("a write flushed the disk %d times", n-before)
	}
	guest.WaitFor(t, "the superblock to be on record", func() bool { return record() != was })
	if flushes(t, p.disk) == before {
		t.Error("a superblock is on record that the disk was never told to keep")
	}
}

// flushes is how often a disk was flushed.
func flushes(t *testing.T, disk string) int {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	fields := strings.Fields(string(b))
	if err != nil || len(fields) < 16 {
		t.Fatalf("statistics of %s: %q, %v", disk, b, err)
	}
	n, err := strconv.Atoi(fields[15])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
