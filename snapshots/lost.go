package snapshots

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// Lost is a snapshot that a loss of power, or a restart, has ended. One goroutine at a
// time uses it.
type Lost struct {
	ID        uuid.UUID
	Created   time.Time
	Encrypted bool
	Devices   []Device
	Storage   []LostStorage
	// Foreign: it was a snapshot of another machine, of which this one may be a copy.
	// Clear leaves its storage alone.
	Foreign bool

	note noteContent
}

// LostStorage is a storage of such a snapshot.
type LostStorage struct {
	Path string // as it was given
	// Done: nothing of the snapshot is there, or nothing that could be recognized.
	Done bool
	// Text says what was found, or why it is not done.
	Text string
}

// ReadNote reads a note; path names it in errors. machine is this one, as Config.MachineID
// tells. It returns nil for a note of this boot, whose snapshot is not lost.
func ReadNote(path string, text []byte, machine string) (*Lost, error) {
	body, _, err := statefile.Decode(path, text, noteKind, noteVersion)
	if err != nil {
		return nil, err
	}
	l := &Lost{}
	if err := statefile.Unmarshal(path, body, &l.note); err != nil {
		return nil, err
	}
	boot, err := disk.BootID()
	if err != nil {
		return nil, err
	}
	if l.note.Boot == boot {
		return nil, nil
	}
	l.Foreign = disk.OtherMachine(l.note.Machine, machine)
	l.ID, l.Created, l.Encrypted, l.Devices = l.note.ID, l.note.Created, l.note.Encrypted, l.note.Devices
	for _, st := range l.note.Storage {
		l.Storage = append(l.Storage, LostStorage{Path: st.Path})
	}
	return l, nil
}

// Machine is what a Lost is cleared on.
type Machine struct {
	Root string // as Config.Root
	// Find finds a disk, now at whatever path: nil if it is not there.
	Find func(disk.Identity) *disk.Disk
	// Probe says what a block device holds, empty for nothing.
	Probe func(*os.File) (string, error)
	// Started is when this boot of the machine began, by the clock that files have their
	// times from.
	Started time.Time
}

// errLater: the storage is not there, or somebody uses it; it may be cleared later.
var errLater = errors.New("data of the snapshot may remain there")

// errForeign: the storage may be in use there.
var errForeign = errors.New("it is of another machine, of which this one may be a copy: it is left as it is")

// Clear clears the storage: of a file that was made for the snapshot nothing stays,
// under whatever name it is found; one that lent its space has it back; a device is
// zeroed if it holds what a daemon put there and nothing else. It may be called again
// for what is not there yet, and may hang as long as storage does. It returns whether
// all is done.
func (l *Lost) Clear(m Machine) (done bool) {
	done = true
	for i := range l.Storage {
		st := &l.Storage[i]
		if st.Done {
			continue
		}
		text, err := l.clear(l.note.Storage[i], m)
		if st.Done = err == nil; err != nil {
			text, done = err.Error(), false
		}
		st.Text = text
	}
	return done
}

func (l *Lost) clear(r noteStorage, m Machine) (text string, err error) {
	if l.Foreign {
		return "", errForeign
	}
	if r.Dir != nil {
		return r.clearLostFile(m)
	}
	if r.Known != nil {
		return l.clearLostDevice(r, m)
	}
	return "nothing is known by which to find it: if it is a device, wipe it", nil
}

// nowOn is the identity as this boot has it: filesystems may have other numbers.
func (id *identity) nowOn(dev uint64) *identity {
	if id == nil {
		return nil
	}
	now := *id
	now.Dev = dev
	return &now
}

func (r noteStorage) clearLostFile(m Machine) (text string, err error) {
	if !mounted(m.Root, r.Mount, r.FSType) {
		return "", fmt.Errorf("its filesystem, %s, is not mounted on %s: %w", r.FSType, r.Mount, errLater)
	}
	r.RealPath = filepath.Join("/", m.Root, r.RealPath)
	dev, err := deviceAbove(r.RealPath)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	r.Dir, r.File, r.Lender = r.Dir.nowOn(dev), r.File.nowOn(dev), r.Lender.nowOn(dev)
	text = "nothing is left there"
	if r.File == nil { // it had been made, at most
		if err := r.clearHidden(); err != nil {
			return "", err
		}
	} else if text, err = r.emptyLost(text, m); err != nil {
		return "", err
	}
	if r.Lender != nil {
		if lender := r.openLender(); lender != nil {
			err = errors.Join(allocate(lender.fd, lender.space), unix.Fsync(lender.fd), unix.Close(lender.fd))
			if err != nil {
				return "", err
			}
		}
	}
	return text, nil
}

// emptyLost empties the file and takes its names, if it is found.
func (r noteStorage) emptyLost(gone string, m Machine) (text string, err error) {
	if r.File.Handle == nil && r.File.Born == 0 {
		return "it cannot be told whether the file there is the one that was made: look for yourself", nil
	}
	fd, err := r.File.open(r.RealPath, unix.O_RDWR)
	if errors.Is(err, errGone) || errors.Is(err, fs.ErrNotExist) {
		return gone, nil
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() {
		return "the file belongs to somebody else by now: it is left as it is", nil
	}
	if err := lock(fd); err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	if st.Size > 0 && time.Unix(st.Mtim.Unix()).After(m.Started) {
		return "somebody has written to the file since the machine was started: it is left as it is", nil
	}
	if err := errors.Join(unix.Ftruncate(fd, 0), unix.Fsync(fd)); err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	if err = r.removeNames(fd); errors.Is(err, errMoved) {
		return err.Error(), nil
	}
	return "it was emptied and removed", err
}

// deviceAbove is the number of the filesystem on which path is, or would be.
func deviceAbove(path string) (uint64, error) {
	for ; ; path = filepath.Dir(path) {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return st.Dev, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
}

func (l *Lost) clearLostDevice(r noteStorage, m Machine) (text string, err error) {
	d := m.Find(r.Known)
	if d == nil {
		return "", fmt.Errorf("the disk is not there: %w", errLater)
	}
	looked, err := os.OpenFile(d.Node, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	defer looked.Close()
	if text, err = l.othersOn(looked, r, m); text != "" || err != nil {
		return text, err
	}
	f, err := blockdev.OpenExclusive(d.Node, d.Node, unix.O_RDWR)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	defer f.Close()
	// Now that nobody else can claim it: is it the same, and as it was?
	if number(f.Fd()) != number(int(looked.Fd())) {
		return "", fmt.Errorf("%s has become another disk: %w", d.Node, errLater)
	}
	if text, err = l.othersOn(looked, r, m); text != "" || err != nil {
		return text, err
	}
	size, err := f.Size()
	if err != nil {
		return "", err
	}
	n := min(size, r.Size)
	if r.Size == 0 {
		n = size
	}
	if l.Encrypted {
		n = min(n, headSize) // the key is gone
	}
	if err := zeroDevice(f.Fd(), n); err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	return "it was zeroed", nil
}

// othersOn says why a device is not to be zeroed: empty if it holds what a daemon put
// there and nothing else.
func (l *Lost) othersOn(dev *os.File, r noteStorage, m Machine) (text string, err error) {
	head := make([]byte, headerSize)
	if _, err := dev.ReadAt(head, 0); err != nil {
		return "", fmt.Errorf("%w: %w", err, errLater)
	}
	if !bytes.Equal(head, header(l.ID, r.Nonce)) {
		return "nothing of the snapshot is there", nil
	}
	what, err := signature(dev)
	if err == nil && what == "" {
		what, err = m.Probe(dev)
	}
	if err != nil {
		return "", fmt.Errorf("cannot tell what it holds: %w: %w", err, errLater)
	}
	if what != "" {
		return "it seems to hold " + what + " by now: it is left as it is", nil
	}
	return "", nil
}

// number is that of an open device, 0 if it cannot be had.
func number(fd int) uint64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Rdev
}
