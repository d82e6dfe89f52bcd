package snapshots

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// Left is a snapshot that a dead daemon left. One goroutine at a time uses it.
//
//	LeftBehind ──> Claim ──> Void ──> Again | Reopen ──> Snapshot
//	     └─────────────────────────────────────┴──> Clear
type Left struct {
	ID  uuid.UUID
	Dir string // of its state
	// Err says why its record cannot be trusted, with the file and the way out.
	// Then ID, Dir and, if they are known, Devices and Images are all there is, and
	// Clear is all that may be done.
	Err error

	Stage   Stage
	Pending bool // nobody has been told of it
	// Encrypted: what is stored is.
	Encrypted bool
	Created   time.Time
	Chunk     int64 // bytes
	Devices   []Device
	Images    []Image           // of each device
	Storage   []json.RawMessage // the notes of what it stores in
	Note      json.RawMessage
	Broken    unix.Errno // what broke it, 0 while whole

	rec     *record // nil if it is not to be trusted
	foreign bool    // the directory is not what a daemon made
	before  []cbtmap.Info
	take    []cbtmap.Info

	state   *state
	claimed []*storage // by place, from Claim on
	noClaim error      // why Claim has failed
	failed  *Snapshot  // that Again has begun and could not bring to its end
}

// LeftBehind are the snapshots that a dead daemon left in Config.StateDir. It
// changes nothing, and asks no disk anything.
func LeftBehind(stateDir string) ([]*Left, error) {
	entries, err := os.ReadDir(stateDir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("look for snapshots: %w", err)
	}
	var left []*Left
	for _, e := range entries {
		l := &Left{Dir: filepath.Join(stateDir, e.Name())}
		if l.Err = l.checkDir(e.Name()); l.Err != nil {
			l.foreign = true
		} else {
			l.read()
		}
		left = append(left, l)
	}
	return left, nil
}

func (l *Left) checkDir(base string) (err error) {
	if l.ID, err = uuid.Parse(base); err != nil || l.ID.String() != base {
		return fmt.Errorf("%s: %w: its name is none of a snapshot: remove it", l.Dir, statefile.ErrForeign)
	}
	var st unix.Stat_t
	if err := unix.Lstat(l.Dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", l.Dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s: %w: it is not a directory that only the daemon can write to: remove it", l.Dir, statefile.ErrForeign)
	}
	return nil
}

// read reads the record, the take and what broke the log.
func (l *Left) read() {
	r, err := readRecord(l.Dir, l.ID)
	if errors.Is(err, fs.ErrNotExist) && l.barelyMade() {
		l.Stage, l.rec = Destroying, &record{ID: l.ID}
		return
	}
	if err != nil {
		l.Err = err
		return
	}
	l.rec = &r
	l.Pending, l.Encrypted, l.Created, l.Chunk, l.Note = r.Pending, r.Encrypted, r.Created, r.Chunk, r.Note
	for _, d := range r.Devices {
		l.Devices = append(l.Devices, d.Device)
		l.Images = append(l.Images, d.Image)
	}
	for _, st := range r.Storage {
		if st.Stage == storageUsed {
			l.Storage = append(l.Storage, st.Note)
		}
	}
	var page, log []byte
	path := filepath.Join(l.Dir, takeName)
	if !r.Destroying {
		page, err = l.readFile(takeName, TakeSize(len(r.Devices)))
	}
	if err != nil {
		l.Err = err
		return
	}
	if page != nil { // a log that is not there is for Reopen to complain about
		log, _ = l.readFile(logName, diffarea.LogStateSize)
	}
	p, wrong := PastOf(r.Destroying, len(r.Devices), page, log)
	if wrong != "" {
		l.Err = damaged(path, wrong)
		return
	}
	l.Stage, l.before, l.take, l.Broken = p.Stage, p.Before, p.Take, p.Broken
}

// readFile reads a file of the directory, nil if it is not there.
func (l *Left) readFile(name string, size int64) ([]byte, error) {
	mem, err := readOwn(filepath.Join(l.Dir, name), size)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return mem, err
}

// barelyMade says whether the daemon died before it could write the first record.
func (l *Left) barelyMade() bool {
	entries, err := os.ReadDir(l.Dir)
	return err == nil && (len(entries) == 0 || len(entries) == 1 && entries[0].Name() == freshRecord)
}

// readOwn reads a file of ours, of that size.
func readOwn(path string, size int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := statefile.CheckOwn(f); err != nil {
		return nil, err
	}
	mem := make([]byte, size)
	if n, err := io.ReadFull(f, append(mem, 0)[:size+1]); int64(n) != size {
		return nil, damaged(path, fmt.Sprintf("it does not have %d bytes (%v)", size, err))
	}
	if _, err := f.ReadAt(mem, 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return mem, nil
}

// Before is what the change map of device i said before the take.
func (l *Left) Before(i int) cbtmap.Info { return l.before[i] }

// TakeInfo is what it said at the take, if the snapshot was taken.
func (l *Left) TakeInfo(i int) cbtmap.Info { return l.take[i] }

// Void makes good a take that had begun and was not made: see cbtmap.Map.Void. maps
// are those of the devices, in their order, nil for one that is gone. Then the
// snapshot is Created. If the daemon dies meanwhile, the next one does it again.
func (l *Left) Void(maps []*cbtmap.Map) error {
	if l.Stage != Taking || len(maps) != len(l.Devices) {
		return fmt.Errorf("void the take of snapshot %s: it is %v with %d devices, not %d", l.ID, l.Stage, len(l.Devices), len(maps))
	}
	for i, m := range maps {
		if m != nil {
			m.Void(l.before[i])
		}
	}
	if err := os.Remove(filepath.Join(l.Dir, takeName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("void the take of snapshot %s: %w", l.ID, err)
	}
	l.Stage = Created
	return nil
}
