package disk

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// machine is a machine made of files: sysfs and procfs in a temporary
// directory, device nodes in a map.
type machine struct {
	*Host
	t     *testing.T
	nodes map[string]status
	loops map[string]status   // what loop devices say of their files, by node
	sizes map[string]capacity // of filesystems, by path
}

func newMachine(t *testing.T) *machine {
	dir := t.TempDir()
	m := &machine{t: t, nodes: map[string]status{}, loops: map[string]status{}, sizes: map[string]capacity{}}
	m.Host = &Host{Root: "/", Proc: filepath.Join(dir, "proc"), Sys: filepath.Join(dir, "sys")}
	m.Host.stat = func(path string) (status, error) {
		st, ok := m.nodes[path]
		if !ok {
			return status{}, unix.ENOENT
		}
		return st, nil
	}
	m.Host.loop = func(node string) (status, error) {
		st, ok := m.loops[node]
		if !ok {
			return status{}, unix.ENOENT
		}
		return st, nil
	}
	m.Host.capacity = func(path string) (capacity, error) { return m.sizes[path], nil }
	m.write(m.Proc, "1/mountinfo", "")
	m.link("mnt:[1]", m.Proc, "1/ns/mnt")
	return m
}

func (m *machine) write(dir, path, content string) {
	m.t.Helper()
	p := filepath.Join(dir, path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		m.t.Fatal(err)
	}
	f, err := os.OpenFile(p, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(content); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) link(to, dir, path string) {
	m.t.Helper()
	p := filepath.Join(dir, path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(to, p); err != nil {
		m.t.Fatal(err)
	}
}

// disk makes a whole disk of 1 MiB, or with a parent a partition.
func (m *machine) disk(name, num, parent string) {
	m.t.Helper()
	dir := "devices/" + name
	if parent != "" {
		dir = "devices/" + parent + "/" + name
		m.write(m.Sys, dir+"/partition", "1\n")
	}
	m.write(m.Sys, dir+"/size", "2048\n")
	m.write(m.Sys, dir+"/ro", "0\n")
	m.write(m.Sys, dir+"/dev", num+"\n")
	m.link(filepath.Join(m.Sys, dir), m.Sys, "dev/block/"+num)
	m.link(filepath.Join(m.Sys, dir), m.Sys, "class/block/"+name)
	n, err := ParseNum(num)
	if err != nil {
		m.t.Fatal(err)
	}
	m.nodes["/dev/"+name] = status{mode: unix.S_IFBLK, rdev: n}
}

// set writes an attribute of a disk.
func (m *machine) set(name, attr, value string) {
	m.t.Helper()
	dir, err := filepath.EvalSymlinks(filepath.Join(m.Sys, "class/block", name))
	if err != nil {
		m.t.Fatal(err)
	}
	os.Remove(filepath.Join(dir, attr))
	m.write(dir, attr, value+"\n")
}

// stack puts upper on lower.
func (m *machine) stack(upper, lower string) {
	m.set(lower, "holders/"+upper, "")
	m.set(upper, "slaves/"+lower, "")
}

func (m *machine) mount(pid int, id uint64, num, point, fstype, source, super string) {
	m.write(m.Proc, fmt.Sprintf("%d/mountinfo", pid),
		fmt.Sprintf("%d 1 %s / %s rw,relatime shared:1 - %s %s %s\n", id, num, point, fstype, source, super))
}

func TestLookup(t *testing.T) {
	m := newMachine(t)
	m.disk("vdb", "254:16", "")
	m.disk("vdb1", "254:17", "vdb")
	m.disk("dm-0", "252:0", "")
	m.set("dm-0", "dm/name", "vg-data")
	m.nodes["/dev/disk/by-id/x"] = m.nodes["/dev/vdb"]
	m.nodes["/tmp/file"] = status{mode: unix.S_IFREG}
	m.nodes["/tmp"] = status{mode: unix.S_IFDIR}
	m.nodes["/dev/null"] = status{mode: unix.S_IFCHR}
	m.nodes["vg-data"], m.nodes["vdb1"] = m.nodes["/tmp"], m.nodes["/tmp/file"] // they hide nothing
	m.nodes["/dev/gone"] = status{mode: unix.S_IFBLK, rdev: Num{Major: 9, Minor: 9}}

	for _, c := range []struct{ path, name, parent, title string }{
		{"/dev/vdb", "vdb", "", "vdb"},
		{"/dev/disk/by-id/x", "vdb", "", "vdb"},
		{"vdb", "vdb", "", "vdb"},
		{"/dev/vdb1", "vdb1", "vdb", "vdb1"},
		{"vg-data", "dm-0", "", "vg-data"},
		{"vdb1", "vdb1", "vdb", "vdb1"},
	} {
		d, err := m.Lookup(c.path)
		if err != nil {
			t.Errorf("Lookup(%q): %v", c.path, err)
			continue
		}
		if d.Name != c.name || d.Parent != c.parent || d.DisplayName() != c.title || d.Path != c.path || d.Size != 1<<20 {
			t.Errorf("Lookup(%q) = %+v", c.path, d)
		}
	}
	for _, c := range []struct {
		path string
		kind error
		what string
	}{
		{"", ErrNotFound, "no such device"},
		{"/dev/nothing", ErrNotFound, "no such device"},
		{"nothing", ErrNotFound, "no such device"},
		{"..", ErrNotFound, "no such device"},
		{"/dev/gone", ErrNotFound, "no device behind this node (9:9)"},
		{"/tmp/file", ErrNotBlock, "a regular file, not a block device"},
		{"/tmp", ErrNotBlock, "a directory, not a block device"},
		{"/dev/null", ErrNotBlock, "a character device, not a block device"},
	} {
		_, err := m.Lookup(c.path)
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, c.kind) || e.What != c.what {
			t.Errorf("Lookup(%q): %v, want %v: %s", c.path, err, c.kind, c.what)
		}
	}
}

func TestKnown(t *testing.T) {
	m := newMachine(t)
	m.disk("vdb", "1:3", "")
	m.disk("dm-0", "253:0", "")
	m.set("dm-0", "dm/name", "slow")
	for path, want := range map[string]string{"/dev/vdb": "/dev/vdb", "/dev/dm-0": "/dev/mapper/slow", "slow": "/dev/mapper/slow"} {
		if d, err := m.Lookup(path); err != nil || d.DisplayPath() != want {
			t.Errorf("%s is known as %+v, %v; want %s", path, d, err, want)
		}
	}
}

func TestCheckUsable(t *testing.T) {
	for _, c := range []struct {
		name  string
		setup func(*machine)
		kind  error
		what  string
	}{
		{"free", func(m *machine) {}, nil, ""},
		{"empty", func(m *machine) { m.set("vdb", "size", "0") }, ErrEmpty, "has zero size"},
		{"read-only", func(m *machine) { m.set("vdb", "ro", "1") }, ErrReadOnly, "read-only"},
		{"mounted", func(m *machine) {
			m.mount(1, 30, "254:16", `/mnt/my\040disk`, "ext4", "/dev/vdb", "rw")
		}, ErrInUse, "mounted on /mnt/my disk"},
		{"partition mounted", func(m *machine) {
			m.mount(1, 30, "254:17", "/mnt", "ext4", "/dev/vdb1", "rw")
		}, ErrInUse, "its partition /dev/vdb1 is mounted on /mnt"},
		{"other disk mounted", func(m *machine) {
			m.mount(1, 30, "254:32", "/mnt", "ext4", "/dev/vdc", "rw")
		}, nil, ""},
		{"mounted in another namespace", func(m *machine) {
			m.link("mnt:[2]", m.Proc, "77/ns/mnt")
			m.mount(77, 90, "254:16", "/data", "xfs", "/dev/vdb", "rw")
		}, ErrInUse, "mounted on /data"},
		{"mounted as btrfs", func(m *machine) {
			m.mount(1, 30, "0:40", "/mnt", "btrfs", "/dev/vdb", "rw")
		}, ErrInUse, "mounted on /mnt"},
		{"second device of a btrfs", func(m *machine) {
			m.write(m.Sys, "fs/btrfs/uuid/devices/vdb", "")
		}, ErrInUse, "part of a mounted btrfs filesystem"},
		{"swap", func(m *machine) {
			m.write(m.Proc, "swaps", "Filename Type Size Used Priority\n/dev/vdb partition 1 0 -2\n")
		}, ErrInUse, "used as swap space"},
		{"swap file of that name", func(m *machine) {
			m.write(m.Proc, "swaps", "Filename Type Size Used Priority\n/dev/vdb file 1 0 -2\n")
		}, nil, ""},
		{"volume", func(m *machine) {
			m.disk("dm-0", "252:0", "")
			m.set("dm-0", "dm/name", "vg-data")
			m.set("dm-0", "dm/uuid", "LVM-abc")
			m.stack("dm-0", "vdb1")
		}, ErrInUse, "its partition /dev/vdb1 is held by the logical volume vg-data"},
		{"array", func(m *machine) {
			m.disk("md0", "9:0", "")
			m.set("md0", "md/level", "raid1")
			m.stack("md0", "vdb")
		}, ErrInUse, "a member of the array /dev/md0"},
		{"loop", func(m *machine) {
			m.disk("loop3", "7:3", "")
			m.set("loop3", "loop/backing_file", "/dev/vdb")
		}, ErrInUse, "the backing device of /dev/loop3"},
		{"loop over a file", func(m *machine) {
			m.disk("loop3", "7:3", "")
			m.nodes["/img"] = status{mode: unix.S_IFREG}
			m.set("loop3", "loop/backing_file", "/img")
		}, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			m.disk("vdb", "254:16", "")
			m.disk("vdb1", "254:17", "vdb")
			m.disk("vdc", "254:32", "")
			c.setup(m)
			d, err := m.Lookup("/dev/vdb")
			if err != nil {
				t.Fatal(err)
			}
			err = m.CheckUsable(d)
			if c.kind == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var e *Error
			if !errors.As(err, &e) || !errors.Is(err, c.kind) || e.What != c.what {
				t.Fatalf("got %v, want %s", err, c.what)
			}
			if e.Fix == "" {
				t.Error("the error does not say what to do")
			}
		})
	}
}

// TestOpeners: whoever has the device open or mapped is found, by whatever name.
// A character device of the same number is another, and so is what only bears the
// name.
func TestOpeners(t *testing.T) {
	const maps = "7f00000-7f01000 rw-s 00000000 00:05 9 /dev/vdb\n7f01000-7f02000 rw-p 00000000 00:00 0\n"
	const mapped = "42/map_files/7f00000-7f01000"
	for name, c := range map[string]struct {
		make func(*machine)
		open bool
	}{
		"nobody":           {func(*machine) {}, false},
		"open":             {func(m *machine) { m.link("/dev/vdb", m.Proc, "42/fd/3") }, true},
		"a partition open": {func(m *machine) { m.link("/dev/vdb1", m.Proc, "42/fd/3") }, true},
		"another open":     {func(m *machine) { m.link("/dev/vdc", m.Proc, "42/fd/3") }, false},
		"open by another node": {func(m *machine) {
			m.link("/jail/disk", m.Proc, "42/fd/3")
			m.write(m.Proc, "42/fdinfo/3", "pos:\t0\nmnt_id:\t17\n")
		}, true},
		"on a server that may be dead": {func(m *machine) {
			m.link("/jail/disk", m.Proc, "42/fd/3")
			m.write(m.Proc, "42/fdinfo/3", "pos:\t0\nmnt_id:\t17\n")
			m.mount(42, 17, "0:50", "/jail", "nfs4", "host:/x", "rw")
		}, false},
		"mapped": {func(m *machine) {
			m.write(m.Proc, "42/maps", maps)
			m.link("/dev/vdb", m.Proc, mapped)
		}, true},
		"a character device open": {func(m *machine) { m.link("/dev/null", m.Proc, "42/fd/3") }, false},
		"a character device mapped under the name": {func(m *machine) {
			m.write(m.Proc, "42/maps", maps)
			m.link("/dev/null", m.Proc, mapped)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.disk("vdb", "1:3", "")
			m.disk("vdb1", "1:4", "vdb")
			m.disk("vdc", "1:5", "")
			m.nodes["/jail/disk"] = m.nodes["/dev/vdb"]
			m.nodes["/dev/null"] = status{mode: unix.S_IFCHR, rdev: Num{Major: 1, Minor: 3}}
			m.write(m.Proc, "42/comm", "fio\n")
			c.make(m)
			ps := m.Openers(Num{Major: 1, Minor: 3})
			if c.open != (len(ps) == 1) || len(ps) > 1 || c.open && ps[0].String() != "fio (process 42)" {
				t.Errorf("openers %v", ps)
			}
			// One that has it open and is left out hides nobody who has it mapped.
			m.link("/dev/vdb", m.Proc, "43/fd/3")
			if ps := m.Openers(Num{Major: 1, Minor: 3}, 43); c.open != (len(ps) == 1) || len(ps) > 1 || c.open && ps[0].PID != 42 {
				t.Errorf("openers but 43: %v", ps)
			}
		})
	}
}

func TestRemoteMounts(t *testing.T) {
	m := newMachine(t)
	m.write(m.Proc, "42/mountinfo", `21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:30 / /home rw,relatime shared:5 - nfs4 server:/home rw,vers=4.2
23 21 0:31 / /mnt/u rw - fuse.sshfs host: rw
24 21 0:6 / /dev rw - devtmpfs udev rw
`)
	m.write(m.Proc, "42/fdinfo/3", "pos:\t0\nflags:\t0100000\nmnt_id:\t22\nino:\t7\n")
	if got := remoteMounts(m.Proc + "/42"); !maps.Equal(got, map[string]bool{"22": true, "23": true}) {
		t.Errorf("remote mounts %v", got)
	}
	if id := mountIDOf(m.Proc + "/42/fdinfo/3"); id != "22" {
		t.Errorf("on mount %q", id)
	}
	if id := mountIDOf(m.Proc + "/42/fdinfo/4"); id != "" {
		t.Errorf("a closed file on mount %q", id)
	}
}

func TestSamePartitions(t *testing.T) {
	m := newMachine(t)
	part := func(name, num, parent string, start int) {
		m.disk(name, num, parent)
		m.set(name, "start", fmt.Sprint(start))
	}
	m.disk("vdb", "254:16", "")
	part("vdb1", "254:17", "vdb", 2048)
	m.disk("ublkb0", "259:0", "")
	num := func(n Num) *Disk {
		d, err := m.ByNumber(n)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	vdb, filter := num(Num{Major: 254, Minor: 16}), num(Num{Major: 259, Minor: 0})
	if m.SamePartitions(vdb, filter) {
		t.Error("one partition is like none")
	}
	part("ublkb0p1", "259:1", "ublkb0", 2048)
	if !m.SamePartitions(vdb, filter) {
		t.Error("the same partition is another")
	}
	m.set("ublkb0p1", "start", "4096")
	if m.SamePartitions(vdb, filter) {
		t.Error("a partition that lies elsewhere is the same")
	}
}

// liesOnPath is LiesOn for a path; what is not there yet lies where its directory
// does.
func (m *machine) liesOnPath(path string, target Num, below func(Num) []Num) (bool, error) {
	st, err := m.statPath(path)
	if errors.Is(err, unix.ENOENT) {
		path = filepath.Dir(path)
		st, err = m.statPath(path)
	}
	if err != nil {
		return false, err
	}
	return m.liesOn(path, st, target, below)
}

// TestLiesOn builds one machine with every kind of stack over vdb.
func TestLiesOn(t *testing.T) {
	m := newMachine(t)
	m.disk("vdb", "254:16", "")
	m.disk("vdb1", "254:17", "vdb")
	m.disk("vdb2", "254:18", "vdb")
	m.disk("vdc", "254:32", "")
	m.disk("dm-0", "252:0", "")
	m.stack("dm-0", "vdb1")
	m.disk("md0", "9:0", "")
	m.stack("md0", "vdc")
	m.stack("md0", "dm-0")
	m.disk("loop0", "7:0", "")
	m.set("loop0", "loop/backing_file", "/on-dm/img")
	m.disk("loop1", "7:1", "")
	m.set("loop1", "loop/backing_file", "/on-dm/unlinked (deleted)")
	m.disk("loop2", "7:2", "")
	m.set("loop2", "loop/backing_file", "/dev/loop0")
	m.disk("ublkb0", "259:0", "")
	m.disk("ublkb0p1", "259:1", "ublkb0")
	file := func(path, dev string, mount uint64) {
		n, err := ParseNum(dev)
		if err != nil {
			t.Fatal(err)
		}
		m.nodes[path] = status{mode: unix.S_IFREG, dev: n, mount: mount}
	}
	file("/on-dm", "252:0", 50)
	file("/on-dm/img", "252:0", 50)
	file("/on-vdc/f", "254:32", 51)
	file("/run/f", "0:20", 52)
	m.mount(1, 52, "0:20", "/run", "tmpfs", "tmpfs", "rw")
	file("/btrfs/sub/f", "0:99", 53) // the number of a subvolume, in no mount
	m.mount(1, 53, "0:41", "/btrfs", "btrfs", "/dev/vdc", "rw")
	m.write(m.Sys, "fs/btrfs/uuid/devices/vdc", "")
	m.write(m.Sys, "fs/btrfs/uuid/devices/loop2", "")
	file("/merged/f", "0:60", 54)
	m.mount(1, 54, "0:60", "/merged", "overlay", "overlay", "rw,lowerdir=/run,upperdir=/on-dm,workdir=/w")
	file("/pool/f", "0:70", 55)
	m.mount(1, 55, "0:70", "/pool", "zfs", "tank/data", "rw")
	file("/lost/f", "0:80", 56)
	file("/on-filter/f", "259:1", 57)

	below := func(n Num) []Num {
		if n == (Num{Major: 259, Minor: 0}) {
			return []Num{{Major: 254, Minor: 18}}
		}
		return nil
	}
	vdb, vdb1, vdb2, vdc := Num{Major: 254, Minor: 16}, Num{Major: 254, Minor: 17}, Num{Major: 254, Minor: 18}, Num{Major: 254, Minor: 32}
	for _, c := range []struct {
		path   string
		target Num
		want   bool
	}{
		{"/dev/vdb", vdb, true},
		{"/dev/vdb1", vdb, true},
		{"/dev/vdb", vdb1, true},
		{"/dev/vdb2", vdb1, false},
		{"/dev/vdc", vdb, false},
		{"/dev/dm-0", vdb, true},
		{"/dev/dm-0", vdb2, false},
		{"/dev/md0", vdb1, true},
		{"/dev/md0", vdc, true},
		{"/on-dm/img", vdb, true},
		{"/on-dm/img", vdc, false},
		{"/on-vdc/f", vdb, false},
		{"/dev/loop0", vdb1, true},
		{"/dev/loop1", vdb1, true},
		{"/dev/loop2", vdb, true},
		{"/dev/loop2", vdb2, false},
		{"/run/f", vdb, false},
		{"/btrfs/sub/f", vdc, true},
		{"/btrfs/sub/f", vdb1, true},
		{"/btrfs/sub/f", vdb2, false},
		{"/merged/f", vdb1, true},
		{"/merged/f", vdc, false},
		{"/on-filter/f", vdb2, true},
		{"/on-filter/f", vdb, true},
		{"/on-filter/f", vdb1, false},
	} {
		got, err := m.liesOnPath(c.path, c.target, below)
		if err != nil || got != c.want {
			t.Errorf("LiesOn(%s, %v) = %v, %v; want %v", c.path, c.target, got, err, c.want)
		}
	}
	m.mount(1, 50, "252:0", "/on-dm", "ext4", "/dev/dm-0", "rw")
	m.mount(1, 58, "252:0", "/again", "ext4", "/dev/dm-0", "rw")
	m.mount(1, 51, "254:32", "/on-vdc", "ext4", "/dev/vdc", "rw")
	m.mount(1, 59, "7:0", "/in-a-file", "ext4", "/dev/loop0", "rw")
	var points []string
	for _, x := range m.MountsOver(vdb, below) {
		points = append(points, x.Point)
	}
	if got := strings.Join(points, " "); got != "/in-a-file /on-dm /btrfs" {
		t.Errorf("mounts over vdb: %s", got)
	}
	for path, want := range map[string]error{"/pool/f": ErrUnknown, "/no/such/file": unix.ENOENT} {
		if on, err := m.liesOnPath(path, vdb, below); on || !errors.Is(err, want) {
			t.Errorf("LiesOn(%s): %v, %v, want %v", path, on, err, want)
		}
	}
	// No mount shows it: it may be any that is mounted.
	for target, want := range map[Num]bool{vdb: true, vdb2: false} {
		if on, err := m.liesOnPath("/lost/f", target, nil); on != want || !errors.Is(err, ErrUnknown) {
			t.Errorf("LiesOn(/lost/f, %v): %v, %v, want %v, %v", target, on, err, want, ErrUnknown)
		}
	}
}

// TestLiesOnHidden has loop devices over files whose names lead elsewhere, or
// nowhere.
func TestLiesOnHidden(t *testing.T) {
	m := newMachine(t)
	m.disk("vdb", "254:16", "")
	m.disk("vdc", "254:32", "")
	vdb, vdc := Num{Major: 254, Minor: 16}, Num{Major: 254, Minor: 32}
	m.mount(1, 50, "254:16", "/data", "ext4", "/dev/vdb", "rw")
	m.mount(1, 51, "0:30", "/data", "tmpfs", "tmpfs", "rw")
	m.nodes["/data"] = status{mode: unix.S_IFDIR, dev: Num{Major: 0, Minor: 30}, mount: 51}
	m.link("mnt:[2]", m.Proc, "77/ns/mnt")
	m.mount(77, 90, "0:41", "/b", "btrfs", "/dev/vdc", "rw")
	m.write(m.Sys, "fs/btrfs/uuid/devices/vdc", "")
	m.nodes["/b/there"] = status{mode: unix.S_IFREG, dev: Num{Major: 0, Minor: 43}, ino: 8, mount: 90}
	for i, c := range []struct {
		what string
		name string
		st   status
		on   map[Num]bool
		err  error
	}{
		{"mounted over", "/data/img", status{mode: unix.S_IFREG, dev: vdb}, map[Num]bool{vdb: true, vdc: false}, nil},
		{"a node of another name", "/nodes/x", status{mode: unix.S_IFBLK, dev: Num{Major: 0, Minor: 6}, rdev: vdc}, map[Num]bool{vdb: false, vdc: true}, nil},
		{"another namespace", "/b/img", status{mode: unix.S_IFREG, dev: Num{Major: 0, Minor: 41}}, map[Num]bool{vdb: false, vdc: true}, nil},
		{"its subvolume", "/b/there", status{mode: unix.S_IFREG, dev: Num{Major: 0, Minor: 43}, ino: 8}, map[Num]bool{vdb: false, vdc: true}, nil},
		{"its subvolume, by another name", "/b/away", status{mode: unix.S_IFREG, dev: Num{Major: 0, Minor: 44}, ino: 8}, map[Num]bool{vdc: true}, ErrUnknown},
	} {
		loop := fmt.Sprintf("loop%d", i)
		m.disk(loop, fmt.Sprintf("7:%d", i), "")
		m.set(loop, "loop/backing_file", c.name)
		m.loops["/dev/"+loop] = c.st
		for target, want := range c.on {
			if on, err := m.liesOnPath("/dev/"+loop, target, nil); on != want || !errors.Is(err, c.err) {
				t.Errorf("%s on %v: %v, %v; want %v, %v", c.what, target, on, err, want, c.err)
			}
		}
	}
	d, err := m.ByNumber(vdc)
	if err != nil {
		t.Fatal(err)
	}
	if loop := m.loopOver(d); loop != "loop1" {
		t.Errorf("over vdc: %q", loop)
	}
}

// TestLiesOnOverlay has an overlay whose upper directory cannot be seen by its
// name, as on a live system.
func TestLiesOnOverlay(t *testing.T) {
	vdb := Num{Major: 254, Minor: 16}
	ours, others := capacity{4096, 1000}, capacity{4096, 2000}
	for _, c := range []struct {
		what  string
		setup func(*machine)
		on    bool
		err   error
	}{
		{"nothing on the disk", func(m *machine) {}, false, ErrUnknown},
		{"another filesystem on the disk", func(m *machine) {
			m.mount(1, 51, "254:16", "/mnt", "ext4", "/dev/vdb", "rw")
			m.sizes["/mnt"] = others
		}, false, ErrUnknown},
		{"perhaps the one on the disk", func(m *machine) {
			m.mount(1, 51, "254:16", "/mnt", "ext4", "/dev/vdb", "rw")
			m.sizes["/mnt"] = ours
		}, true, ErrUnknown},
		{"one on the disk that nobody sees", func(m *machine) {
			m.write(m.Sys, "fs/ext4/vdb/delayed_allocation_blocks", "0")
		}, true, ErrUnknown},
		{"another directory of that name", func(m *machine) {
			m.nodes["/rw/upper"] = status{mode: unix.S_IFDIR, dev: vdb, mount: 52}
			m.sizes["/rw/upper"] = others
		}, false, ErrUnknown},
		{"a directory of that name on the overlay", func(m *machine) {
			m.nodes["/rw/upper"] = status{mode: unix.S_IFDIR, dev: Num{Major: 0, Minor: 26}, mount: 50}
			m.sizes["/rw/upper"] = ours
		}, false, ErrUnknown},
		{"to be seen", func(m *machine) {
			m.nodes["/rw/upper"] = status{mode: unix.S_IFDIR, dev: vdb, mount: 52}
			m.sizes["/rw/upper"] = ours
		}, true, nil},
	} {
		m := newMachine(t)
		m.disk("vdb", "254:16", "")
		m.mount(1, 50, "0:26", "/", "overlay", "root", "rw,lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work")
		m.nodes["/var/tmp"] = status{mode: unix.S_IFDIR, dev: Num{Major: 0, Minor: 26}, mount: 50}
		m.sizes["/"] = ours
		c.setup(m)
		if on, err := m.liesOnPath("/var/tmp", vdb, nil); on != c.on || !errors.Is(err, c.err) {
			t.Errorf("%s: %v, %v; want %v, %v", c.what, on, err, c.on, c.err)
		}
	}
}

// TestAsk: what hangs is asked once, holds up nothing else, and may be asked
// again when it has ended.
func TestAsk(t *testing.T) {
	answer, late := make(chan int), make(chan int, 1)
	get := func() int { return <-answer }
	keep := func(x int) { late <- x }
	if _, err := ask(time.Now(), "a server", get, keep); !errors.Is(err, ErrNoAnswer) {
		t.Fatal(err)
	}
	if _, err := ask(time.Now().Add(time.Hour), "a server", get, keep); !errors.Is(err, ErrNoAnswer) {
		t.Fatal(err)
	}
	if x, err := ask(time.Now().Add(time.Hour), "another", func() int { return 2 }, keep); x != 2 || err != nil {
		t.Fatal(x, err)
	}
	answer <- 3
	if x := <-late; x != 3 {
		t.Errorf("taken back: %d", x)
	}
	for {
		x, err := ask(time.Now().Add(time.Hour), "a server", func() int { return 4 }, keep)
		if err == nil && x == 4 {
			break
		}
		if !errors.Is(err, ErrNoAnswer) {
			t.Fatal(x, err)
		}
	}
}

// TestOpenInRoot checks that a symbolic link below Root does not lead out of it.
func TestOpenInRoot(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("inside"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/file", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	h := &Host{Root: dir}
	f, err := h.Open("/link", os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 16)
	n, _ := f.Read(b)
	if string(b[:n]) != "inside" {
		t.Fatalf("read %q", b[:n])
	}
	if _, err := h.Open("/none", os.O_RDONLY, 0); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// TestOpenMount checks that what is opened is the filesystem meant, not another
// one that was mounted over it.
func TestOpenMount(t *testing.T) {
	h := Machine()
	i := slices.IndexFunc(h.Mounts(), func(m Mount) bool { return m.Point == "/proc" })
	if i < 0 {
		t.Skip("no mount of /proc to be seen: run it where procfs is mounted")
	}
	m := h.Mounts()[i]
	m.PID = 1
	f, err := h.OpenMount(m)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	m.ID, m.Num = m.ID+1_000_000, Num{Major: 254, Minor: 1}
	if f, err := h.OpenMount(m); !errors.Is(err, ErrUnknown) {
		if err == nil {
			f.Close()
		}
		t.Errorf("a hidden mount was opened: %v", err)
	}
}

// FuzzParseMount: no line breaks it, and what the kernel writes comes back as it
// is, whatever the mount point is called.
func FuzzParseMount(f *testing.F) {
	f.Add(`36 35 98:0 / /mnt\040x rw - ext4 /dev/vdb rw`, "mnt x", "/dev/vdb")
	f.Add(`36 35 98:0 / /mnt rw master:1 shared:2 - ext4 \134`, "a - b", `\040`)
	f.Add("1 2 3", "no\u00a0break", "a\tb\nc\v\f\rd")
	// seq_file's mangling: fs/proc_namespace.c.
	kernel := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`, "#", `\043`)
	f.Fuzz(func(t *testing.T, line, point, source string) {
		if m, ok := parseMount(line); ok && (m.FSType == "" || m.Point == "" || strings.Contains(m.FSType+m.Super, " ")) {
			t.Errorf("%q gave %+v", line, m)
		}
		point = "/" + point
		line = fmt.Sprintf("36 35 98:7 / %s rw,relatime master:1 shared:2 - ext4 %s rw,errors=x", kernel.Replace(point), kernel.Replace(source))
		want := Mount{ID: 36, Num: Num{Major: 98, Minor: 7}, Point: point, FSType: "ext4", Source: source, Super: "rw,errors=x"}
		if m, ok := parseMount(line); !ok || m != want {
			t.Errorf("%q gave %+v, want %+v", line, m, want)
		}
	})
}
