package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// The state directory is looked for by its path each time, because its filesystem may be
// mounted and unmounted at any time, and may come to lie on a disk with a filter. All that
// is done there may hang.

// openState opens the state directory, if it may be used now: not while a filesystem
// is missing that hides it, nor on a disk with a filter. dev is a device of which the
// tables may not know yet, or nil. The error is a *cbtstate.Refusal.
func (d *Daemon) openState(dev *device, create bool) (*cbtstate.Store, error) {
	others := d.sortedDevices()
	if dev != nil {
		others = append(others, dev)
	}
	if err := d.checkLiesOn(d.opts.Config.StateDir, others, create); err != nil {
		return nil, err
	}
	return d.openDir(d.opts.Config.StateDir, create)
}

// openNotes opens the directory of the notes there.
func (d *Daemon) openNotes(create bool) (*cbtstate.Notes, error) {
	store, err := d.openState(nil, create)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	return cbtstate.OpenNotes(d.host.Root, notesDir(d.opts.Config.StateDir), create)
}

// openDir opens a state directory, wherever it lies, unless a filesystem is missing that
// hides it. What is attached may be the root filesystem, of which the daemon touches nothing.
func (d *Daemon) openDir(dir string, create bool) (*cbtstate.Store, error) {
	if point := d.missingMount(dir); point != "" {
		return nil, unavailable("the state directory %s is not there: %s is not mounted", dir, point)
	}
	if name := d.attachedWaits(); name != "" && d.opts.Dir.Resident() {
		return nil, unavailable("the state directory %s may lie on the volume of the filter %s, which waits", dir, name)
	}
	attached := slices.DeleteFunc(d.sortedDevices(), func(dev *device) bool { return dev.attached == nil })
	if err := d.checkLiesOn(dir, attached, create); err != nil {
		return nil, err
	}
	return cbtstate.Open(d.host.Root, dir, create)
}

// attachedWaits is a filter under a volume in use that this daemon has found, and does not serve
// yet; empty if there is none.
func (d *Daemon) attachedWaits() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range d.attachedFound {
		if d.devices[name] == nil && (d.takingOver || d.waiting[name] != nil) {
			return name
		}
	}
	return ""
}

// checkLiesOn refuses a state directory that lies on one of the disks, or will when it is
// made, and one that is not there if it is not to be made.
func (d *Daemon) checkLiesOn(dir string, disks []*device, create bool) error {
	if len(disks) == 0 {
		return nil
	}
	place, err := d.host.OpenPlace(dir)
	missing := err != nil || place.File == nil
	for at := dir; errors.Is(err, fs.ErrNotExist) && at != "/"; place, err = d.host.OpenPlace(at) {
		at = filepath.Dir(at)
	}
	if err != nil {
		return unavailable("%v", err)
	}
	defer place.Close()
	if missing && !create {
		return &cbtstate.Refusal{Reason: cbtstate.NoState, Text: "nothing was kept: there is no " + dir}
	}
	for _, dev := range disks {
		// A doubt is no reason: it is for storage, which takes all writes.
		if lies, _ := d.host.LiesOn(place, dev.disk.Num, d.lowerDisks); lies {
			return unavailable("the state directory %s lies on %s, which has a filter: choose another state_dir", dir, dev.disk.DisplayPath())
		}
	}
	return nil
}

func unavailable(format string, args ...any) error {
	return &cbtstate.Refusal{Reason: cbtstate.NoPlace, Text: fmt.Sprintf(format, args...)}
}

// nothingKept says whether an error means no more than that nothing is kept.
func nothingKept(err error) bool {
	var no *cbtstate.Refusal
	return errors.As(err, &no) && no.Reason == cbtstate.NoState
}

// ifKept does something with what has been opened, and closes it. If it is not there, nothing
// is kept, and there is nothing to be done.
func ifKept(opened interface{ Close() }, err error, do func() error) error {
	if nothingKept(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer opened.Close()
	return do()
}

// callState calls what uses the state directory, and waits for it until ctx ends.
func (d *Daemon) callState(ctx context.Context, do func() error) error {
	err, late := bounded.Call(ctx, do, func(error) {})
	if late != nil {
		return d.stateHangs()
	}
	return err
}

// stateHangs is the error of whoever has waited long enough for the state directory.
func (d *Daemon) stateHangs() error { return errors.New(d.opts.Config.StateDir + " does not answer") }

// missingMount is a mount point of fstab on the way to path where nothing is mounted.
func (d *Daemon) missingMount(path string) string {
	table, err := d.host.ReadFile("/etc/fstab")
	if err != nil {
		return ""
	}
	mounts, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		return ""
	}
	return notMounted(path, table, string(mounts))
}

// notMounted is missingMount of the texts of fstab and mountinfo.
func notMounted(path, fstab, mountinfo string) string {
	mounted := map[string]bool{}
	for _, line := range strings.Split(mountinfo, "\n") {
		if point, ok := disk.MountPoint(line); ok {
			mounted[point] = true
		}
	}
	for _, line := range strings.Split(fstab, "\n") {
		f := strings.Fields(line)
		if len(f) < 4 || strings.HasPrefix(f[0], "#") || !strings.HasPrefix(f[1], "/") {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(f[1])
		if len(point) > 1 {
			point = strings.TrimRight(point, "/")
		}
		if (path == point || strings.HasPrefix(path, strings.TrimRight(point, "/")+"/")) && !mounted[point] {
			return point
		}
	}
	return ""
}
