package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/stamp"
)

// Storage in places that belong to somebody, and storage that was there.

// nobody is a user who owns what a test gives him.
const nobody = 65534

// asNobody runs a shell command as that user.
func asNobody(t *testing.T, command string) {
	t.Helper()
	c := exec.Command("sh", "-ec", command)
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

func mkdir(t *testing.T, uid int, path string) {
	t.Helper()
	if err := errors.Join(os.Mkdir(path, 0o755), os.Chown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func lstat(t *testing.T, path string) (st unix.Stat_t) {
	t.Helper()
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st
}

// TestStorageOfAUser has storage in a directory of a user, who puts another in its
// place and moves a storage away, and storage in a file that others can read. No
// file of others is touched, nothing can be read of what was stored, and the file
// that was there is what it was: after a destroy, and after the daemon was killed.
func TestStorageOfAUser(t *testing.T) {
	guest.NeedEither(t)
	const size, allocated = 8 << 20, 4 << 20
	disk := guest.RAMDisks(t, 1, size)[0]
	loop := guest.LoopDisk(t, guest.Ext4.Minimum, 512)
	guest.Ext4.Make(t, loop)
	for _, killed := range []bool{false, true} {
		t.Run(fmt.Sprintf("killed=%v", killed), func(t *testing.T) {
			top := guest.Mount(t, loop)
			// The user gets there: the directories of tests are closed to him.
			const open = "/dev/shm/storage-of-a-user"
			mkdir(t, 0, open)
			t.Cleanup(func() { os.Remove(open) })
			guest.Run(t, "mount", "--bind", top, open)
			t.Cleanup(func() { guest.Run(t, "umount", open) })
			base := filepath.Join(open, fmt.Sprint(killed))
			mkdir(t, 0, base)
			home, precious := filepath.Join(base, "home"), filepath.Join(base, "precious")
			mkdir(t, nobody, home)
			mkdir(t, nobody, filepath.Join(home, "dir"))
			mkdir(t, 0, precious)
			put(t, filepath.Join(precious, "new"), "precious")
			put(t, filepath.Join(precious, "moved"), "precious")
			there := filepath.Join(base, "there")
			put(t, there, "")
			guest.Run(t, "fallocate", "-l", fmt.Sprint(allocated), there)
			before := lstat(t, there)
			reader, err := os.Open(there)
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()

			d := program.Start(t)
			dev := d.Add(disk)
			w := stamp.NewWorld(size)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			// Through a link of the user's a path may lead anywhere.
			asNobody(t, "ln -s "+precious+" "+home+"/link")
			_, err = d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{dev.Name}, Storage: []control.Storage{{Path: home + "/link/file"}}})
			program.WantError(t, err, control.Denied, "link", fmt.Sprintf("user %d", nobody))

			s := d.Create(control.CreateRequest{Devices: []string{dev.Name}, ChunkSize: 16 << 10, Storage: []control.Storage{
				{Path: home + "/dir/new", Limit: 1 << 20}, {Path: home + "/dir/moved", Limit: 1 << 20}, {Path: there},
			}})
			d.Taken(s.ID)
			if err := w.Fill(dev.Path); err != nil {
				t.Fatal(err)
			}
			guest.WaitFor(t, "all in the storage", func() bool { return d.Show(s.ID).Usage.Stored >= size })
			files := dataFiles(t, d)
			found := 0
			for _, f := range files {
				if stamps(t, f) > 0 {
					found++
				}
			}
			if found < 3 {
				t.Fatalf("data in %d files of the daemon: the test does not see it", found)
			}
			if killed {
				// What has no name, or lies in memory, is the next daemon's to take over: nobody else has it open.
				for _, f := range files {
					f.Close()
				}
				files = nil
				for _, name := range []string{"new", "moved"} {
					f, err := os.Open(filepath.Join(home, "dir", name))
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					files = append(files, f)
				}
			}
			if n := stamps(t, reader); n > 0 {
				t.Errorf("%d sectors of the disk in a file that others have open", n)
			}

			asNobody(t, fmt.Sprintf("cd %s; mv dir/moved dir/other; mv dir away; ln -s %s dir", home, precious))
			if killed {
				d.Kill()
				d.Restart()
			}
			err = d.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: s.ID})
			if err == nil || !strings.Contains(err.Error(), "moved away") || !strings.Contains(err.Error(), "home/dir/moved") {
				t.Errorf("destroy: %v, want it to tell of the file that was moved", err)
			}
			d.Remove(dev)

			for _, name := range []string{"new", "moved"} {
				if b, err := os.ReadFile(filepath.Join(precious, name)); string(b) != "precious" {
					t.Errorf("another's file holds %q, %v", b, err)
				}
			}
			left, err := os.ReadDir(filepath.Join(home, "away"))
			if err != nil || len(left) != 1 || left[0].Name() != "other" {
				t.Errorf("in the directory are %v, %v", left, err)
			}
			for _, f := range append(files, reader) {
				if n := stamps(t, f); n > 0 {
					t.Errorf("I10: %d sectors of old data in %s", n, f.Name())
				}
			}
			after := lstat(t, there)
			if after.Ino != before.Ino || after.Mode != before.Mode || after.Size != before.Size || after.Blocks < before.Blocks {
				t.Errorf("the file that was there was %+v and is %+v", before, after)
			}
			for _, f := range append(files, reader) {
				f.Close()
			}
		})
	}
}

// TestStorageThatWasThere: what blksnap's scripts do, and what needs --overwrite.
func TestStorageThatWasThere(t *testing.T) {
	guest.NeedEither(t)
	disk := guest.RAMDisks(t, 1, 8<<20)[0]
	d := program.Start(t)
	dir := guest.SmallFS(t, 64<<20)
	file := func(name string) string { return filepath.Join(dir, name) }
	guest.Run(t, "fallocate", "-l", "8M", file("allocated"))
	guest.Run(t, "truncate", "-s", "8M", file("sparse"))
	for _, name := range []string{"full", "full2"} {
		put(t, file(name), strings.Repeat("content ", 1<<20))
	}
	ours := func(args ...string) program.Answer { return d.Call("ublk-blksnap", args...) }
	theirs := func(args ...string) program.Answer { return d.Call("blksnap", args...) }

	a := theirs("snapshot_create", "-d", disk, "-f", file("allocated"))
	if a.Status != 0 {
		t.Fatalf("%+v", a)
	}
	id := strings.TrimSpace(a.Out)
	for _, c := range []struct {
		answer program.Answer
		says   string // empty: no error
	}{
		{ours("snapshot", "append", id, file("allocated"), "--overwrite"), "another snapshot"},
		{ours("snapshot", "append", id, file("sparse")), ""},
		{ours("snapshot", "append", id, file("full")), "holds data"},
		{ours("snapshot", "append", id, file("full"), "--overwrite"), ""},
		{theirs("snapshot_appendstorage", "-i", id, "-f", file("full2")), ""},
		{theirs("snapshot_take", "-i", id), ""},
		{theirs("snapshot_destroy", "-i", id), ""},
	} {
		if (c.answer.Status == 0) != (c.says == "") || !strings.Contains(c.answer.Err, c.says) {
			t.Errorf("%+v, want %q", c.answer, c.says)
		}
	}
	for _, name := range []string{"allocated", "sparse", "full", "full2"} {
		st := lstat(t, file(name))
		if st.Size != 8<<20 || st.Mode&0o777 != 0o644 || (st.Blocks == 0) != (name == "sparse") {
			t.Errorf("%s is %+v", name, st)
		}
	}
	if a := theirs("detach", "-d", disk); a.Status != 0 {
		t.Errorf("%+v", a)
	}
}

// TestStorageDevice: a block device that holds anything is refused, wherever that
// shows, and so is one of which nobody can tell; but not for who knows better.
func TestStorageDevice(t *testing.T) {
	guest.NeedEither(t)
	const size = 16 << 20
	d := program.Start(t)
	s := d.Create(control.CreateRequest{})
	device := guest.LoopDisk(t, size, 512)
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	use := func(overwrite bool) error {
		_, err := d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: device, Overwrite: overwrite}})
		return err
	}
	squashfs := map[int64]string{0: "hsqs\x00\x00\x00\x00", 28: "\x04\x00\x00\x00"}
	for _, c := range []struct {
		want string
		put  map[int64]string
	}{
		{"squashfs", squashfs},
		{"iso9660", map[int64]string{0x8000: "\x01CD001\x01", 0x8800: "\xffCD001\x01"}},
		{"swsuspend", map[int64]string{4096 - 10: "S1SUSPEND\x00"}},
		{"erofs", map[int64]string{1024: "\xe2\xe1\xf5\xe0", 1024 + 12: "\x0c"}},
		{"crypto_LUKS", map[int64]string{0x4000: "SKUL\xba\xbe\x00\x02", 0x4000 + 0x100: string(binary.BigEndian.AppendUint64(nil, 0x4000))}},
		{"linux_raid_member", map[int64]string{
			size - 8<<10:       "\xfc\x4e\x2b\xa9\x01\x00\x00\x00",
			size - 8<<10 + 144: string(binary.LittleEndian.AppendUint64(nil, (size-8<<10)/512)),
		}},
		{"an xfs filesystem", map[int64]string{0: "XFSB"}}, // damaged
	} {
		for at, text := range c.put {
			if _, err := f.WriteAt([]byte(text), at); err != nil {
				t.Fatal(err)
			}
		}
		program.WantError(t, use(false), control.Busy, "seems to hold "+c.want, "--overwrite")
		for at, text := range c.put {
			if _, err := f.WriteAt(make([]byte, len(text)), at); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Without blkid nobody can tell.
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		blkid = "/usr/sbin/blkid"
	}
	guest.Run(t, "mount", "--bind", "/dev/null", blkid)
	hidden := true
	show := func() {
		if hidden {
			hidden = false
			guest.Run(t, "umount", blkid)
		}
	}
	t.Cleanup(show)
	program.WantError(t, use(false), control.Busy, "cannot tell", "install util-linux", "--overwrite")
	_, err = d.AppendStorage(guest.Context(t), control.StorageRequest{ID: s.ID, Storage: control.Storage{Path: device, OverwriteFile: true}})
	program.WantError(t, err, control.Busy, "cannot tell")
	show()
	for at, text := range squashfs {
		if _, err := f.WriteAt([]byte(text), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := use(true); err != nil {
		t.Errorf("with overwrite: %v", err)
	}
	program.WantError(t, use(true), control.Busy, "mounted or held")
	d.Destroy(s.ID)
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s = d.Create(control.CreateRequest{})
	if err := use(false); err != nil {
		t.Errorf("unused: %v", err)
	}
	d.Destroy(s.ID)
}
