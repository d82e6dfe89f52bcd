package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/tests/vm/machine"
)

// parseSize reads a number of bytes with an optional binary unit.
func parseSize(s string) (int64, error) {
	m := regexp.MustCompile(`^(\d+)([KMGT]?)$`).FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("size %q: want a number of bytes, or one with K, M, G or T", s)
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q: %w", s, err)
	}
	return n << (10 * (strings.Index("KMGT", m[2]) + 1) * min(1, len(m[2]))), nil
}

// scratch is a disk image without a name.
type scratch struct {
	machine.Disk
	image *os.File
}

func (s *scratch) close() { s.image.Close() }

func newDisk(spec string) (*scratch, error) {
	name, size, ok := strings.Cut(spec, "=")
	if !ok {
		return nil, fmt.Errorf("disk %q: want NAME=SIZE", spec)
	}
	n, err := parseSize(size)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp("", "vm-disk-")
	if err != nil {
		return nil, fmt.Errorf("create disk: %w", err)
	}
	os.Remove(f.Name()) // QEMU reaches it through our descriptor
	if err := f.Truncate(n); err != nil {
		f.Close()
		return nil, fmt.Errorf("create disk: %w", err)
	}
	file := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	return &scratch{machine.Disk{Name: name, File: file}, f}, nil
}

func keptDisk(spec string, i int) (machine.Disk, error) {
	disk := machine.Disk{Name: fmt.Sprintf("file%d", i)}
	disk.File, disk.Volatile = strings.CutSuffix(spec, ",volatile")
	if name, file, ok := strings.Cut(disk.File, "="); ok {
		disk.Name, disk.File = name, file
	}
	if m := regexp.MustCompile(`^(.*):(\d+[KMGT]?)$`).FindStringSubmatch(disk.File); m != nil {
		disk.File = m[1]
		if _, err := os.Stat(disk.File); errors.Is(err, os.ErrNotExist) {
			size, err := parseSize(m[2])
			if err != nil {
				return disk, err
			}
			f, err := os.Create(disk.File)
			if err != nil {
				return disk, fmt.Errorf("create disk: %w", err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				return disk, fmt.Errorf("create disk: %w", err)
			}
		}
	}
	if _, err := os.Stat(disk.File); err != nil {
		return disk, fmt.Errorf("open disk: %w", err)
	}
	return disk, nil
}
