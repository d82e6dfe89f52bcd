package snapshots

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestRoomWithoutEnd: a filesystem that says that it has no end has room.
func TestRoomWithoutEnd(t *testing.T) {
	for _, c := range []struct {
		blocks      uint64
		unit, bytes int64
	}{{0, 4096, 0}, {7, 4096, 28 << 10}, {1 << 51, 4096, noEnd}, {1<<63 - 1, 1, noEnd}, {1<<63 - 1, 1 << 20, noEnd}, {1<<64 - 5, 4096, 0}} {
		if n := bytesOf(c.blocks, c.unit); n != c.bytes {
			t.Errorf("%d blocks of %d are %d bytes, want %d", c.blocks, c.unit, n, c.bytes)
		}
	}
}

// TestRoom: how far a file may grow, with a limit and without.
func TestRoom(t *testing.T) {
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	total := int64(fs.Blocks) * fs.Frsize
	free := int64(fs.Bavail) * fs.Frsize
	s := mustOpenStorage(t, dir, false)
	defer func() {
		if err := s.wipe(0); err != nil {
			t.Error(err)
		}
		if _, err := s.look(); err != nil {
			t.Errorf("a look at what is closed: %v", err)
		}
	}()
	const others = 64 << 20 // may come and go meanwhile
	near := func(what string, got, want int64) {
		t.Helper()
		if got < want-others || got > want+others {
			t.Errorf("%s: %d, want %d or so", what, got, want)
		}
	}
	near("spared", s.room.spare.Load(), min(total/20, 1<<30))
	near("room", s.room.now.Load(), max(free-min(total/20, 1<<30), 1))
	if e := s.engine(); !e.Spare || e.Room != s.room.now.Load() {
		t.Errorf("the log knows %+v", e)
	}
	s.size = 1 << 20
	if _, err := s.look(); err != nil || s.room.spare.Load() != 0 || s.engine().Spare {
		t.Errorf("with a limit %d bytes are spared, %v", s.room.spare.Load(), err)
	}
	s.reserve = 99
	err := s.checkRoom(4 << 10)
	near("spared", s.room.spare.Load(), total/100*99)
	if full := free < total/100*98; full != (err != nil) {
		t.Errorf("with %d of %d bytes free: %v", free, total, err)
	}
	// What is allocated already counts as room.
	if err := unix.Fallocate(s.file.Fd(), 0, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := s.look(); err != nil || s.room.now.Load() < 1<<20 {
		t.Errorf("room of %d bytes for a file of 1 MiB, %v", s.room.now.Load(), err)
	}
}
