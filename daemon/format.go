package daemon

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// The state directory has a format as a whole: which files there are, and what they
// mean together. Its number is in the file "format". A program that meets a newer
// format touches nothing. An older one it brings to its own, a step for each number.
// What is inside of a file has a version of its own: see package statefile.
//
//	1  change maps (cbt/) and the files of snapshots, without records that tell of what
//	   they are: what is there can only be given back
//	2  records of devices and snapshots, from which the next daemon takes them over
//	3  devices may have a write-intent log, and snapshots a note, in the state_dir: a
//	   program that does not know of them would leave them there to be believed
//	4  snapshots may have names, under which udev knows their images, and an end of life: a
//	   program that does not know of it would keep them for ever

const (
	formatName = "format"
	formatKind = "state"
)

// format is the contents of the file. Its number is that of the statefile.
type format struct {
	Program string `json:"program"` // the version of the program that has written it
	// From is the format that the directory is being brought from. That is noted before
	// anything changes, so that no program of the older format takes what is half done
	// for its own.
	From int `json:"from,omitempty"`
}

// migrations bring the state directory from the format of their index to the next.
// A death may follow each step of one, and the next daemon begins it anew.
var migrations = [stateFormat]func(dir RunDir) error{
	1: func(RunDir) error {
		// Of format 1 there are leftovers only. They are cleared away as those of a
		// device or a snapshot that has no record.
		return nil
	},
	// Of format 2 no device has a log and no snapshot a note, and none needs one.
	2: func(RunDir) error { return nil },
	// Of format 3 no snapshot has a name or an end.
	3: func(RunDir) error { return nil },
}

// formatFound is the format of what is in the state directory, or from which it is being
// brought to that of this program; 0 if it is empty.
func (d RunDir) formatFound() (int, error) {
	path := filepath.Join(d.State(), formatName)
	text, found, err := statefile.Read(path, formatKind, stateFormat)
	var said format
	if err == nil {
		err = statefile.Unmarshal(path, text, &said)
	}
	switch {
	case err == nil && said.From > 0 && said.From < found:
		return said.From, nil
	case err == nil:
		return found, nil
	case errors.Is(err, fs.ErrNotExist):
		names, err := os.ReadDir(d.State())
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return 0, nil
		case err != nil || len(names) == 0:
			return 0, err
		}
		return 1, nil // which had no number yet
	case errors.Is(err, statefile.ErrNewer):
		return 0, &control.Error{Code: control.Unsupported, Message: "start the daemon: " + err.Error(),
			Fix: "or end it with its own \"daemon stop\" first"}
	}
	return 0, &control.Error{Code: control.Corrupted, Message: "start the daemon: " + err.Error(),
		Fix: "if nothing waits for a daemon, remove " + path + " and start again"}
}

// checkFormat says whether this program knows the format of the state directory. It changes
// nothing.
func (d RunDir) checkFormat() error {
	_, err := d.formatFound()
	return err
}

// migrate brings the state directory to the format of this program; needs the
// daemon's lock.
func (d RunDir) migrate() error {
	found, err := d.formatFound()
	if err != nil || found == stateFormat {
		return err
	}
	if err := d.subdir(stateName, 0o700); err != nil {
		return fail(err, "make the state directory")
	}
	for ; found > 0 && found < stateFormat; found++ {
		if err := d.writeFormat(found); err != nil {
			return err
		}
		deathpoint.Point()
		if err := migrations[found](d); err != nil {
			return fail(err, "bring the state from format %d to %d", found, found+1)
		}
		deathpoint.Point()
	}
	return d.writeFormat(0)
}

// writeFormat writes the number of this program's format; from is not 0 while the
// directory is being brought to it.
func (d RunDir) writeFormat(from int) error {
	if err := statefile.Write(filepath.Join(d.State(), formatName), formatKind, stateFormat, format{control.Version, from}); err != nil {
		return fail(err, "write the state's format")
	}
	return nil
}

// Takeover is what a program says of itself before it is given the devices of the
// daemon that runs.
type Takeover struct {
	Version string `json:"version"`
	Format  int    `json:"format"`
}

// CheckTakeover says whether this program, with its configuration, could take over
// from the daemon of the directory. It changes nothing.
func CheckTakeover(dir RunDir) (Takeover, error) {
	err := dir.checkFormat()
	if err == nil {
		err = dir.checkRecords()
	}
	return Takeover{control.Version, stateFormat}, err
}

// parseTakeover reads what a program has said of itself.
func parseTakeover(out string) (t Takeover, err error) {
	err = json.Unmarshal([]byte(out), &t)
	if err == nil && t.Format < 1 {
		err = errors.New("it names no format")
	}
	return t, err
}
