package ublk

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The nodes of a device appear with it, through devtmpfs. After that udev handles
// them, so whoever opens one has to be patient.

// openNode opens a device's node for reading and writing. udev may be about to
// make it, change its owner, or look at it.
func openNode(ctx context.Context, path string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			return fd, nil
		}
		if !mayOpen(err) || sleep(ctx, pollInterval) != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
	}
}

// mayOpen says whether the node may be opened a little later.
func mayOpen(err error) bool {
	return slices.Contains([]error{unix.ENOENT, unix.EBUSY, unix.ENXIO, unix.ENODEV, unix.EINTR}, err)
}

func waitNode(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil {
			return nil
		}
		if sleep(ctx, pollInterval) != nil {
			return fmt.Errorf("wait for %s: %w: is devtmpfs mounted on /dev?", path, err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
