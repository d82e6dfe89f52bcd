package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// The kinds of our ublk devices, as the driver keeps them for us.
const (
	filterKind = 'f'
	imageKind  = 'i'
)

// diskName is the kernel's name of the disk of the ublk device with that number.
func diskName(id int) string { return fmt.Sprintf("ublkb%d", id) }

// diskNumber is the number of the ublk device whose disk has that kernel name, or a partition.
func diskNumber(name string) (id int, ok bool) {
	n, err := fmt.Sscanf(name, "ublkb%d", &id)
	return id, n == 1 && err == nil
}

// addUblk adds a ublk device of ours, with its note for udev written before it
// appears, and put on record by the caller's function: therefore its number is chosen
// here. It outlives this process. A device returned with an error is one that the
// driver does not let go.
func (d *Daemon) addUblk(ctx context.Context, kind byte, noteKind, name string, cfg ublk.Config, record func(id int, tag uint64) error) (*ublk.Device, error) {
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	cfg.Tag = ublk.NewTag(kind)
	cfg.Recovery = true
	cfg.OpenedBy, cfg.Claim = d.openedBy, d.claimDisk
	used, err := d.ctl.List(ctx)
	if err != nil {
		return nil, err
	}
	for id := 0; ; id++ {
		if slices.ContainsFunc(used, func(i ublk.Info) bool { return i.ID == id }) {
			continue
		}
		cfg.ID = id
		kernelName := diskName(id)
		if err := d.note(kernelName, noteKind, name); err != nil {
			return nil, err
		}
		if err := record(id, cfg.Tag); err != nil {
			d.forgetNote(kernelName)
			return nil, err
		}
		dev, err := ublk.Add(ctx, d.ctl, cfg)
		if dev == nil {
			d.forgetNote(kernelName)
		}
		if errors.Is(err, unix.EEXIST) {
			// Another server took the number meanwhile.
			continue
		}
		return dev, err
	}
}

// removeUblk stops and deletes a ublk device under its users, with its link.
func (d *Daemon) removeUblk(dev *ublk.Device, link string) error {
	ctx, cancel := d.withDiskTimeout(context.Background())
	defer cancel()
	// The name goes first, because it must not lead to another device that takes the
	// number.
	d.unlink(link, dev.Path)
	deathpoint.Point()
	err := dev.Delete(ctx)
	deathpoint.Point()
	if err == nil {
		d.forgetNote(filepath.Base(dev.Path))
		// udev may have looked at the device once more, and is not done with its end.
		d.unlink(link, dev.Path)
	}
	return err
}

func ublkMode(m control.Mode) ublk.Mode {
	switch m {
	case control.ModeCopy:
		return ublk.ModeCopy
	case control.ModeZeroCopy:
		return ublk.ModeZeroCopy
	case control.ModeAuto:
	}
	return ublk.ModeAuto
}

func modeOf(m ublk.Mode) control.Mode {
	if m == ublk.ModeZeroCopy {
		return control.ModeZeroCopy
	}
	return control.ModeCopy
}
