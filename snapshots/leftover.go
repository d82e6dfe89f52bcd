package snapshots

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

// If a daemon is killed, a storage file with a name outlives it, and so does the
// copied data of the disks. And a file that was there before still misses the space
// that it lent. So each such file is on record in the snapshot's state directory, and
// the next daemon puts it right.

// record is a file that was made for a snapshot, or one that lent its space.
type record struct {
	Path string   `json:"path"` // where it was
	File identity `json:"file"`
	// Dir is the directory in which a file was made under its name.
	Dir *identity `json:"dir,omitempty"`
	// Space is what was allocated for a file that was there, in bytes.
	Space int64 `json:"space,omitempty"`
}

const recordName = "storage"

// remember puts a storage on record if something has to be done to it when the daemon
// is killed. where is a path by which the next daemon finds it.
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

// ClearLeftover removes what a snapshot of a dead daemon left: its directory dir below
// Config.StateDir, and before that its storage files with all that was copied there.
// It does not touch block devices, because somebody else may use them by now. The
// memory goes first, because storage may not answer.
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

// clear does what storage.wipe would have done.
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
