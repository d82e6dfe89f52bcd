package storage

import (
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestStuckStorageOfCreated: a storage's filesystem stands still when the daemon dies. The disks of
// snapshots that were not taken yet do not wait for it, and the snapshots go on when it does.
func TestStuckStorageOfCreated(t *testing.T) {
	guest.NeedEither(t)
	guest.Run(t, "modprobe", "dm-mod")
	files := guest.DMDisk(t, "files", guest.LinearTable(t, guest.LoopDisk(t, guest.Ext4.Minimum, 512)))
	guest.Ext4.Make(t, files)
	dir := guest.Mount(t, files)
	// Nobody waits for that long.
	d := program.Start(t, "storage_timeout=1h")
	dev := d.Add(guest.RAMDisks(t, 1, 8<<20)[0])
	var made []control.Snapshot
	for _, name := range []string{"a", "b"} {
		made = append(made, d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: filepath.Join(dir, name)}}}))
	}
	guest.Run(t, "dmsetup", "suspend", "files") // with its filesystem frozen
	resume := sync.OnceFunc(func() { guest.Run(t, "dmsetup", "resume", "files") })
	t.Cleanup(resume)
	d.Kill()
	d.Launch()
	written := make(chan error, 1)
	go func() {
		f, err := direct.Open(dev.Path, unix.O_RDWR)
		if err == nil {
			buf := direct.Buffers.Get().(*[]byte)
			defer direct.Buffers.Put(buf)
			err = f.WriteAt((*buf)[:4096], 0)
			f.Close()
		}
		written <- err
	}()
	if err := guest.Await(t, "a write to the disk", written); err != nil {
		t.Error(err)
	}
	resume()
	guest.WaitFor(t, "the next daemon", func() bool {
		_, err := d.Info(guest.Context(t))
		return err == nil
	})
	for _, s := range made {
		d.Destroy(d.Taken(s.ID).ID)
	}
	d.Remove(dev)
	guest.Unmount(t, dir)
}
