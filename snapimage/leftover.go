package snapimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A storage file with a name outlives a daemon that is killed, and with it the
// data of the disks that was copied. So each is on record in the snapshot's
// state directory, for the next daemon to remove.

// record is a storage file: its name, and what tells it from another that has
// the name since.
type record struct {
	Path string `json:"path"`
	Dev  uint64 `json:"dev"`
	Ino  uint64 `json:"ino"`
}

const recordName = "storage"

// remember puts a storage file on record.
func (s *state) remember(st *storage) error {
	if !st.made {
		return nil
	}
	var at unix.Stat_t
	if err := unix.Fstat(st.file.Fd(), &at); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, recordName), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(json.NewEncoder(f).Encode(record{Path: st.path, Dev: at.Dev, Ino: at.Ino}), f.Close())
}

// ClearLeftover removes what a snapshot of a dead daemon left: its directory
// dir below LiveConfig.StateDir, and before it its storage files with all that
// was copied there. Block devices are not touched: they may be in other use
// since.
func ClearLeftover(dir string) error {
	var errs []error
	f, err := os.Open(filepath.Join(dir, recordName))
	if err == nil {
		for d := json.NewDecoder(f); ; {
			var r record
			if d.Decode(&r) != nil {
				break
			}
			errs = append(errs, r.wipe())
		}
		f.Close()
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// wipe empties and unlinks the file, if it is still that one.
func (r record) wipe() error {
	fd, err := unix.Open(r.Path, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("%s: may still hold copied data: %w", r.Path, err)
	}
	defer unix.Close(fd)
	var at unix.Stat_t
	if err := unix.Fstat(fd, &at); err != nil || at.Dev != r.Dev || at.Ino != r.Ino || at.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil //nolint:nilerr // another file by now
	}
	if err := errors.Join(unix.Ftruncate(fd, 0), os.Remove(r.Path)); err != nil {
		return fmt.Errorf("%s: may still hold copied data: %w", r.Path, err)
	}
	return nil
}
