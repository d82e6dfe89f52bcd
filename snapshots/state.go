package snapshots

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// state is a snapshot's directory of mapped files: what outlives the daemon.
//
//	log      the log's state
//	pool     its slots
//	words-N  the chunk words of device N
//
// It lies on a tmpfs. If the daemon touched a page for which the tmpfs has no room, it
// would be killed. So there has to be room for the whole of every file beforehand. The
// pool and small tables are allocated and mapped page by page, which spares the copies
// their page faults too. Mostly little of a large table is ever touched, so a large
// table is only counted against the size of the tmpfs.
type state struct {
	dir  string
	maps [][]byte
	pool *os.File
}

// newState makes the directory, which must not exist.
func newState(dir string) (*state, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return &state{dir: dir}, nil
}

// file makes a file of zeroes and maps it.
func (s *state) file(name string, size int64, allocate bool) (mem []byte, f *os.File, err error) {
	path := filepath.Join(s.dir, name)
	if err := CheckSpace(s.dir, size); err != nil {
		return nil, nil, err
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(path)
		}
	}()
	if err = f.Truncate(size); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	mem, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: map %d bytes: %w", path, size, err)
	}
	if allocate {
		if size >= largePage {
			// The kernel pins a transfer page by page, so a few large pages make copies
			// up to twice as fast. If the kernel gives none, only that is lost.
			_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
		}
		if err = unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
			_ = unix.Munmap(mem)
			return nil, nil, fmt.Errorf("%s: make room for %d bytes: %w", path, size, err)
		}
	}
	s.maps = append(s.maps, mem)
	return mem, f, nil
}

// memory is the Memory of a snapimage.Config.
func (s *state) memory(name string, size int64) ([]byte, error) {
	mem, f, err := s.file(name, size, size <= smallTable)
	if err != nil {
		return nil, err
	}
	return mem, f.Close()
}

// logConfig makes the memory of a log.
func (s *state) logConfig(chunk, pool int64) (diffarea.LogConfig, error) {
	head, f, err := s.file("log", diffarea.LogStateSize, true)
	if err != nil {
		return diffarea.LogConfig{}, err
	}
	if err := f.Close(); err != nil {
		return diffarea.LogConfig{}, err
	}
	mem, f, err := s.file("pool", max(pool/chunk, minPoolSlots)*chunk, true)
	if err != nil {
		return diffarea.LogConfig{}, err
	}
	s.pool = f
	return diffarea.LogConfig{
		ChunkSize: chunk,
		Pool:      diffarea.Pool{Mem: mem, File: blockdev.NewOSFile(int(f.Fd()), f.Name())},
		State:     head,
	}, nil
}

// smallTable is the size up to which a table is allocated: a million chunks.
const smallTable = 8 << 20

// largePage is the size of a large page, or of the smallest if there are more.
const largePage = 2 << 20

// minPoolSlots keeps copies and stores overlapping at the largest chunk sizes.
const minPoolSlots = 4

// free gives the memory back, all but the record of storage; nothing of the
// snapshot is in use any more.
func (s *state) free() {
	for _, m := range s.maps {
		unix.Munmap(m)
	}
	s.maps = nil
	if s.pool != nil {
		// Whoever still has the file open finds nothing in it.
		_ = s.pool.Truncate(0)
		s.pool.Close()
		s.pool = nil
	}
	files, _ := os.ReadDir(s.dir)
	for _, f := range files {
		if f.Name() != recordName {
			os.Remove(filepath.Join(s.dir, f.Name()))
		}
	}
}

// close gives the rest back too.
func (s *state) close() error {
	s.free()
	return os.RemoveAll(s.dir)
}
