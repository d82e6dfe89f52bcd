package fingerprint

import (
	"bytes"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
)

// TestDirect: whatever is asked for comes as it is on the disk, in and across its
// blocks, and past the page cache nothing else.
func TestDirect(t *testing.T) {
	const size = 3*mib + 5*512
	rnd := rand.New(rand.NewSource(1))
	content := make([]byte, size)
	rnd.Read(content)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDirect(int(f.Fd()), 512)
	f.Close()
	if err != nil {
		t.Skipf("no direct I/O here: %v", err)
	}
	defer d.Close()
	read := func(off, n int64) {
		t.Helper()
		b := make([]byte, n)
		if got, err := d.ReadAt(b, off); err != nil || got != len(b) || !bytes.Equal(b, content[off:off+n]) {
			t.Errorf("%d bytes at %d: %d, %v", n, off, got, err)
		}
	}
	read(0, size)
	read(size-512, 512)
	read(size-mib, mib)
	for range 200 {
		off := rnd.Int63n(size)
		read(off, 1+rnd.Int63n(min(size-off, 2*mib)))
	}
	if n, err := d.ReadAt(make([]byte, 1024), size-512); err == nil || n != 512 {
		t.Errorf("across the end: %d, %v", n, err)
	}
}
