package daemon

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// openLeft opens a file of the state that a dead daemon left, if it is this user's
// alone. Those that [statefile.Read] reads it checks itself.
func openLeft(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err == nil {
		if err = statefile.CheckOwn(f); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, err
}

// survivors says whether there is anything that a daemon has to serve: as long as one
// lives what it has, and after its death what waits for the next one. Of state in
// another format, whose program knows what it means, it is assumed.
func (d RunDir) survivors() bool {
	if found, err := d.formatFound(); err != nil || found != 0 && found != stateFormat {
		return true
	}
	for _, records := range []string{devicesName + "/*.json", "snapshots/*/record.json"} {
		if found, _ := filepath.Glob(filepath.Join(d.State(), records)); len(found) > 0 {
			return true
		}
	}
	return false
}
