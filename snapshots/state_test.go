package snapshots

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestPoolIsPresent: no page of the pool is left to be made when a copy first
// touches it, where the tmpfs could have no room for it.
func TestPoolIsPresent(t *testing.T) {
	s := testState(t)    // on a tmpfs
	const size = 5 << 20 // of pages large and small
	c, err := s.logConfig(s.file, 64<<10, size)
	if err != nil {
		t.Fatal(err)
	}
	mem := c.Pool.Mem
	if len(mem) != size {
		t.Fatalf("pool of %d bytes, want %d", len(mem), size)
	}
	pages := make([]byte, size/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), size, uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	for i, p := range pages {
		if p&1 == 0 {
			t.Fatalf("page %d of %d is not there", i, len(pages))
		}
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
}
