package snapshots

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// state is a snapshot's directory: what outlives the daemon.
//
//	record.json  what the snapshot is: record
//	log          the log's state
//	pool         its slots
//	words-N      the chunk words of device N
//	take         the take: TakePage
//	key          the key of what is stored, if that is encrypted
//	storage-N    where storage N is kept: pins
//
// It lies on a tmpfs. If the daemon touched a page for which the tmpfs has no room, it
// would be killed. So there has to be room for the whole of every file beforehand. The
// pool and small tables are allocated and mapped page by page, which spares the copies
// their page faults too. Mostly little of a large table is ever touched, so a large
// table is only counted against the size of the tmpfs.
type state struct {
	dir  string
	pins pins
	maps [][]byte
	pool *os.File
	page TakePage // of a take that was tried

	keep    func(uuid.UUID, []byte) error // see Config.Keep
	machine func() string                 // see Config.MachineID
	cipher  *regionCipher                 // of what is stored, nil if that is not encrypted

	mu  sync.Mutex
	rec record // as it is on record
}

// newState makes the directory, which must not exist, with the first record. root
// is Config.Root.
func newState(dir, root string, r record) (*state, error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	deathpoint.Point()
	s, err := openState(dir, root)
	if err == nil {
		err = s.update(func(rec *record) { *rec = r })
	}
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return s, nil
}

// openState takes over the directory, which is there.
func openState(dir, root string) (*state, error) {
	dir, err := filepath.Abs(dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return nil, err
	}
	return &state{dir: dir, pins: pins{dir: dir, root: root}}, nil
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
	if mem, err = s.mmap(f, size, allocate); err != nil {
		return nil, nil, err
	}
	deathpoint.Point()
	return mem, f, nil
}

// mmap maps a file, with all of its pages if they are to be allocated.
func (s *state) mmap(f *os.File, size int64, allocate bool) ([]byte, error) {
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("%s: map %d bytes: %w", f.Name(), size, err)
	}
	if allocate {
		if size >= largePage {
			// The kernel pins a transfer page by page, so a few large pages make copies
			// up to twice as fast. If the kernel gives none, only that is lost.
			_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
		}
		if err = unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
			_ = unix.Munmap(mem)
			return nil, fmt.Errorf("%s: make room for %d bytes: %w", f.Name(), size, err)
		}
	}
	s.maps = append(s.maps, mem)
	return mem, nil
}

// reopen maps a file that a dead daemon left.
func (s *state) reopen(name string, size int64, allocate bool) (mem []byte, f *os.File, err error) {
	path := filepath.Join(s.dir, name)
	f, err = os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err = statefile.CheckOwn(f); err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if st.Size() != size {
		return nil, nil, damaged(path, fmt.Sprintf("it has %d bytes, not %d", st.Size(), size))
	}
	mem, err = s.mmap(f, size, allocate)
	return mem, f, err
}

// memory is the Memory of a snapimage.Config.
func (s *state) memory(name string, size int64) ([]byte, error) {
	mem, f, err := s.file(name, size, size <= smallTable)
	if err != nil {
		return nil, err
	}
	return mem, f.Close()
}

// opener is state.file or state.reopen.
type opener func(name string, size int64, allocate bool) ([]byte, *os.File, error)

// logConfig makes the memory of a log, or finds it again.
func (s *state) logConfig(open opener, chunk, pool int64) (diffarea.LogConfig, error) {
	head, f, err := open(logName, diffarea.LogStateSize, true)
	if err != nil {
		return diffarea.LogConfig{}, err
	}
	if err := f.Close(); err != nil {
		return diffarea.LogConfig{}, err
	}
	mem, f, err := open("pool", max(pool/chunk, minPoolSlots)*chunk, true)
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

const logName = "log"

func wordsName(device int) string { return fmt.Sprintf("words-%d", device) }

// newTake makes the record of a take that is about to be tried.
func (s *state) newTake(before []cbtmap.Info) error {
	fresh := takeName + ".new"
	os.Remove(filepath.Join(s.dir, fresh))
	mem, f, err := s.file(fresh, TakeSize(len(before)), true)
	if err != nil {
		return err
	}
	f.Close()
	s.page = TakePage{mem}
	s.page.Format(before)
	deathpoint.Point()
	err = os.Rename(filepath.Join(s.dir, fresh), filepath.Join(s.dir, takeName))
	deathpoint.Point()
	return err
}

// endTake takes a take that was not made off the record.
func (s *state) endTake() error {
	s.unmap(s.page.mem)
	s.page = TakePage{}
	err := os.Remove(filepath.Join(s.dir, takeName))
	deathpoint.Point()
	return err
}

func (s *state) unmap(mem []byte) {
	s.maps = slices.DeleteFunc(s.maps, func(m []byte) bool { return unsafe.SliceData(m) == unsafe.SliceData(mem) })
	unix.Munmap(mem)
}

// smallTable is the size up to which a table is allocated: a million chunks.
const smallTable = 8 << 20

// largePage is the size of a large page, or of the smallest if there are more.
const largePage = 2 << 20

// minPoolSlots keeps copies and stores overlapping at the largest chunk sizes.
const minPoolSlots = 4

// release lets go of the memory, which stays for the next one to open it.
func (s *state) release() {
	s.forgetCipher()
	for _, m := range s.maps {
		unix.Munmap(m)
	}
	s.maps, s.page = nil, TakePage{}
	if s.pool != nil {
		s.pool.Close()
		s.pool = nil
	}
}

// free gives the memory back. What tells of the storage stays: the record, the log's
// state, and the mount points. Nothing of the snapshot is in use any more.
func (s *state) free() {
	if s.pool != nil {
		// Whoever still has the file open finds nothing in it.
		_ = s.pool.Truncate(0)
	}
	s.release()
	s.removeAll(recordName, freshRecord, logName) // storage on its way back writes the record
}

// format gives the memory back, and what there is of a take: a snapshot that was
// not taken begins anew.
func (s *state) format() { s.removeAll(recordName) }

// removeAll removes the files of the directory except mount points and those named.
func (s *state) removeAll(but ...string) {
	files, _ := os.ReadDir(s.dir)
	for _, f := range files {
		if !slices.Contains(but, f.Name()) && !strings.HasPrefix(f.Name(), pinPrefix) {
			if path := filepath.Join(s.dir, f.Name()); f.Name() == keyName {
				removeKey(path)
			} else {
				os.Remove(path)
			}
			deathpoint.Point()
		}
	}
}

// close gives the rest back too, but nothing that is still pinned.
func (s *state) close() error {
	s.free()
	if len(s.pins.all()) > 0 {
		return nil
	}
	os.Remove(filepath.Join(s.dir, logName))
	deathpoint.Point()
	return os.RemoveAll(s.dir)
}
