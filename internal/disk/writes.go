package disk

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Writes is how much has been written to a disk since it is there, as the kernel
// counts it. It does not count what a program has the disk do by commands of its own
// (SCSI, NVMe), nor what is written to a device below.
type Writes struct {
	// Attached is another number each time that a disk is plugged in or set up.
	Attached uint64 `json:"attached"`
	// Own: requests and sectors of writes, then of discards.
	Own [4]uint64 `json:"own"`
	// WholeDisk, for a partition: what was written to the whole disk by its own name.
	WholeDisk [4]uint64 `json:"whole_disk"`
	// Carried: it may be of what was there before, because the kernel goes on counting
	// when a loop device gets another file, or a drive another medium.
	Carried bool `json:"carried,omitempty"`
}

// Sectors of writes and of discards tell of a change. Requests do not, because some devices
// count a flush as one.
func (w Writes) Sectors() (own, wholeDisk [2]uint64) {
	return [2]uint64{w.Own[1], w.Own[3]}, [2]uint64{w.WholeDisk[1], w.WholeDisk[3]}
}

// None says whether nothing was written to the disk since it is there.
func (w Writes) None() bool {
	own, whole := w.Sectors()
	return own == [2]uint64{} && whole == [2]uint64{}
}

// CountWrites reads the kernel's counters.
func (h *Host) CountWrites(d *Disk) (Writes, error) {
	whole := d
	if d.Parent != "" {
		var err error
		if whole, err = h.diskNamed(d.Parent); err != nil {
			return Writes{}, err
		}
	}
	if readText(filepath.Join(whole.sys, "queue/iostats")) != "1" {
		return Writes{}, errors.New("the kernel does not count writes to " + whole.Node + " (queue/iostats)")
	}
	var w Writes
	var err error
	if w.Attached, err = strconv.ParseUint(readText(filepath.Join(whole.sys, "diskseq")), 10, 64); err != nil {
		return Writes{}, fmt.Errorf("read the sequence number of %s: %w", whole.Node, err)
	}
	w.Carried = exists(filepath.Join(whole.sys, "loop")) || readText(filepath.Join(whole.sys, "removable")) == "1"
	if w.Own, err = counters(d); err != nil || whole == d {
		return w, err
	}
	// Of all partitions, others of which may be written to at this moment.
	for range 200 {
		before, err := counters(whole)
		if err != nil {
			return w, err
		}
		past := before
		for _, p := range h.Partitions(whole) {
			c, err := counters(p)
			if err != nil {
				return w, err
			}
			for i := range past {
				past[i] -= c[i]
			}
		}
		if after, err := counters(whole); err == nil && after == before {
			w.WholeDisk = past
			return w, nil
		}
		time.Sleep(time.Millisecond)
	}
	return w, errors.New(whole.Node + " is written to without a pause")
}

// counters are the fields of Documentation/block/stat.rst that count what changes
// the disk.
func counters(d *Disk) (c [4]uint64, err error) {
	f := strings.Fields(readText(filepath.Join(d.sys, "stat")))
	if len(f) < 15 {
		return c, errors.New("read the counters of " + d.Node)
	}
	for i, n := range []int{4, 6, 11, 13} {
		if c[i], err = strconv.ParseUint(f[n], 10, 64); err != nil {
			return c, fmt.Errorf("read the counters of %s: %w", d.Node, err)
		}
	}
	return c, nil
}
