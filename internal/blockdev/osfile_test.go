package blockdev

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// loopDisk is a block device of size bytes over a sparse file, made by the
// kernel's loop driver; it is gone at the end of the test.
func loopDisk(t *testing.T, size int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("not root: a block device for the test cannot be made; run as root with the loop driver")
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop driver (%v): run where /dev/loop-control exists", err)
	}
	defer ctl.Close()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	// Another user of the machine may take the free one first.
	for range 20 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("no free loop device: %v", err)
		}
		disk := "/dev/loop" + strconv.Itoa(n)
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("no loop device: %v", err)
		}
		var cfg unix.LoopConfig
		cfg.Fd = uint32(backing.Fd())
		err = unix.IoctlLoopConfigure(int(f.Fd()), &cfg)
		if errors.Is(err, unix.EBUSY) {
			f.Close()
			continue
		}
		if err != nil {
			f.Close()
			t.Skipf("configure %s: %v", disk, err)
		}
		t.Cleanup(func() {
			unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
			f.Close()
		})
		return disk
	}
	t.Skip("no free loop device")
	return ""
}

func TestRingOnBlockDevice(t *testing.T) {
	const size = 6 << 30
	disk := loopDisk(t, size)
	f, err := OpenExclusive(disk, disk, unix.O_RDWR|unix.O_DIRECT)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := f.Size(); err != nil || n != size || !f.block {
		t.Fatalf("size %d (%v), block device %v", n, err, f.block)
	}
	q := startQueue(t, RingConfig{Name: "test", Depth: 4, Files: []*OSFile{f}})
	mem := mapped(t, 8192)
	fill(mem[:4096], 1)
	at := func(off int64, kind Kind, second bool) *Op {
		buf := MemBuf(mem)
		if second {
			buf = buf.At(4096)
		}
		return &Op{Kind: kind, File: f, Off: off, Len: 4096, Buf: buf}
	}
	for _, c := range []struct {
		what string
		op   Op
	}{
		{"discard", Op{Kind: Discard}},
		{"zeroes", Op{Kind: WriteZeroes}},
		{"zeroes that stay allocated", Op{Kind: WriteZeroes, NoUnmap: true}},
	} {
		// The range is longer than 4 GiB, and the block on either side stays.
		const begin, end = 4096, size - 4096
		for _, off := range []int64{0, begin, begin + 3<<30, end - 4096, end} {
			op := at(off, Write, false)
			op.FUA = true
			mustDo(t, q, op)
		}
		c.op.File, c.op.Off, c.op.Len = f, begin, end-begin
		if c.op.NoUnmap {
			// The loop driver would fill the backing file with 6 GiB.
			c.op.Len = 1 << 20
		}
		mustDo(t, q, &c.op)
		mustDo(t, q, &Op{Kind: Flush, File: f})
		for _, off := range []int64{0, begin, begin + 3<<30, end - 4096, end} {
			mustDo(t, q, at(off, Read, true))
			want := mem[:4096]
			if off >= c.op.Off && off < c.op.Off+c.op.Len {
				want = make([]byte, 4096)
			}
			if !bytes.Equal(mem[4096:], want) {
				t.Errorf("%s: wrong content at %d", c.what, off)
			}
		}
	}
	// The disk has a cache and no FUA of its own: the block layer flushes.
	flushes := func() int {
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
	before := flushes()
	mustDo(t, q, at(0, Write, false))
	if n := flushes(); n != before {
		t.Errorf("a plain write flushed the disk %d times", n-before)
	}
	op := at(0, Write, false)
	op.FUA = true
	mustDo(t, q, op)
	if n := flushes(); n != before+1 {
		t.Errorf("a write with FUA flushed the disk %d times, want 1", n-before)
	}
	mustDo(t, q, &Op{Kind: Flush, File: f})
	if n := flushes(); n != before+2 {
		t.Errorf("write with FUA and flush flushed the disk %d times, want 2", n-before)
	}
	for _, c := range []struct {
		what string
		op   *Op
		want unix.Errno
	}{
		{"write at the end", at(size, Write, false), unix.ENOSPC},
		{"read at the end", at(size, Read, false), unix.EIO},
		{"unaligned read", at(1, Read, false), unix.EINVAL},
		{"unaligned discard", at(1, Discard, false), unix.EINVAL},
		{"unaligned zeroes", at(1, WriteZeroes, false), unix.EINVAL},
		{"allocate", at(0, Allocate, false), unix.EOPNOTSUPP},
	} {
		if e := onQueue(t, q, c.op); e != c.want {
			t.Errorf("%s: %v, want %v", c.what, e, c.want)
		}
	}
}

// TestRingAsksForDiscard: on a block device the block layer's own discard is
// asked first, and the next way only if there is none.
func TestRingAsksForDiscard(t *testing.T) {
	disk := loopDisk(t, 1<<20)
	f, err := openFile(disk, unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	q := manualQueue(t, RingConfig{Depth: 1})
	done := false
	op := &Op{Kind: Discard, File: f, Len: 1 << 20, Done: func(*Op) { done = true }}
	q.Submit(op)
	if m := q.slots[0].method; m != methodDiscard {
		t.Fatalf("method %d first, want the discard", m)
	}
	for !done {
		if err := q.ring.SubmitAndWait(1, false); err != nil {
			t.Fatal(err)
		}
		if q.slots[0].method != methodDiscard {
			t.Log("kernel older than 6.12: no discard on a ring")
		}
		q.reap()
	}
	if op.Err != 0 {
		t.Fatal(op.Err)
	}
}

func TestOSFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := openFile(file, unix.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.Size(); n != 1000 || err != nil || f.Name() != file || f.block {
		t.Errorf("size %d (%v), name %q, block device %v", n, err, f.Name(), f.block)
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.Size(); !errors.Is(err, unix.EBADF) {
		t.Errorf("size of a closed file: %v, want EBADF", err)
	}
	bad := NewOSFile(1<<20, "bad")
	if e1, e2 := bad.Close(), bad.Close(); !errors.Is(e1, unix.EBADF) || !errors.Is(e2, unix.EBADF) {
		t.Errorf("close of a bad descriptor: %v, then %v", e1, e2)
	}
}
