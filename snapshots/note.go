package snapshots

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// A loss of power ends a snapshot: all that tells of it is in memory. But what it
// stored may still be there. A file without a name goes by itself. A file that was made
// under a name keeps it, a block device keeps what it holds, and a file that lent its
// space does not have it. So a note of each storage is on stable storage before
// anything is stored there, and until all of it is given back:
//
//	note: hidden name ──> file ──> note: handle ──> its name ──> Append ──> stored to
//	note: disk ──> header on the device ──> Append ──> stored to
//	given back, durably ──> no note
//
// The first daemon of another boot clears what a note names: see Lost. A copy of the
// machine has the note too, and may reach the storage, where the first one still has its
// snapshot. So only the machine that wrote a note clears what it names.

// noteContent is what a note says.
type noteContent struct {
	ID        uuid.UUID     `json:"id"`
	Created   time.Time     `json:"created"`
	Machine   string        `json:"machine,omitempty"` // see disk.Host.MachineID
	Boot      string        `json:"boot"`
	Encrypted bool          `json:"encrypted,omitempty"`
	Devices   []Device      `json:"devices"`
	Storage   []noteStorage `json:"storage"`
}

// noteStorage is a storage as a note knows it.
type noteStorage struct{ recordStorage }

const (
	noteKind    = "lost-snapshot"
	noteVersion = 1
)

// keepNote puts the snapshot's note on stable storage, and says whether it is there.
func (s *state) keepNote() bool {
	if s.keep == nil {
		return false
	}
	boot, err := disk.BootID()
	if err != nil {
		return false
	}
	r := s.recorded()
	n := noteContent{ID: r.ID, Created: r.Created, Boot: boot, Encrypted: r.Encrypted}
	if s.machine != nil {
		n.Machine = s.machine()
	}
	for _, d := range r.Devices {
		n.Devices = append(n.Devices, d.Device)
	}
	for _, st := range r.Storage {
		if st.Stage == storageGone {
			continue
		}
		ns := noteStorage{recordStorage: st}
		ns.Reserve = 0 // nothing will grow any more
		ns.RealPath = filepath.Join("/", strings.TrimPrefix(st.RealPath, filepath.Join("/", s.pins.root)))
		n.Storage = append(n.Storage, ns)
	}
	text, err := statefile.Encode(noteKind, noteVersion, n)
	return err == nil && s.keep(r.ID, text) == nil
}

// dropNote removes the snapshot's note: nothing is left that it names.
func (s *state) dropNote() {
	if id, err := uuid.Parse(filepath.Base(s.dir)); err == nil && s.keep != nil {
		_ = s.keep(id, nil)
	}
}

// mountsSeen are the lines of the mounts of the namespace that everybody sees, whose
// root directory is root.
func mountsSeen(root string) (lines [][]string) {
	proc := "/proc/self"
	if root != "" && root != "/" {
		proc = filepath.Dir(root)
	}
	text, _ := os.ReadFile(filepath.Join(proc, "mountinfo"))
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 8 {
			lines = append(lines, f)
		}
	}
	return lines
}

// typeOf is a mount's filesystem, of a line of mountinfo.
func typeOf(line []string) string {
	for i, f := range line[:len(line)-1] {
		if f == "-" {
			return line[i+1]
		}
	}
	return ""
}

// mountOn says by which mount an open file was reached.
func mountOn(root string, fd int) (point, fstype string) {
	id := strconv.FormatUint(mountOf(fd), 10)
	for _, line := range mountsSeen(root) {
		if line[0] == id {
			return line[4], typeOf(line)
		}
	}
	return "", ""
}

// mounted says whether that filesystem seems to be mounted there.
func mounted(root, point, fstype string) bool {
	for _, line := range mountsSeen(root) {
		if line[4] == point && typeOf(line) == fstype {
			return true
		}
	}
	return false
}

// syncDir makes the names in a directory durable. Not every filesystem can.
func syncDir(dir *os.File) {
	if dir == nil {
		return
	}
	if fd, err := reopen(dir, unix.O_RDONLY|unix.O_DIRECTORY); err == nil {
		_ = unix.Fsync(fd)
		unix.Close(fd)
	}
}

// A device has a header, in front of what is stored, by which it is known that it still
// is ours. Whoever puts something else there overwrites it.
const headerSize = 4 << 10

// header is that of a device.
func header(id uuid.UUID, nonce string) []byte {
	b := make([]byte, headerSize)
	copy(b, fmt.Sprintf("ublk-blksnap difference storage\nsnapshot %s\n%s\n", id, nonce))
	return b
}

// writeHeader writes the header of a device, durably.
func writeHeader(f *blockdev.OSFile, id uuid.UUID, nonce string) error {
	page, err := unix.Mmap(-1, 0, headerSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	copy(page, header(id, nonce))
	if _, err := unix.Pwrite(f.Fd(), page, 0); err != nil {
		return err
	}
	return unix.Fsync(f.Fd())
}

// noteDevice puts a device on record that can be known again after a loss of power.
func (s *storage) noteDevice(known disk.Identity) error {
	if known == nil || s.state.keep == nil {
		return nil // nobody would look for the header
	}
	nonce := uuid.NewString()
	if err := s.update(func(r *recordStorage) { r.Known, r.Nonce = known, nonce }); err != nil {
		return err
	}
	// If the note fails, a later one of the snapshot has this device too. So the header is
	// written in any case.
	s.state.keepNote()
	deathpoint.Point()
	err := writeHeader(s.file, s.state.recorded().ID, nonce)
	deathpoint.Point()
	return err
}
