package disk

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Partition is what the kernel knows of a partition.
type Partition struct {
	Number int   `json:"number"`
	Start  int64 `json:"start"` // in bytes
	Size   int64 `json:"size"`  // in bytes
}

// Partitions are the partitions of a whole disk.
func (h *Host) Partitions(d *Disk) []*Disk {
	var parts []*Disk
	files, _ := filepath.Glob(filepath.Join(d.sys, "*", "partition"))
	for _, f := range files {
		n, err := ParseNum(readText(filepath.Join(filepath.Dir(f), "dev")))
		if err != nil {
			continue
		}
		if p, err := h.byNumber(n); err == nil {
			parts = append(parts, p)
		}
	}
	return parts
}

// PartitionTable is what the kernel knows of the partitions of a whole disk, by number.
func (h *Host) PartitionTable(d *Disk) []Partition {
	var table []Partition
	for _, p := range h.Partitions(d) {
		text := func(name string) int64 {
			n, _ := strconv.ParseInt(readText(filepath.Join(p.sys, name)), 10, 64)
			return n
		}
		table = append(table, Partition{int(text("partition")), text("start") * sector.Size, text("size") * sector.Size})
	}
	slices.SortFunc(table, func(a, b Partition) int { return cmp.Compare(a.Number, b.Number) })
	return table
}

// SamePartitions says whether the kernel knows the same partitions of two whole
// disks.
func (h *Host) SamePartitions(a, b *Disk) bool {
	return slices.Equal(h.PartitionTable(a), h.PartitionTable(b))
}

// AddPartitions tells the kernel of partitions of the disk d, for which it has not looked by
// itself. It leaves out what the kernel does not take: what is there already, overlaps
// another, or lies beyond the end. It is an error if another disk is d by now. Opening a disk
// may have to wait for its I/O, so it is for a Prober's process if the disk is the daemon's own.
func AddPartitions(d *Disk, table []Partition) error { return addPartitions(d.Node, d.Sequence, table) }

func addPartitions(node string, sequence uint64, table []Partition) error {
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var now uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uapi.BLKGETDISKSEQ, uintptr(unsafe.Pointer(&now))); errno != 0 || now != sequence {
		return fmt.Errorf("another disk is %s now: %w", node, cmp.Or(errno, unix.ENODEV))
	}
	for _, p := range table {
		part := unix.BlkpgPartition{Start: p.Start, Length: p.Size, Pno: int32(p.Number)}
		arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), uapi.BLKPG, uintptr(unsafe.Pointer(&arg)))
	}
	return nil
}

// AddPartitions is the function of that name, in the Prober's process. If ctx ends before
// that is done, it is done later.
func (p *Prober) AddPartitions(ctx context.Context, d *Disk, table []Partition) error {
	a, err := p.ask(ctx, question{Partition: d.Node, Sequence: d.Sequence, Table: table})
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return err
}
