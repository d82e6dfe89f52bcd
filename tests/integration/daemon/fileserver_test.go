package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

const fileServerEnv = "UBLK_BLKSNAP_FILE_SERVER"

// serveFiles shows a directory on another one until the process is killed.
func serveFiles(t *testing.T, data, at string) {
	root, err := fs.NewLoopbackRoot(data)
	if err != nil {
		t.Fatal(err)
	}
	// Nothing is kept in the kernel: every look is a question.
	server, err := fs.Mount(at, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, AllowOther: true}})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("serving")
	server.Wait()
}

// TestDeadFileServer: whoever names a file on a file server that does not answer
// is told so in time, nobody else has to do with it, and neither the files that
// other processes have there nor a loop device over such a file hold anybody up.
func TestDeadFileServer(t *testing.T) {
	if data, at, ok := strings.Cut(os.Getenv(fileServerEnv), ":"); ok {
		serveFiles(t, data, at)
		return
	}
	guest.NeedEither(t)
	ram := guest.RAMDisks(t, 2, 8<<20)
	at := t.TempDir()
	server, _ := guest.StartChild(t, "TestDeadFileServer", fileServerEnv+"="+t.TempDir()+":"+at, "serving")
	t.Cleanup(func() { guest.Run(t, "umount", at) })
	img := guest.SparseFile(t, at, guest.Ext4.Minimum)
	loop := guest.LoopOver(t, img, 512)
	guest.Ext4.Make(t, loop)
	guest.Mount(t, loop)
	open, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	bare := guest.LoopOver(t, guest.SparseFile(t, at, 4<<20), 512)
	remote := filepath.Join(at, "differences")

	// udev's rules may be looked for there as well.
	const rules = "/run/udev/rules.d"
	if _, err := os.Stat("/run/udev"); errors.Is(err, os.ErrNotExist) {
		t.Cleanup(func() { os.RemoveAll("/run/udev") })
	}
	if err := os.MkdirAll(rules, 0o755); err != nil {
		t.Fatal(err)
	}
	guest.Run(t, "mount", "--bind", at, rules)
	t.Cleanup(func() { guest.Run(t, "umount", rules) })

	d := program.Start(t, "disk_timeout=2s", "storage_timeout=6s")
	dev := d.Add(ram[0])
	s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: "/dev/shm"}}})
	if err := server.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() { _ = server.Process.Signal(unix.SIGCONT) }
	t.Cleanup(resume)

	hang := func() {
		t.Helper()
		for _, path := range []string{remote, at, bare} {
			_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: path}})
			program.WantError(t, err, control.Timeout, path, "does not answer")
		}
		_, err = d.AddDevice(guest.Context(t), control.AddRequest{Path: remote})
		program.WantError(t, err, control.Timeout, remote, "does not answer")
		_, err := d.DeviceStatus(guest.Context(t), remote)
		program.WantError(t, err, control.Timeout, remote, "does not answer")
	}
	others := func() {
		t.Helper()
		other := d.Add(ram[1])
		d.Destroy(d.Take(0, dev, other).ID)
		d.Remove(other)
	}
	others()
	hang()
	// What hangs is not asked anew: no more threads hang.
	before := d.Held()
	for range 3 {
		others()
		hang()
	}
	d.Settled(before, 3)
	d.Taken(s.ID)
	d.Destroy(s.ID)
	d.Remove(dev)

	resume()
	dev = d.Add(ram[0])
	for _, path := range []string{remote, bare} {
		guest.WaitFor(t, "an answer for "+path, func() bool {
			got, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: path}}})
			if err != nil {
				program.WantError(t, err, control.Timeout)
				return t.Failed()
			}
			if got.Storage[0].Warning == "" {
				t.Errorf("no word of what is not known about %s", path)
			}
			d.Taken(got.ID)
			d.Destroy(got.ID)
			return true
		})
	}
	d.Remove(dev)
}
