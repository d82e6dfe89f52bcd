package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

var began = time.Now()

// busy is the time that all processors together have worked, since some time
// in the past. It comes from the idle time, which the kernel measures, where
// the times of users and system are counted in ticks.
func busy() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read processor times: %w", err)
	}
	now := time.Since(began)
	idle, cpus, err := parseStat(string(b))
	if err != nil {
		return 0, fmt.Errorf("read processor times: %w", err)
	}
	return now*time.Duration(cpus) - idle, nil
}

// parseStat is the idle time, waiting for I/O included, and the number of
// processors.
func parseStat(s string) (idle time.Duration, cpus int, err error) {
	const tick = 10 * time.Millisecond // USER_HZ
	for _, line := range strings.Split(s, "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) < 6 || !strings.HasPrefix(f[0], "cpu"):
		case f[0] == "cpu":
			for _, s := range f[4:6] {
				n, err := strconv.ParseInt(s, 10, 64)
				if err != nil {
					return 0, 0, err
				}
				idle += time.Duration(n) * tick
			}
		default:
			cpus++
		}
	}
	if cpus == 0 {
		return 0, 0, errors.New("no processors in /proc/stat")
	}
	return idle, cpus, nil
}

// fioOverhead is the processor time of a run of fio that does next to nothing.
func fioOverhead(ctx context.Context, path string) (time.Duration, error) {
	var all []time.Duration
	for range 5 {
		before, err := busy()
		if err != nil {
			return 0, err
		}
		if _, err := (job{rw: "read", block: 4096, depth: 1, size: 4096, bytes: 4096}).run(ctx, path, 0); err != nil {
			return 0, err
		}
		after, err := busy()
		if err != nil {
			return 0, err
		}
		all = append(all, after-before)
	}
	slices.Sort(all)
	return all[len(all)/2], nil
}
