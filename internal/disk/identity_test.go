package disk

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func (m *machine) identity(name string) (Identity, error) {
	m.t.Helper()
	d, err := m.Lookup(name)
	if err != nil {
		m.t.Fatal(err)
	}
	return m.Identify(d)
}

func TestIdentify(t *testing.T) {
	m := newMachine(t)
	m.disk("sda", "8:0", "")
	m.set("sda", "device/wwid", "naa.5000 c500")
	m.set("sda", "device/model", "Drive  X")
	m.disk("sda1", "8:1", "sda")
	m.set("sda1", "start", "2048")
	m.set("sda1", "uevent", "DEVNAME=sda1\nPARTUUID=1234-01")
	m.disk("vda", "254:0", "")
	m.set("vda", "serial", "disk-a")
	m.disk("loop0", "7:0", "")
	m.set("loop0", "loop/backing_file", "/img")
	m.set("loop0", "loop/offset", "0")
	m.set("loop0", "loop/sizelimit", "0")
	m.loops["/dev/loop0"] = status{ino: 5}
	m.disk("dm-0", "252:0", "")
	m.set("dm-0", "dm/uuid", "LVM-x")
	m.stack("dm-0", "sda1")
	m.stack("dm-0", "vda")
	m.disk("dm-1", "252:1", "")
	m.set("dm-1", "dm/uuid", "")
	m.stack("dm-1", "vda")
	for name, num := range map[string]string{"pci0000:00/0000:00:05.0/virtio3/block/vdb": "254:16", "virtual/block/zram0": "251:0"} {
		dir := filepath.Join("devices", name)
		m.write(m.Sys, dir+"/size", "2048\n")
		m.write(m.Sys, dir+"/dev", num+"\n")
		m.link(filepath.Join(m.Sys, dir), m.Sys, "dev/block/"+num)
		m.link(filepath.Join(m.Sys, dir), m.Sys, "class/block/"+filepath.Base(name))
		n, _ := ParseNum(num)
		m.nodes["/dev/"+filepath.Base(name)] = status{mode: unix.S_IFBLK, rdev: n}
	}

	for name, want := range map[string]Identity{
		"sda":   {"wwid=naa.5000 c500", "model=Drive X"},
		"sda1":  {"wwid=naa.5000 c500", "model=Drive X", "partition=1", "start=2048", "size=2048", "partuuid=1234-01"},
		"vda":   {"serial=disk-a"},
		"vdb":   {"path=pci0000:00/0000:00:05.0"},
		"loop0": {"loop=/img", "inode=5", "offset=0", "limit=0"},
		"dm-0":  {"dm=LVM-x", "on=serial=disk-a", "on=wwid=naa.5000 c500;model=Drive X;partition=1;start=2048;size=2048;partuuid=1234-01"},
	} {
		if got, err := m.identity(name); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v\nwant %q", name, got, err, want)
		}
	}
	for _, name := range []string{"dm-1", "zram0"} {
		if got, err := m.identity(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	m.disk("vdc", "254:32", "")
	m.set("vdc", "serial", "disk-a")
	m.disk("vda1", "254:1", "vda")
	m.set("vda1", "start", "2048")
	for name, want := range map[string]Identity{
		"vda":  {"serial=disk-a"},
		"vdc":  {"serial=disk-a"},
		"vda1": {"serial=disk-a", "partition=1", "start=2048", "size=2048"},
		"dm-0": {"dm=LVM-x", "on=serial=disk-a", "on=wwid=naa.5000 c500;model=Drive X;partition=1;start=2048;size=2048;partuuid=1234-01"},
	} {
		if got, err := m.identity(name); !errors.Is(err, ErrUnknown) || !slices.Equal(got, want) {
			t.Errorf("%s, of which there are two: %q, %v\nwant %q", name, got, err, want)
		}
	}
	// Two paths to one disk are one disk.
	m.disk("dm-2", "252:2", "")
	m.set("dm-2", "dm/uuid", "mpath-a")
	m.stack("dm-2", "vda")
	m.stack("dm-2", "vdc")
	if got, err := m.identity("dm-2"); err != nil || !slices.Equal(got, Identity{"dm=mpath-a", "on=serial=disk-a"}) {
		t.Errorf("two paths: %q, %v", got, err)
	}
}

func TestCountWrites(t *testing.T) {
	m := newMachine(t)
	m.disk("sda", "8:0", "")
	m.disk("sda1", "8:1", "sda")
	m.disk("sda2", "8:2", "sda")
	m.set("sda", "queue/iostats", "1")
	m.set("sda", "diskseq", "9")
	stat := func(name string, writes, sectors, discards, discarded int) {
		m.set(name, "stat", fmt.Sprintf("  5 0 40 3 %d 0 %d 7 0 1 1 %d 0 %d 0 11 0", writes, sectors, discards, discarded))
	}
	stat("sda", 100, 1000, 10, 500)
	stat("sda1", 30, 300, 4, 100)
	stat("sda2", 60, 650, 5, 350)
	count := func(name string) (Writes, error) {
		d, err := m.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		return m.CountWrites(d)
	}
	if w, err := count("sda"); err != nil || w != (Writes{Attached: 9, Own: [4]uint64{100, 1000, 10, 500}}) {
		t.Errorf("whole disk: %+v, %v", w, err)
	}
	before, err := count("sda1")
	if err != nil || before != (Writes{Attached: 9, Own: [4]uint64{30, 300, 4, 100}, WholeDisk: [4]uint64{10, 50, 1, 50}}) {
		t.Errorf("partition: %+v, %v", before, err)
	}
	m.set("sda", "removable", "1")
	if w, err := count("sda1"); err != nil || !w.Carried {
		t.Errorf("of a drive whose medium is another by now: %+v, %v", w, err)
	}
	m.set("sda", "removable", "0")
	// Writes to its neighbour are not its own, writes to the whole disk may be.
	stat("sda", 101, 1010, 10, 500)
	stat("sda2", 61, 660, 5, 350)
	if w, err := count("sda1"); err != nil || w != before {
		t.Errorf("after a write to the neighbour: %+v, %v", w, err)
	}
	stat("sda", 102, 1020, 10, 500)
	if w, err := count("sda1"); err != nil || w == before {
		t.Errorf("after a write to the whole disk: %+v, %v", w, err)
	}
	m.set("sda", "queue/iostats", "0")
	if _, err := count("sda"); err == nil {
		t.Error("counters that do not count")
	}
}
