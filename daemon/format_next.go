//go:build nextformat

package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// A format to come, for the tests of an upgrade: it has the records of devices in a
// directory of another name.

const stateFormat = 5

const devicesName = "disks"

func init() {
	migrations[4] = func(dir RunDir) error {
		err := os.Rename(filepath.Join(dir.State(), "devices"), filepath.Join(dir.State(), devicesName))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // there are none, or they are there already
		}
		return err
	}
}
