package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// system is one way to the disk.
type system struct {
	name  string
	chunk int64 // bytes; 0: it has none
	start func(ctx context.Context, e *env, chunk int64) (*instance, error)
}

// key is how rows are named in patterns and messages.
func (s system) key() string { return fmt.Sprintf("%s/%d", s.name, s.chunk>>10) }

// instance is a system at work.
type instance struct {
	disk  string // what is written to
	image string // where the past is read; empty if there is none
	stop  func(context.Context) error
}

// env is what instances are made of.
type env struct {
	orig, cow string // RAM disks
	binary    string // ublk-blksnap
	daemon    *daemon
}

func startRaw(_ context.Context, e *env, _ int64) (*instance, error) {
	return &instance{disk: e.orig, image: e.orig, stop: func(context.Context) error { return nil }}, nil
}

func startLoop(ctx context.Context, e *env, _ int64) (*instance, error) {
	dev, err := output(ctx, "losetup", "--find", "--show", "--direct-io=on", e.orig)
	if err != nil {
		return nil, err
	}
	// losetup says nothing where the kernel falls back to buffered I/O.
	dio, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "loop/dio"))
	if err == nil && string(dio) != "1\n" {
		err = errors.New("the kernel gives no direct I/O")
	}
	stop := func(ctx context.Context) error { return command(ctx, "losetup", "--detach", dev) }
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dev, err), stop(ctx))
	}
	return &instance{disk: dev, stop: stop}, nil
}

func startDM(ctx context.Context, e *env, chunk int64) (*instance, error) {
	if err := fill(e.cow, ramSize); err != nil {
		return nil, err
	}
	const orig, snap = "bench-origin", "bench-snapshot"
	sectors := int64(ramSize) / sector.Size
	remove := func(ctx context.Context, name string) error {
		return command(ctx, "dmsetup", "remove", "--retry", name)
	}
	err := command(ctx, "dmsetup", "create", snap, "--table",
		fmt.Sprintf("0 %d snapshot %s %s N %d", sectors, e.orig, e.cow, chunk/sector.Size))
	if err != nil {
		return nil, err
	}
	err = command(ctx, "dmsetup", "create", orig, "--table", fmt.Sprintf("0 %d snapshot-origin %s", sectors, e.orig))
	if err != nil {
		return nil, errors.Join(err, remove(ctx, snap))
	}
	return &instance{
		disk: "/dev/mapper/" + orig, image: "/dev/mapper/" + snap,
		stop: func(ctx context.Context) error { return errors.Join(remove(ctx, orig), remove(ctx, snap)) },
	}, nil
}

func startFilter(ctx context.Context, e *env, _ int64) (*instance, error) {
	c, err := e.client(ctx)
	if err != nil {
		return nil, err
	}
	d, err := c.AddDevice(ctx, control.AddRequest{Path: e.orig})
	if err != nil {
		return nil, err
	}
	return &instance{disk: d.Path, stop: func(ctx context.Context) error {
		_, err := c.RemoveDevice(ctx, control.RemoveRequest{Device: d.Name})
		return err
	}}, nil
}

// startLogged and startUnlogged are the filter over a disk that can be known again, as a
// loop device can, with its write-intent log and without.
func startLogged(ctx context.Context, e *env, _ int64) (*instance, error) {
	return startIntent(ctx, e, true)
}
func startUnlogged(ctx context.Context, e *env, _ int64) (*instance, error) {
	return startIntent(ctx, e, false)
}

func startIntent(ctx context.Context, e *env, logged bool) (*instance, error) {
	loop, err := startLoop(ctx, e, 0)
	if err != nil {
		return nil, err
	}
	c, err := e.client(ctx)
	if err != nil {
		return nil, errors.Join(err, loop.stop(ctx))
	}
	d, err := c.AddDevice(ctx, control.AddRequest{Path: loop.disk, IntentLog: &logged})
	if err != nil {
		return nil, errors.Join(err, loop.stop(ctx))
	}
	stop := func(ctx context.Context) error {
		_, err := c.RemoveDevice(ctx, control.RemoveRequest{Device: d.Name})
		return errors.Join(err, loop.stop(ctx))
	}
	i, err := c.CBTInfo(ctx, d.Name)
	if err == nil && i.PowerFailure.Covered != logged {
		err = fmt.Errorf("write-intent log %v: %+v", logged, i.PowerFailure)
	}
	if err != nil {
		return nil, errors.Join(err, stop(ctx))
	}
	return &instance{disk: d.Path, stop: stop}, nil
}

func startSnapshot(ctx context.Context, e *env, chunk int64) (*instance, error) {
	return startSnapshotOf(ctx, e, chunk, false)
}

func startEncrypted(ctx context.Context, e *env, chunk int64) (*instance, error) {
	return startSnapshotOf(ctx, e, chunk, true)
}

func startSnapshotOf(ctx context.Context, e *env, chunk int64, encrypt bool) (*instance, error) {
	if err := fill(e.cow, ramSize); err != nil {
		return nil, err
	}
	f, err := startFilter(ctx, e, chunk)
	if err != nil {
		return nil, err
	}
	c := e.daemon.client
	s, err := c.CreateSnapshot(ctx, control.CreateRequest{
		Devices: []string{f.disk}, Storage: []control.Storage{{Path: e.cow}}, ChunkSize: chunk, Encrypt: &encrypt,
	})
	if err != nil {
		return nil, errors.Join(err, f.stop(ctx))
	}
	stop := func(ctx context.Context) error {
		_, err := c.DestroySnapshot(ctx, control.DestroyRequest{ID: s.ID})
		return errors.Join(err, f.stop(ctx))
	}
	taken, err := c.TakeSnapshot(ctx, control.TakeRequest{ID: s.ID})
	if err == nil && (len(taken.Images) != 1 || taken.ChunkSize != chunk) {
		err = fmt.Errorf("snapshot %s: %d images, chunks of %d", s.ID, len(taken.Images), taken.ChunkSize)
	}
	if err != nil {
		return nil, errors.Join(err, stop(ctx))
	}
	return &instance{disk: f.disk, image: taken.Images[0].Path, stop: stop}, nil
}

// daemon is ublk-blksnap at work, on a run directory of its own.
type daemon struct {
	client *control.Client
	cmd    *exec.Cmd
	ended  chan struct{}
	log    string
}

// client is that of the daemon, which is started when first needed.
func (e *env) client(ctx context.Context) (*control.Client, error) {
	if e.daemon != nil {
		return e.daemon.client, nil
	}
	d, err := startDaemon(ctx, e.binary)
	if err != nil {
		return nil, err
	}
	e.daemon = d
	return d.client, nil
}

func startDaemon(ctx context.Context, binary string) (*daemon, error) {
	dir, err := os.MkdirTemp("/run", "ublk-blksnap-bench-")
	if err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	// On a filesystem of its own: its fsyncs go to a disk, even if that is in memory.
	kept := filepath.Join(dir, "kept")
	err = command(ctx, "truncate", "-s", "64M", kept+".img")
	if err == nil {
		err = command(ctx, "mkfs.ext4", "-q", kept+".img")
	}
	if err == nil {
		err = os.Mkdir(kept, 0o700)
	}
	if err == nil {
		err = command(ctx, "mount", "-o", "loop", kept+".img", kept)
	}
	if err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	d := &daemon{
		client: control.NewClient(filepath.Join(dir, "control.sock")),
		cmd:    exec.Command(binary, "daemon", "--run-dir", dir, "--state-dir", filepath.Join(kept, "state")),
		ended:  make(chan struct{}),
		log:    filepath.Join(dir, "log"),
	}
	out, err := os.Create(d.log)
	if err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	defer out.Close()
	d.cmd.Stdout, d.cmd.Stderr = out, out
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start daemon: %w", err)
	}
	go func() {
		_ = d.cmd.Wait()
		close(d.ended)
	}()
	for {
		_, err := d.client.Info(ctx)
		if err == nil {
			return d, nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-d.ended:
			said, _ := os.ReadFile(d.log)
			return nil, fmt.Errorf("start daemon: it ended (%s): %s", d.cmd.ProcessState, said)
		case <-ctx.Done():
			return nil, fmt.Errorf("start daemon: %w: %w", ctx.Err(), err)
		}
	}
}

// stop ends the daemon, whose devices have been removed.
func (d *daemon) stop() error {
	d.client.Close()
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop daemon: %w", err)
	}
	select {
	case <-d.ended:
	case <-time.After(10 * time.Second):
		return fmt.Errorf("stop daemon: process %d does not end", d.cmd.Process.Pid)
	}
	// The state's tmpfs outlives its daemon.
	dir := filepath.Dir(d.log)
	_ = exec.Command("umount", filepath.Join(dir, "state"), filepath.Join(dir, "kept")).Run()
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("stop daemon: %w", err)
	}
	return nil
}
