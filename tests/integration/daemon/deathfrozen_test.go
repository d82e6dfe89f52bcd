package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// TestDeathInFrozenTake dies in a take of a device with a mounted filesystem, which is
// frozen then: it goes on, and is whole in the image. The take meets a change map that is
// not whole, and says that it has begun a new generation.
func TestDeathInFrozenTake(t *testing.T) {
	v := newVictim(t)
	everyStepOf(t, 32, 7, func(n int) bool {
		v.dies(n)
		dev := v.device()
		guest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "1024", "-J", "size=1", dev.Link)
		at := guest.Mount(t, dev.Link)
		write := func(text string) error {
			f, err := os.Create(filepath.Join(at, "file"))
			if err != nil {
				return err
			}
			_, err = f.WriteString(text)
			return errors.Join(err, f.Sync(), f.Close())
		}
		if err := write("before"); err != nil {
			t.Fatal(err)
		}
		s := v.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: v.store}}})
		markCorrupted(t, filepath.Join(v.RunDir.State(), "cbt", dev.Name))
		died := v.try(func() error {
			_, err := v.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: s.ID})
			return err
		})
		guest.WaitFor(t, "nothing frozen on record", func() bool {
			_, err := os.Stat(filepath.Join(v.RunDir.State(), "frozen"))
			return errors.Is(err, fs.ErrNotExist)
		})
		if v.Show(s.ID).State == control.SnapshotCreated {
			v.Taken(s.ID)
		}
		if h := v.CBT(dev).History; h.Reason != control.HistoryDamaged || h.Text == "" {
			t.Errorf("n = %d: why there is a new generation: %+v", n, h)
		}
		goesOn := make(chan error, 1)
		go func() { goesOn <- write("after") }()
		if err := guest.Await(t, "the filesystem to go on", goesOn); err != nil {
			t.Fatal(err)
		}
		image := guest.Mount(t, v.Show(s.ID).Images[0].Path, "ro")
		if text, err := os.ReadFile(filepath.Join(image, "file")); err != nil || string(text) != "before" {
			t.Errorf("n = %d: the image shows %q, %v", n, text, err)
		}
		guest.Unmount(t, image)
		guest.Unmount(t, at)
		v.clean()
		return died
	})
}

// markCorrupted is what is left of a daemon that dies while it begins a generation.
func markCorrupted(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	const flag = 256 // see package cbtmap
	_, err = f.WriteAt([]byte{1}, flag)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}
