package snapshots

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
)

// A file that has no limit leaves the filesystem that it lies on some room, so that a
// snapshot that is forgotten fills nobody's disk: so many percent of it, and no more than
// so many bytes.
const (
	spareEach = 20
	spareMost = 1 << 30
	noEnd     = 1 << 62 // bytes
)

// room is how far the file of a storage can grow. The filesystem is looked at now and
// then, because others use it too.
type room struct {
	now   atomic.Int64 // diffarea.Storage.Room
	spare atomic.Int64 // bytes of the filesystem that stay free

	mu     sync.Mutex // held while the filesystem is asked, however long that takes
	closed bool       // the file is
}

// look asks the filesystem. free is what it has for whoever asks next.
func (s *storage) look() (free int64, err error) {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	if s.fixed || s.room.closed {
		return 0, nil
	}
	var fs unix.Statfs_t
	var st unix.Stat_t
	fd := s.file.Fd()
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return 0, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	unit := fs.Frsize
	if unit == 0 {
		unit = fs.Bsize
	}
	if fs.Blocks == 0 { // a tmpfs without a limit
		return 0, nil
	}
	spare := int64(0)
	switch {
	case s.reserve > 0:
		spare = bytesOf(fs.Blocks, unit) / 100 * int64(s.reserve)
	case s.size == 0:
		spare = min(bytesOf(fs.Blocks, unit)/spareEach, spareMost)
	}
	free = bytesOf(fs.Bavail, unit)
	if spare == 0 {
		free = bytesOf(fs.Bfree, unit) // the superuser may use the last blocks too
	}
	s.room.spare.Store(spare)
	s.room.now.Store(max(st.Blocks*512+max(free-spare, 0), 1))
	return free, nil
}

// bytesOf is how many bytes so many blocks have. Some filesystems of the network say that
// they have no end, and some that less than nothing is left.
func bytesOf(blocks uint64, unit int64) int64 {
	if int64(blocks) < 0 {
		return 0
	}
	hi, lo := bits.Mul64(blocks, uint64(unit))
	if hi != 0 {
		return noEnd
	}
	return int64(min(lo, noEnd))
}

// spares says whether the storage leaves its filesystem some room.
func (s *storage) spares() bool { return !s.fixed && (s.size == 0 || s.reserve > 0) }

// checkRoom refuses a storage that would have to fill its filesystem at once.
func (s *storage) checkRoom(chunk int64) error {
	free, err := s.look()
	if now := s.room.now.Load(); err == nil && s.spares() && now != 0 && now < chunk {
		return fmt.Errorf("%w: %d MiB of the filesystem are free, and %d MiB stay free for others: choose another place, or give a limit (--limit) up to which it may be filled",
			unix.ENOSPC, free>>20, s.room.spare.Load()>>20)
	}
	return err
}

// closeFile closes the file, once nobody looks at its filesystem any more.
func (s *storage) closeFile() error {
	s.room.mu.Lock()
	defer s.room.mu.Unlock()
	s.room.closed = true
	return s.file.Close()
}

// engine is the storage as the log knows it.
func (s *storage) engine() diffarea.Storage {
	return diffarea.Storage{File: s.file, Size: s.size, Start: s.start, Fixed: s.fixed, Index: s.n, Room: s.room.now.Load(), Spare: s.spares()}
}

// use has the storage belong to the snapshot; needs the owner's turn.
func (s *Snapshot) use(storage []*storage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.storage = storage
}

// storages may be called beside any other method.
func (s *Snapshot) storages() []*storage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.storage[:len(s.storage):len(s.storage)]
}

// LookAtRoom asks the filesystems of the storages how far these can grow. That takes as
// long as they do not answer. It may be called beside any other method.
func (s *Snapshot) LookAtRoom() {
	for _, st := range s.storages() {
		used := s.log.Reach(st.file)
		if used < 0 || st.fixed {
			continue
		}
		if _, err := st.look(); err != nil {
			continue
		}
		now := st.room.now.Load()
		s.post(func() { s.engine.SetRoom(st.file, used, now) })
	}
}

// Space is how far a storage can grow.
type Space struct {
	Path string // as it was given
	// Most is how many bytes it will take at most, as its filesystem is now; 0: nobody
	// knows.
	Most int64
	// Spare is how many bytes of its filesystem stay free.
	Spare int64
}

// Spaces are those of the storages, in the order of Append. It waits for nobody and may be
// called beside any other method.
func (s *Snapshot) Spaces() []Space {
	var out []Space
	for _, st := range s.storages() {
		most := st.room.now.Load()
		if st.size != 0 && (most == 0 || st.size < most) {
			most = st.size
		}
		out = append(out, Space{Path: st.path, Most: most, Spare: st.room.spare.Load()})
	}
	return out
}
