package ublk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Feature is something that a ublk driver may have: one UBLK_F flag.
type Feature struct {
	Flag  uint64
	Name  string // the flag's name without UBLK_F_
	Since string // the first kernel where it can be used
	Means string // what it is good for, in a few words
}

// features are all that this package knows of, by flag.
var features = []Feature{
	{uapi.UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY", "6.15", "payloads as registered buffers"},
	{uapi.UBLK_F_URING_CMD_COMP_IN_TASK, "URING_CMD_COMP_IN_TASK", "6.0", "completion in the server's task"},
	{uapi.UBLK_F_NEED_GET_DATA, "NEED_GET_DATA", "6.0", "late choice of the buffer"},
	{uapi.UBLK_F_USER_RECOVERY, "USER_RECOVERY", "6.1", "devices survive their server"},
	{uapi.UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE", "6.1", "requests in flight are repeated after recovery"},
	{uapi.UBLK_F_UNPRIVILEGED_DEV, "UNPRIVILEGED_DEV", "6.3", "servers without privileges"},
	{uapi.UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE", "6.4", "encoded command numbers"},
	{uapi.UBLK_F_USER_COPY, "USER_COPY", "6.5", "payloads by pread and pwrite"},
	{uapi.UBLK_F_ZONED, "ZONED", "6.6", "zoned devices"},
	{uapi.UBLK_F_USER_RECOVERY_FAIL_IO, "USER_RECOVERY_FAIL_IO", "6.13", "errors instead of waiting while there is no server"},
	{uapi.UBLK_F_UPDATE_SIZE, "UPDATE_SIZE", "6.16", "change of the size while in use"},
	{uapi.UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG", "6.16", "zero copy without extra commands"},
	{uapi.UBLK_F_QUIESCE, "QUIESCE", "6.16", "change of the server without its death"},
	{uapi.UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON", "6.16", "a task for each request"},
	{uapi.UBLK_F_BUF_REG_OFF_DAEMON, "BUF_REG_OFF_DAEMON", "6.17", "buffers registered from any task"},
	{uapi.UBLK_F_BATCH_IO, "BATCH_IO", "7.0", "requests fetched and committed in batches"},
	{uapi.UBLK_F_INTEGRITY, "INTEGRITY", "7.0", "integrity metadata"},
	{uapi.UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV", "7.0", "stop only if not in use"},
	{uapi.UBLK_F_NO_AUTO_PART_SCAN, "NO_AUTO_PART_SCAN", "7.0", "no search for partitions at start"},
	{uapi.UBLK_F_SHMEM_ZC, "SHMEM_ZC", "7.1", "zero copy through shared memory"},
}

// Answer is what a probe found out.
type Answer int

const (
	Unknown Answer = iota // could not tell
	Yes
	No
)

func (a Answer) String() string {
	switch a {
	case Yes:
		return "yes"
	case No:
		return "no"
	case Unknown:
	}
	return "could not tell"
}

// Probe is a Feature and whether this kernel has it.
type Probe struct {
	Feature
	Answer Answer
	Err    error // why it could not be told
}

// ProbeFeatures asks the driver about every Feature, and loads the driver if need be.
// The error is that of OpenControl; then no probe could tell.
func ProbeFeatures() ([]Probe, error) {
	c, err := OpenControl()
	if err != nil {
		return probes(0, err), err
	}
	defer c.Close()
	return c.Probes(), nil
}

// Probes says of every Feature whether the driver has it.
func (c *Control) Probes() []Probe { return probes(c.features, nil) }

func probes(flags uint64, err error) []Probe {
	out := make([]Probe, len(features))
	for i, f := range features {
		out[i] = Probe{Feature: f, Answer: No, Err: err}
		switch {
		case err != nil:
			out[i].Answer = Unknown
		case flags&f.Flag != 0:
			out[i].Answer = Yes
		}
	}
	return out
}

// Has says whether the driver has all the UBLK_F flags.
func (c *Control) Has(flags uint64) bool { return c.features&flags == flags }

// ScansInStart says whether the driver looks for partitions while it starts a disk, and not
// beside that. See Config.NoPartScan.
func (c *Control) ScansInStart() bool { return !c.Has(uapi.UBLK_F_NO_AUTO_PART_SCAN) }

func (c *Control) readFeatures(ctx context.Context) error {
	var buf [uapi.UBLK_FEATURES_LEN]byte
	err := c.do(ctx, uapi.UBLK_U_CMD_GET_FEATURES, uapi.UblksrvCtrlCmd{DevID: anyID, QueueID: noQueue}, buf[:])
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%w: kernel %s cannot list its features: Linux %s or newer is needed", ErrTooOld, KernelRelease(), MinKernel)
	}
	if err != nil {
		return err
	}
	c.features = binary.NativeEndian.Uint64(buf[:])
	return nil
}

// unsupported is the error for something that the driver cannot do.
func unsupported(flag uint64) error {
	for _, f := range features {
		if f.Flag == flag {
			return fmt.Errorf("%w: no %s: Linux %s or newer is needed", ErrTooOld, f.Name, f.Since)
		}
	}
	return ErrTooOld
}
