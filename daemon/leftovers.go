package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// removeLeftovers removes what a dead daemon left: ublk devices without a disk, and
// links and notes of devices that are not there.
func (d *Daemon) removeLeftovers() {
	d.thawLeftover()
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	left, err := d.ctl.List(ctx)
	if err != nil {
		d.opts.Log.Warn("cannot look for devices of a dead daemon", "error", err)
		return
	}
	waiting := map[string]bool{} // the kernel's names of devices left alone
	for _, info := range left {
		if _, ours := ublk.IsOurs(info.Tag); !ours {
			continue
		}
		if now, err := d.ctl.SettledInfo(ctx, info.ID); err == nil {
			info = now
		}
		if info.State != ublk.Dead {
			// Somebody may have it mounted, so the daemon must not throw it away.
			waiting[fmt.Sprintf("ublkb%d", info.ID)] = true
			d.opts.Log.Warn("a device of another daemon is left alone", "device", fmt.Sprintf("/dev/ublkb%d", info.ID), "state", info.State.String(), "pid", info.PID)
			continue
		}
		if isOpen(fmt.Sprintf("/dev/ublkc%d", info.ID)) {
			waiting[fmt.Sprintf("ublkb%d", info.ID)] = true
			d.opts.Log.Info("a device that another daemon makes or removes is left alone", "device", info.ID)
			continue
		}
		if err := d.ctl.DeleteDevice(ctx, info.ID); err != nil {
			d.opts.Log.Warn("cannot remove the device of a dead daemon", "device", info.ID, "error", err)
		}
	}
	d.clearLinks(ctx)
	if len(waiting) == 0 {
		// The memory of devices and snapshots that nobody can take over.
		maps, _ := os.ReadDir(d.cbtDir())
		for _, e := range maps {
			_ = os.RemoveAll(filepath.Join(d.cbtDir(), e.Name()))
		}
		left, err := snapshots.LeftBehind(d.snapshotsDir())
		if err != nil {
			d.opts.Log.Warn("cannot look for snapshots of a dead daemon", "error", err)
		}
		for _, l := range left {
			d.clearSnapshot(ctx, l)
		}
	}
	notes, _ := os.ReadDir(d.opts.Dir.udev())
	for _, e := range notes {
		if !waiting[e.Name()] {
			d.forgetNote(e.Name())
		}
	}
}

// clearSnapshot removes a snapshot of a dead daemon. If its storage does not
// answer, the removal takes as long as that lasts, but clearSnapshot itself returns
// when ctx ends, because somebody waits for this daemon to start.
func (d *Daemon) clearSnapshot(ctx context.Context, l *snapshots.Left) {
	id := filepath.Base(l.Dir)
	say := func(err error) {
		if err != nil {
			d.opts.Log.Warn("a part of a dead daemon's snapshot cannot be removed", "snapshot", id, "error", publicPaths(err.Error()))
		}
	}
	err, late := bounded.Call(ctx, func() error {
		return l.Clear(snapshots.Config{Root: d.host.Root, StorageTimeout: d.opts.Config.StorageTimeout})
	}, say)
	if late != nil {
		d.opts.Log.Warn("the storage of a dead daemon's snapshot does not answer: it is given back when it does", "snapshot", id)
		return
	}
	say(err)
}

// thawLeftover thaws what a dead daemon had frozen.
func (d *Daemon) thawLeftover() {
	b, err := os.ReadFile(d.frozenFile())
	if err != nil {
		return
	}
	for _, point := range slices.Backward(strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")) {
		f, err := d.host.Open(point, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err == nil {
			err = snapshots.Thaw(f, d.opts.Config.FreezeTimeout)
			f.Close()
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			d.opts.Log.Warn("cannot thaw what a dead daemon froze", "filesystem", point, "error", err)
			continue
		}
		d.opts.Log.Warn("a filesystem that a dead daemon froze goes on", "filesystem", point)
	}
	_ = os.Remove(d.frozenFile())
}
