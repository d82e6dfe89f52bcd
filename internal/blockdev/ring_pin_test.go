package blockdev

import (
	"bytes"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestRingEmptyBuffers(t *testing.T) {
	f := diskFile(t, t.TempDir(), 4096, 0)
	q := startQueue(t, RingConfig{Name: "test", Depth: 1, Files: []*OSFile{f}, Buffers: make([][]byte, 4)})
	// The place is there, and empty until a driver fills it.
	if e := onQueue(t, q, &Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Index: 3}}); e != unix.EFAULT {
		t.Fatalf("read into an empty place: %v, want EFAULT", e)
	}
}

// Memory that comes and goes: what was written from one pinned buffer is read
// into another, places are used again, and there is an end of them.
func TestRingPin(t *testing.T) {
	f := diskFile(t, t.TempDir(), 64<<10, 0)
	mem := mapped(t, 16<<10)
	own := mapped(t, 4096)
	q := startQueue(t, RingConfig{Name: "test", Depth: 4, Files: []*OSFile{f}, Buffers: [][]byte{own}, Pins: 5})
	pin := func(mem []byte) (index int32, err error) {
		call(t, q, func() { index, err = q.Pin(mem) })
		return index, err
	}
	for round := range 3 {
		a, err := pin(mem[:8<<10])
		if err != nil {
			t.Fatal(err)
		}
		b, err := pin(mem[8<<10:])
		if err != nil {
			t.Fatal(err)
		}
		if a == b || a == 0 || b == 0 {
			t.Fatalf("places %d and %d beside 0", a, b)
		}
		for i := range 8 << 10 {
			mem[i] = byte(i*7 + round)
		}
		buf := func(index int32, mem []byte) Buf {
			return Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: index}
		}
		if e := onQueue(t, q, &Op{Kind: Write, File: f, Off: 512, Len: 4096, Buf: buf(a, mem).At(512)}); e != 0 {
			t.Fatal(e)
		}
		if e := onQueue(t, q, &Op{Kind: Read, File: f, Off: 512, Len: 4096, Buf: buf(b, mem[8<<10:]).At(1024)}); e != 0 {
			t.Fatal(e)
		}
		if !bytes.Equal(mem[512:512+4096], mem[9<<10:13<<10]) {
			t.Fatal("read differs from what was written")
		}
		call(t, q, func() { q.Unpin(a) })
		if e := onQueue(t, q, &Op{Kind: Read, File: f, Len: 4096, Buf: Buf{Index: a}}); e != unix.EFAULT {
			t.Fatalf("read into a place given back: %v, want EFAULT", e)
		}
		call(t, q, func() { q.Unpin(b) })
	}
	// Operations that wait for a slot, or for the next turn, when their memory is
	// pinned no more, and another in its place, go on as without it.
	ops := make([]Op, 12)
	ended := make(chan unix.Errno, len(ops))
	call(t, q, func() {
		a, err := q.Pin(mem[:8<<10])
		if err != nil {
			t.Error(err)
			return
		}
		for i := range ops {
			b := Buf{Mem: unsafe.Pointer(unsafe.SliceData(mem)), Index: a}
			ops[i] = Op{Kind: Read, File: f, Off: 512, Len: 512, Buf: b.At(int64(i) * 512), Done: func(op *Op) { ended <- op.Err }}
			q.Submit(&ops[i])
		}
		q.Unpin(a)
		b, err := q.Pin(own)
		if err != nil || a != b {
			t.Errorf("pinned at %d after %d, %v", b, a, err)
		}
		q.Unpin(b)
	})
	for range ops {
		if e := <-ended; e != 0 {
			t.Fatalf("operation on memory that is pinned no more: %v", e)
		}
	}
	for range 5 {
		if _, err := pin(own); err != nil {
			t.Fatal(err)
		}
	}
	if index, err := pin(own); err == nil || index != NoIndex {
		t.Fatalf("one too many is at %d, %v", index, err)
	}
}
