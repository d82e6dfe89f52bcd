package snapshots

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// record is what the next daemon has to know of a snapshot. It is written whole
// before whatever it speaks of begins, and after whatever has come to an end.
type record struct {
	ID         uuid.UUID       `json:"id"`
	Chunk      int64           `json:"chunk"`   // bytes
	Pool       int64           `json:"pool"`    // bytes, as it was asked for
	Portion    int64           `json:"portion"` // bytes
	Created    time.Time       `json:"created"`
	Pending    bool            `json:"pending,omitempty"`
	Destroying bool            `json:"destroying,omitempty"`
	Encrypted  bool            `json:"encrypted,omitempty"` // what is stored; the key is in a file of its own
	Devices    []recordDevice  `json:"devices"`             // in the order of Add
	Storage    []recordStorage `json:"storage"`             // in the order of Append, failed ones too
	Note       json.RawMessage `json:"note,omitempty"`
}

// recordDevice is a device and its image.
type recordDevice struct {
	Device
	Size  int64 `json:"size"` // bytes
	Image Image `json:"image"`
}

// Device is an original disk of a snapshot.
type Device struct {
	Name   string `json:"name"` // of its filter
	Path   string `json:"path,omitempty"`
	Number uint64 `json:"number"` // as unix.Mkdev makes it
	Block  int    `json:"block"`  // its logical block, bytes
}

// Image is the ublk device that shows an image.
type Image struct {
	Number int32  `json:"number"` // of the ublk device, NoImage if there is none
	Tag    uint64 `json:"tag,omitempty"`
	Link   string `json:"link,omitempty"`
}

// NoImage is the number of an image that has no ublk device.
const NoImage = -1

// recordStorage is a storage, whose place in the record is the one in the order of
// Append and the number of its mount point: see pins.
//
//	MAKING ──> USED ──> LEAVING ──> GONE
//	   └──────────────────^
type recordStorage struct {
	Stage     string          `json:"stage"`
	Path      string          `json:"path"`     // as it was given
	RealPath  string          `json:"realPath"` // see StorageConfig
	Limit     int64           `json:"limit,omitempty"`
	Reserve   int             `json:"reserve,omitempty"` // percent
	Overwrite bool            `json:"overwrite,omitempty"`
	Note      json.RawMessage `json:"note,omitempty"`

	// Of a file: the directory in which it was made, under the name Hidden, and the
	// name that it got, if any. Only then is it known who it is.
	Dir    *identity `json:"dir,omitempty"`
	Hidden string    `json:"hidden,omitempty"`
	Base   string    `json:"base,omitempty"`
	File   *identity `json:"file,omitempty"`
	// Of a file that was there: who it is, and what was allocated for it, in bytes.
	Lender *identity `json:"lender,omitempty"`
	Space  int64     `json:"space,omitempty"`
	// Mount is the mount point of a file's filesystem, and its type.
	Mount  string `json:"mount,omitempty"`
	FSType string `json:"fstype,omitempty"`
	// Of a block device. Start is where what is stored begins, in bytes. Known is what it
	// is known by in another boot, nil if it is not, and Nonce is in its header then.
	Device *deviceIdentity `json:"device,omitempty"`
	Start  int64           `json:"start,omitempty"`
	Known  disk.Identity   `json:"known,omitempty"`
	Nonce  string          `json:"nonce,omitempty"`

	Size  int64 `json:"size,omitempty"` // most that is used, in bytes; 0: what the filesystem gives
	Fixed bool  `json:"fixed,omitempty"`
}

// The stages of a recordStorage.
const (
	storageMaking  = "making"
	storageUsed    = "used"
	storageLeaving = "leaving"
	storageGone    = "gone"
)

const (
	recordName  = "record.json"
	freshRecord = recordName + ".new" // while it is written
	recordKind  = "snapshot"
	// recordVersion is as which one with a note is written, which may say that the snapshot
	// ends some time, or with a reserve. One that is encrypted has version 2 at least: 1
	// would not decrypt it.
	recordVersion = 3
)

// version is as which one the record is written: the first that knows what it says.
func (r *record) version() int {
	switch {
	case r.Note != nil, slices.ContainsFunc(r.Storage, func(s recordStorage) bool { return s.Reserve != 0 }):
		return recordVersion
	case r.Encrypted:
		return 2
	}
	return 1
}

// update changes the record. On an error it is what it was.
func (s *state) update(change func(*record)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.rec
	next.Devices = slices.Clone(s.rec.Devices)
	next.Storage = slices.Clone(s.rec.Storage)
	change(&next)
	if err := statefile.Write(filepath.Join(s.dir, recordName), recordKind, next.version(), next); err != nil {
		return err
	}
	s.rec = next
	return nil
}

// recorded is the record as it is now, to be looked at.
func (s *state) recorded() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

// readRecord reads the record of the snapshot id in dir, whatever its stage.
func readRecord(dir string, id uuid.UUID) (r record, err error) {
	path := filepath.Join(dir, recordName)
	if err := statefile.Load(path, recordKind, recordVersion, &r); err != nil {
		return record{}, err
	}
	if r.ID != id {
		return record{}, damaged(path, "it is of the snapshot "+r.ID.String())
	}
	return r, r.check(path)
}

func damaged(path, what string) error {
	return fmt.Errorf("%s: %w: %s: nothing of it is used", path, statefile.ErrDamaged, what)
}

// check says whether the record is one that this program makes.
func (r *record) check(path string) error {
	if err := diffarea.CheckChunkSize(r.Chunk); err != nil || r.Pool < 0 {
		return damaged(path, fmt.Sprintf("chunks of %d bytes in a pool of %d", r.Chunk, r.Pool))
	}
	for _, d := range r.Devices {
		if d.Size <= 0 || d.Block <= 0 {
			return damaged(path, fmt.Sprintf("device %s has %d bytes in blocks of %d", d.Name, d.Size, d.Block))
		}
	}
	for i, st := range r.Storage {
		switch st.Stage {
		case storageMaking, storageLeaving, storageGone:
		case storageUsed:
			if (st.File == nil) == (st.Device == nil) || st.Size < 0 || st.Fixed != (st.Device != nil) {
				return damaged(path, fmt.Sprintf("storage %d is neither a file nor a device", i))
			}
		default:
			return damaged(path, fmt.Sprintf("storage %d is %q", i, st.Stage))
		}
	}
	return nil
}
