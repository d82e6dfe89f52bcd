package cbtstate

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

// Disk is what a disk is like while it has no filter.
type Disk struct {
	Identity    disk.Identity       `json:"identity"`
	Size        int64               `json:"size"`              // bytes
	Machine     string              `json:"machine,omitempty"` // see disk.Host.MachineID
	Boot        string              `json:"boot"`              // of the kernel
	Writes      *disk.Writes        `json:"writes,omitempty"`
	Fingerprint []fingerprint.Place `json:"fingerprint"`
}

// Record is what is kept beside a change map.
type Record struct {
	ID      uuid.UUID `json:"id"`      // of this very save
	Name    string    `json:"name"`    // of the filter
	Path    string    `json:"path"`    // of the disk, for people
	Program string    `json:"program"` // its version, for people
	Saved   time.Time `json:"saved"`
	Disk
	MapSHA256 string `json:"map_sha256"`
}

// Refusal is why a disk's history is not believed.
type Refusal struct {
	Reason string // one of the constants
	Text   string // for people
	// Record is what was refused, if it could be read.
	Record *Record
}

func (r *Refusal) Error() string { return r.Text }

// The reasons of a Refusal.
const (
	NoState    = "no-state"      // nothing is kept of this disk
	Unclean    = "unclean"       // the last filter had no clean end
	Used       = "used"          // the state was used before
	OtherDisk  = "other-disk"    // what is kept under the name is of another disk
	OtherHost  = "other-machine" // what is kept is of another machine
	OtherSize  = "size"          // the disk has another size
	OtherBlock = "block-size"    // change tracking has another block size
	Written    = "written"       // the disk was written to
	Damaged    = "damaged"       // a file is not whole
	Version    = "version"       // a file is of another version of the program
	Untrusted  = "untrusted"     // somebody else can write to a file or the directory
	NoPlace    = "unavailable"   // the directory cannot be used now
	Unknown    = "unknown"       // the disk cannot be known again, or not be looked at
)

func refuse(reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Text: fmt.Sprintf(format, args...)}
}

// refuse is a Refusal of this record, which may be nil.
func (r *Record) refuse(reason, format string, args ...any) *Refusal {
	no := refuse(reason, format, args...)
	no.Record = r
	return no
}

// sameDisk says why a record is not of a disk that is now like this, whatever was written
// to it.
func (r *Record) sameDisk(now Disk) *Refusal {
	switch {
	case disk.OtherMachine(r.Machine, now.Machine):
		// A copy of a machine goes another way from then on, under the same numbers of takes.
		return r.refuse(OtherHost, "the state is of another machine, of which this one may be a copy")
	case !slices.Equal(r.Identity, now.Identity):
		return r.refuse(OtherDisk, "the state is of another disk: %s, and not %s", r.Identity, now.Identity)
	case r.Size != now.Size:
		return r.refuse(OtherSize, "the disk had %d bytes, and has %d", r.Size, now.Size)
	}
	return nil
}

// Judge says why a disk that is now like this is not believed to be as it was left;
// nil if it is believed.
func (r *Record) Judge(now Disk) *Refusal {
	if no := r.sameDisk(now); no != nil {
		return no
	}
	then := r.Writes
	switch {
	case r.Boot == now.Boot && (then == nil || now.Writes == nil):
		return r.refuse(Unknown, "the kernel has not counted the writes to the disk")
	case r.Boot == now.Boot && then.Attached == now.Writes.Attached:
		// The kernel has counted all the time.
	case now.Writes != nil && !now.Writes.Carried:
		then = &disk.Writes{} // it began anew in between
	default:
		then = now.Writes
	}
	if w := now.Writes; w != nil {
		ownThen, wholeThen := then.Sectors()
		switch own, whole := w.Sectors(); {
		case own != ownThen:
			return r.refuse(Written, "the disk was written to: the kernel has counted %d writes and %d discards since",
				w.Own[0]-then.Own[0], w.Own[2]-then.Own[2])
		case whole != wholeThen:
			return r.refuse(Written, "the disk of the partition was written to: the kernel has counted %d writes and %d discards since",
				w.WholeDisk[0]-then.WholeDisk[0], w.WholeDisk[2]-then.WholeDisk[2])
		}
	}
	if place := fingerprint.Difference(r.Fingerprint, now.Fingerprint); place != "" {
		return r.refuse(Written, "the disk was written to: its %s is another one", place)
	}
	return nil
}

// JudgeRunning says why a disk that had a filter when the power failed, and is now like
// this, is not believed to be as that filter left it; nil if it is believed. What the
// filter wrote last does not matter: the log has it. Whether the disk has been there
// since the machine was started nobody can tell, so the kernel's counters are of the
// time since it was plugged in.
func (r *Record) JudgeRunning(now Disk) *Refusal {
	no := r.sameDisk(now)
	switch {
	case no != nil:
		return no
	case r.Boot == now.Boot:
		return r.refuse(Unclean, "the last filter over the disk did not end cleanly, and the machine has not been started anew since")
	case now.Writes == nil:
		return r.refuse(Unknown, "the kernel has not counted the writes to the disk")
	case !now.Writes.None():
		return r.refuse(Written, "the disk was written to after the power failure, before it had a filter: the kernel has counted that")
	}
	if place := fingerprint.Difference(r.Fingerprint, now.Fingerprint); place != "" {
		return r.refuse(Written, "the disk was written to after the power failure, or its %s shortly before", place)
	}
	return nil
}

// key is the name under which the state of a disk is kept.
func key(id disk.Identity) string {
	sum := sha256.Sum256([]byte(strings.Join(id, "\n")))
	return hex.EncodeToString(sum[:16])
}

const (
	title   = "ublk-blksnap change map state "
	version = "1"
)

func (r *Record) encode() ([]byte, error) {
	body, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return nil, err
	}
	body = append(body, '\n')
	return append([]byte(firstLine(body)), body...), nil
}

func firstLine(body []byte) string {
	sum := sha256.New()
	sum.Write([]byte(version + "\n"))
	sum.Write(body)
	return title + version + " " + hex.EncodeToString(sum.Sum(nil)) + "\n"
}

// decode reads a record. The error is a *Refusal without a name.
func decode(b []byte) (*Record, *Refusal) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	rest, ours := strings.CutPrefix(string(line), title)
	v, _, _ := strings.Cut(rest, " ")
	switch {
	case !ours || !ok:
		return nil, refuse(Damaged, "is not a record of this program, or not whole")
	case v != version:
		return nil, refuse(Version, "is of version %q, this program knows version %s", v, version)
	case string(line)+"\n" != firstLine(body):
		return nil, refuse(Damaged, "has a wrong checksum")
	}
	r := &Record{}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields() // it means something
	if err := d.Decode(r); err != nil {
		return nil, refuse(Damaged, "cannot be read: %v", err)
	}
	return r, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
