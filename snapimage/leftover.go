package snapimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// A storage file with a name outlives a daemon that is killed, and with it the
// data of the disks that was copied. And a file that was there misses the space
// that it lent. So each is on record in the snapshot's state directory, for the
// next daemon to put right.

// record is a file that was made for a snapshot, or one that lent its space.
type record struct {
	Path string   `json:"path"` // where it was
	File identity `json:"file"`
	// Dir is the directory in which a file was made under its name.
	Dir *identity `json:"dir,omitempty"`
	// Space is what was allocated for a file that was there, in bytes.
	Space int64 `json:"space,omitempty"`
}

// identity is what a file is known by, whatever its names. Its handle finds it
// by no name at all, and tells it from a later file of the same number; on a
// filesystem that has none the time of its birth has to do that.
type identity struct {
	Dev    uint64 `json:"dev"`
	Ino    uint64 `json:"ino"`
	Born   int64  `json:"born,omitempty"` // nanoseconds since 1970
	Type   int32  `json:"type,omitempty"` // of the handle
	Handle []byte `json:"handle,omitempty"`
}

func identify(fd int) (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return identity{}, err
	}
	id := identity{Dev: st.Dev, Ino: st.Ino}
	var sx unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &sx) == nil && sx.Mask&unix.STATX_BTIME != 0 {
		id.Born = sx.Btime.Sec*1e9 + int64(sx.Btime.Nsec)
	}
	if h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH); err == nil {
		id.Type, id.Handle = h.Type(), h.Bytes()
	}
	return id, nil
}

// errGone: a file does not exist any more, under whatever name.
var errGone = errors.New("does not exist any more")

// open opens the file, which was at path. It fails with errGone, or with
// fs.ErrNotExist if the file is not found, wherever it may be.
func (id identity) open(path string, flags int) (fd int, err error) {
	// As a place only, at first: to open what another put there may have effects.
	const place = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	at, err := id.openHandle(path, place)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EPERM) { // a container may lack the capability
		at, err = unix.Open(path, place, 0)
	}
	if err != nil {
		return -1, err
	}
	f := os.NewFile(uintptr(at), path)
	defer f.Close()
	switch now, err := identify(at); {
	case err != nil:
		return -1, err
	case now.Dev != id.Dev || now.Ino != id.Ino || now.Born != id.Born:
		return -1, fmt.Errorf("another file is there: %w", fs.ErrNotExist)
	}
	return reopen(f, flags|unix.O_NONBLOCK)
}

func (id identity) openHandle(path string, flags int) (fd int, err error) {
	if id.Handle == nil {
		return -1, errors.ErrUnsupported
	}
	mount, err := openOn(id.Dev, path)
	if err != nil {
		return -1, err
	}
	defer unix.Close(mount)
	fd, err = unix.OpenByHandleAt(mount, unix.NewFileHandle(id.Type, id.Handle), flags)
	if errors.Is(err, unix.ESTALE) {
		err = errGone
	}
	return fd, err
}

// openOn opens something on the filesystem dev: path, if it is a directory, or the
// nearest one above it that is there.
func openOn(dev uint64, path string) (int, error) {
	for ; ; path = filepath.Dir(path) {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) == nil && st.Dev == dev {
				return fd, nil
			}
			unix.Close(fd)
		}
		if path == filepath.Dir(path) {
			return -1, fmt.Errorf("its filesystem is not mounted there any more: %w", fs.ErrNotExist)
		}
	}
}

const recordName = "storage"

// remember puts a storage on record that needs something done when the daemon is
// killed; where is a path of it for the next one.
func (s *state) remember(st *storage, where string) error {
	r := record{Path: where}
	fd := st.file.Fd()
	switch {
	case st.name != nil:
		dir, err := identify(int(st.name.Dir.Fd()))
		if err != nil {
			return err
		}
		r.Dir = &dir
	case st.lender != nil && st.lender.space > 0:
		fd, r.Space = st.lender.fd, st.lender.space
	default:
		return nil
	}
	var err error
	if r.File, err = identify(fd); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, recordName), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(f).Encode(r), f.Close())
}

// ClearLeftover removes what a snapshot of a dead daemon left: its directory
// dir below LiveConfig.StateDir, and before it its storage files with all that
// was copied there. Block devices are not touched: they may be in other use
// since. The memory goes first, for storage may not answer.
func ClearLeftover(dir string) error {
	(&state{dir: dir}).free()
	var errs []error
	f, err := os.Open(filepath.Join(dir, recordName))
	if err == nil {
		for d := json.NewDecoder(f); ; {
			var r record
			if d.Decode(&r) != nil {
				break
			}
			if err := r.clear(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", r.Path, err))
			}
		}
		f.Close()
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// clear does what discard would have done.
func (r record) clear() error {
	if r.Path == "" {
		return nil
	}
	fd, err := r.File.open(r.Path, unix.O_WRONLY)
	switch {
	case errors.Is(err, errGone), r.Dir == nil && errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil && r.Dir == nil:
		return err
	case err != nil:
		return fmt.Errorf("copied data may remain: %w", err)
	}
	defer unix.Close(fd)
	if r.Dir == nil {
		return allocate(fd, r.Space)
	}
	if err := unix.Ftruncate(fd, 0); err != nil {
		return fmt.Errorf("copied data may remain: %w", err)
	}
	at, err := r.Dir.open(filepath.Dir(r.Path), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("the file is empty, but its directory is not found: %w", err)
	}
	n := name{&disk.Place{Dir: os.NewFile(uintptr(at), filepath.Dir(r.Path)), Base: filepath.Base(r.Path)}}
	defer n.Close()
	return n.remove(fd)
}
