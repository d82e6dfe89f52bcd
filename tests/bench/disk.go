package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// diskSize is how much of the disk is used.
	diskSize = 1 << 30
	// ramSize is that of the RAM disks. The differences of all of the disk,
	// and a table, fit on one.
	ramSize = diskSize + diskSize/8
)

// ramDisks loads two RAM disks; unload takes them away again.
func ramDisks(ctx context.Context) (orig, cow string, unload func(), err error) {
	orig, cow = "/dev/ram0", "/dev/ram1"
	if _, err := os.Stat(orig); err == nil {
		return "", "", nil, fmt.Errorf("%s exists: unload brd first (modprobe -r brd), for disks of another size", orig)
	}
	if err := command(ctx, "modprobe", "brd", "rd_nr=2", fmt.Sprintf("rd_size=%d", ramSize>>10)); err != nil {
		return "", "", nil, err
	}
	unload = func() { _ = command(context.WithoutCancel(ctx), "modprobe", "-r", "brd") }
	for _, path := range []string{orig, cow} {
		if err := fill(path, ramSize); err != nil {
			unload()
			return "", "", nil, err
		}
	}
	return orig, cow, unload, nil
}

// fill writes all of the disk at path, so that its pages are there.
func fill(path string, size int64) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	buf, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	defer func() { _ = unix.Munmap(buf) }()
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	for off := int64(0); off < size; {
		n, err := unix.Pwrite(fd, buf[:min(size-off, int64(len(buf)))], off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("fill %s: %w", path, err)
		}
		off += int64(n)
	}
	return nil
}

// command runs a program for its effect.
func command(ctx context.Context, name string, args ...string) error {
	_, err := output(ctx, name, args...)
	return err
}

// output runs a program and returns what it printed, without space around it.
func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, exit.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", cmd, err)
	}
	return strings.TrimSpace(string(out)), nil
}
