package storage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestBlksnapStorageOnItself: storage that lies on a device of the same snapshot is
// refused to blksnap's own command. The kernel module took it. TestStorageOnItself
// tries every way to that.
func TestBlksnapStorageOnItself(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t)
	dev := d.Add(disk)
	guest.Ext4.Make(t, dev.Link)
	dir := guest.Mount(t, dev.Link)
	for _, path := range []string{filepath.Join(dir, "differences"), dir, disk} {
		a := d.Call("blksnap", "snapshot_create", "-d", disk, "-f", path, "-l", "10M")
		if a.Status != 1 || a.Out != "" || !strings.Contains(a.Err, "lies on "+disk) {
			t.Errorf("storage %s: %+v", path, a)
		}
	}
	if a := d.Call("blksnap", "snapshot_collect"); a.Status != 0 || a.Out != "\n" {
		t.Errorf("snapshots are left: %+v", a)
	}
	guest.Unmount(t, dir)
	d.Remove(dev)
}

// TestStorageOnItself: storage that lies on a filtered device, in whatever way,
// is refused, and nothing is left of the attempt.
func TestStorageOnItself(t *testing.T) {
	guest.NeedEither(t)
	disks := guest.RAMDisks(t, 2, 160<<20)
	guest.Run(t, "modprobe", "dm-mod")
	guest.Run(t, "modprobe", "loop")
	d := program.Start(t)
	direct := d.Add(disks[0])
	stacked := d.Add(disks[1])
	dm := guest.DMDisk(t, "over", guest.LinearTable(t, stacked.Path))
	guest.Ext4.Make(t, direct.Link)
	guest.Ext4.Make(t, dm)
	dir, dmDir := guest.Mount(t, direct.Link), guest.Mount(t, dm)
	// A loop device over a file on it, and a filesystem on the loop device.
	file := guest.SparseFile(t, dir, 80<<20)
	loop := guest.LoopOver(t, file, 512)
	guest.Ext4.Make(t, loop)
	loopDir := guest.Mount(t, loop)
	// The same through an overlay.
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		t.Fatal(err)
	}
	overlay := t.TempDir()
	guest.Run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+upper+",workdir="+work, "over", overlay)
	t.Cleanup(func() { guest.Run(t, "umount", overlay) })
	// Both where no path leads to them.
	hidden := filepath.Join(dir, "hidden")
	for _, sub := range []string{"", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(hidden, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	hiddenLoop := guest.LoopOver(t, guest.SparseFile(t, hidden, 80<<20), 512)
	hiddenOverlay := t.TempDir()
	guest.Run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+hidden+"/upper,workdir="+hidden+"/work", "over", hiddenOverlay)
	t.Cleanup(func() { guest.Run(t, "umount", hiddenOverlay) })
	guest.Run(t, "mount", "-t", "tmpfs", "cover", hidden)
	t.Cleanup(func() { guest.Run(t, "umount", hidden) })
	// A symbolic link and a bind mount.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	bind := t.TempDir()
	guest.Run(t, "mount", "--bind", dir, bind)
	t.Cleanup(func() { guest.Run(t, "umount", bind) })

	for _, c := range []struct{ what, path string }{
		{"the original", disks[0]},
		{"the filter device", direct.Path},
		{"its link", direct.Link},
		{"a directory", dir},
		{"a new file", filepath.Join(dir, "new")},
		{"a link to it", link},
		{"a bind mount of it", bind},
		{"an overlay", overlay},
		{"an overlay over a directory that is mounted over", hiddenOverlay},
		{"a loop device over a file that is mounted over", hiddenLoop},
		{"a dm device over it", dm},
		{"a filesystem on a dm device over it", dmDir},
		{"a loop device over a file on it", loop},
		{"a filesystem on a loop device over a file on it", filepath.Join(loopDir, "new")},
	} {
		_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{direct.Name, stacked.Name}, Storage: []control.Storage{{Path: c.path}}})
		if err == nil {
			t.Errorf("%s: not refused", c.what)
			for _, id := range program.SnapshotIDs(t, d) {
				d.Destroy(id)
			}
			continue
		}
		if control.CodeOf(err) != control.Busy || !strings.Contains(err.Error(), "lies on /dev/ram") {
			t.Errorf("%s: %v", c.what, err)
		}
		// Not even of one that has only the other device.
		s := d.Create(control.CreateRequest{Devices: []string{stacked.Name}})
		_, err = d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: c.path}})
		program.WantError(t, err, control.Busy, c.path, "lies on /dev/ram")
		d.Destroy(s.ID)
	}
	if ids := program.SnapshotIDs(t, d); len(ids) > 0 {
		t.Errorf("snapshots %v are left", ids)
	}
	for _, p := range []string{filepath.Join(dir, "new"), filepath.Join(loopDir, "new")} {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
	// An overlay over what cannot be seen, but not on these disks: as much is said.
	covered, unseen := guest.SmallFS(t, 16<<20), t.TempDir()
	if err := errors.Join(os.Mkdir(covered+"/upper", 0o755), os.Mkdir(covered+"/work", 0o755)); err != nil {
		t.Fatal(err)
	}
	guest.Run(t, "mount", "-t", "overlay", "-o", "lowerdir=/usr/share,upperdir="+covered+"/upper,workdir="+covered+"/work", "over", unseen)
	t.Cleanup(func() { guest.Run(t, "umount", unseen) })
	guest.Run(t, "mount", "-t", "tmpfs", "cover", covered)
	t.Cleanup(func() { guest.Run(t, "umount", covered) })
	a := d.Call("ublk-blksnap", "snapshot", "create", direct.Name, "--storage", unseen, "--take")
	if a.Status != 0 || !strings.Contains(a.Err, "warning: storage "+unseen) || !strings.Contains(a.Err, "cannot be seen") {
		t.Errorf("storage on an unseen overlay: %+v", a)
	}
	for _, id := range program.SnapshotIDs(t, d) {
		if st := d.Show(id).Storage[0]; !strings.Contains(st.Warning, covered+"/upper cannot be seen") {
			t.Errorf("storage on an unseen overlay: %+v", st)
		}
		d.Destroy(id)
	}
	// The other way round: what is in use as storage can not be added.
	free := guest.LoopDisk(t, 16<<20, 512)
	s := d.Create(control.CreateRequest{Devices: []string{direct.Name}, Storage: []control.Storage{{Path: free}}})
	_, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: free})
	program.WantError(t, err, control.Busy, free)
	_, err = d.AddToSnapshot(guest.Context(t), control.SnapshotDeviceRequest{ID: s.ID, Device: free, Attach: true})
	program.WantError(t, err, control.Busy, free)
	d.Destroy(s.ID)
	d.Remove(d.Add(free))

	for _, dir := range []string{loopDir, dmDir} {
		guest.Unmount(t, dir)
	}
}
