package blockdev

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mapped is memory off the Go heap for the length of the test.
func mapped(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("map %d bytes: %v", n, err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// diskFile is a regular file of the given size in dir.
func diskFile(t testing.TB, dir string, size int64, o OpenOptions) *OSFile {
	t.Helper()
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := OpenDisk(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func startLoop(t testing.TB, cfg LoopConfig) *Loop {
	t.Helper()
	l, err := NewLoop(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Stop)
	return l
}

// onLoop runs op on the loop from outside and waits for its end.
func onLoop(l *Loop, op *Op) unix.Errno {
	done := make(chan struct{})
	op.Done = func(*Op) { close(done) }
	l.Post(&Task{Run: func() { l.Submit(op) }})
	<-done
	return op.Err
}

func TestLoopWritesAndReads(t *testing.T) {
	f := diskFile(t, t.TempDir(), 1<<20, OpenOptions{})
	l := startLoop(t, LoopConfig{Name: "test", Depth: 4, Files: []*OSFile{f}})
	mem := mapped(t, 128<<10)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 64 << 10 {
		mem[i] = byte(rng.Uint32())
	}
	if e := onLoop(l, &Op{Kind: Write, FUA: true, File: f, Off: 4096, Len: 64 << 10, Buf: MemBuf(mem)}); e != 0 {
		t.Fatal(e)
	}
	if e := onLoop(l, &Op{Kind: Flush, File: f}); e != 0 {
		t.Fatal(e)
	}
	if e := onLoop(l, &Op{Kind: Read, File: f, Off: 4096, Len: 64 << 10, Buf: MemBuf(mem).At(64 << 10)}); e != 0 {
		t.Fatal(e)
	}
	if !bytes.Equal(mem[:64<<10], mem[64<<10:]) {
		t.Fatal("read differs from what was written")
	}
}

// shmFile is a file of n bytes, all allocated, on a tmpfs; nil without one.
func shmFile(t testing.TB, n int) *OSFile {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "blockdev")
	if err != nil {
		return nil
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenDisk(path, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
