package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// The disks that the configuration names get their filters when the daemon starts: those
// that are there before it says that it is ready, the others as soon as they appear. So
// nothing waits here for a disk that is missing; what is to be mounted from it waits as
// long as its line in fstab says.

const (
	// bootInterval is how often the daemon looks for named disks that have no filter,
	// configInterval how often it looks whether others are named.
	bootInterval   = time.Second
	configInterval = 5 * time.Second
	// bootRetryLimit bounds the time between two tries to add a disk that is there, but
	// cannot be had. It doubles.
	bootRetryLimit = 30 * time.Second
	// bootLimit bounds the time in which the daemon's start adds the disks that are
	// there. Only disks that do not answer take long, each as long as disk_timeout.
	bootLimit = 2 * time.Minute
)

// bootDisk is a disk that the configuration names.
type bootDisk struct {
	BootDevice
	reason string        // why it has no filter
	next   time.Time     // when it is tried again
	pause  time.Duration // and how long after that
}

// bootDisks are all of them. Only the goroutine that adds them changes them, under
// Daemon.mu.
type bootDisks struct {
	disks []*bootDisk
	// read is the stamp of the files that they are from.
	read string
	// removed are the disks whose filters were removed on purpose: by their names, the
	// sequence numbers that they had. They get no filter by themselves until they are
	// plugged in anew, or the machine is started again. Under Daemon.opLock.
	removed map[string]uint64
}

const removedKind, removedFormat = "removed", 1

func (d *Daemon) removedFile() string { return filepath.Join(d.opts.Dir.State(), removedKind) }

// bootIsOff is the kernel's parameter by which an administrator has a machine without
// the filters. The rules of udev know it too.
const bootIsOff = "ublk_blksnap.boot=off"

// hasBootDisks says whether this daemon adds the disks that the configuration names. If
// there are several daemons, one of them must.
func (d *Daemon) hasBootDisks() bool {
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if slices.Contains(strings.Fields(string(cmdline)), bootIsOff) {
		return false
	}
	return d.opts.ConfigPath != "" && (d.opts.Dir == DefaultRunDir || d.opts.ConfigPath != DefaultConfigPath)
}

// startBoot adds the disks that are there, and goes on to look for the others until ctx
// ends.
func (d *Daemon) startBoot(ctx context.Context) {
	d.boot.removed = map[string]uint64{}
	if !d.hasBootDisks() {
		return
	}
	if err := d.readRemoved(); err != nil && !errors.Is(err, os.ErrNotExist) {
		d.opts.Log.Warn("disks whose filters were removed have them again", "error", err)
	}
	limited, cancel := context.WithTimeout(ctx, bootLimit)
	d.readBoot()
	if d.addBoot(limited) > 0 {
		d.awaitUdev(limited)
	}
	cancel()
	go func() {
		for {
			pause := configInterval
			if slices.ContainsFunc(d.boot.disks, func(b *bootDisk) bool { return d.deviceNamed(b.Name) == nil }) {
				pause = bootInterval
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			d.readBoot()
			d.addBoot(ctx)
		}
	}()
}

// readBoot reads which disks are named, if that has changed.
func (d *Daemon) readBoot() {
	file, err1 := d.host.Stamp(d.opts.ConfigPath)
	dir, err2 := d.host.Stamp(DropInDir(d.opts.ConfigPath))
	read := fmt.Sprintln(file, err1, dir, err2)
	if read == d.boot.read {
		return
	}
	d.boot.read = read
	all, err := readBootDevices(d.host, d.opts.ConfigPath)
	if err != nil {
		d.opts.Log.Error("cannot read which disks have filters at the boot: those known before count", "error", err)
		return
	}
	disks := make([]*bootDisk, len(all))
	for i, b := range all {
		disks[i] = &bootDisk{BootDevice: b}
		for _, old := range d.boot.disks {
			if old.BootDevice == b {
				disks[i] = old
			}
		}
	}
	d.mu.Lock()
	d.boot.disks = disks
	d.mu.Unlock()
}

// addBoot adds the disks that are there and have no filter, and says how many.
func (d *Daemon) addBoot(ctx context.Context) (added int) {
	for _, b := range d.boot.disks {
		if d.ending.begun.Load() {
			return added // nothing is missing
		}
		reason := b.reason
		if d.deviceNamed(b.Name) != nil || d.findWaiting(b.Name) != nil {
			reason = ""
		} else if bdev, err := d.host.Lookup(b.Path); err != nil {
			reason = "it is not there"
			if !errors.Is(err, disk.ErrNotFound) {
				reason = err.Error()
			}
			b.next, b.pause = time.Time{}, 0
		} else if time.Now().After(b.next) {
			var done bool
			if done, reason = d.addBootDisk(ctx, b, bdev); done {
				added++
				d.opts.progress.made()
			}
			b.pause = min(max(2*b.pause, bootInterval), bootRetryLimit)
			b.next = time.Now().Add(b.pause)
		}
		if reason != b.reason && reason != "" {
			d.opts.Log.Warn("a disk that the configuration names has no filter yet", "name", b.Name, "disk", b.Path, "reason", reason)
		}
		d.mu.Lock()
		b.reason = reason
		d.mu.Unlock()
	}
	return added
}

// addBootDisk puts the filter over a disk that is there, or says why not. There is no
// reason if it shall have none.
func (d *Daemon) addBootDisk(ctx context.Context, b *bootDisk, bdev *disk.Disk) (done bool, reason string) {
	end, err := d.beginNew(ctx, "add %s", b.Path)
	if err != nil {
		return false, err.Error()
	}
	defer end()
	if d.deviceNamed(b.Name) != nil {
		return false, ""
	}
	if sequence, ok := d.boot.removed[b.Name]; ok && sequence == bdev.Sequence {
		return false, ""
	}
	dev, err := d.add(ctx, b.request())
	if err != nil {
		return false, publicPaths(err.Error())
	}
	d.opts.Log.Info("added, as the configuration says", "name", dev.Name, "disk", dev.Original, "device", dev.Path, "from", b.where())
	return true, ""
}

// readRemoved reads which disks' filters were removed on purpose.
func (d *Daemon) readRemoved() error {
	return statefile.Load(d.removedFile(), removedKind, removedFormat, &d.boot.removed)
}

// noteRemoved notes that somebody has removed a filter; needs opLock.
func (d *Daemon) noteRemoved(name string, sequence uint64) {
	if d.boot.removed == nil {
		return
	}
	d.boot.removed[name] = sequence
	if err := statefile.Write(d.removedFile(), removedKind, removedFormat, d.boot.removed); err != nil {
		d.opts.Log.Warn("the next daemon will add a disk again whose filter was removed", "name", name, "error", err)
	}
}

// forgetRemoved is for a daemon that was stopped: the next one begins as at a boot.
func (d *Daemon) forgetRemoved() { _ = os.Remove(d.removedFile()) }

// awaitUdev waits until udev is done with what it knows of. Then systemd has been told
// of the filters before it is told that the daemon is ready, and mounts them.
func (d *Daemon) awaitUdev(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, udevTimeout)
	defer cancel()
	for d.udevLinks() && d.host.Exists("/run/udev/queue") {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// unfiltered are the disks that the configuration names and that have no filter; needs
// Daemon.mu.
func (d *Daemon) unfiltered() (out []control.Unfiltered) {
	for _, b := range d.boot.disks {
		if b.reason != "" {
			out = append(out, control.Unfiltered{Name: b.Name, Path: b.Path, Reason: b.reason})
		}
	}
	return out
}
