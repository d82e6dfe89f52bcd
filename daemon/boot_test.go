package daemon

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

func TestBootTables(t *testing.T) {
	all, err := parseBootDevices("f", `
queues = 4

[[device]]
name = "data"
path = "/dev/disk/by-id/virtio-data"

# another
  [[ device ]] # here
path = 'PARTUUID="0AB-1"'
name = "part"
queues = 2
queue_depth = 64
mode = "copy"
intent_log = false
intent_log_zone = "4M"
`, false)
	want := []BootDevice{
		{Name: "data", Path: "/dev/disk/by-id/virtio-data", File: "f", Line: 4},
		{Name: "part", Path: "/dev/disk/by-partuuid/0ab-1", Queues: 2, Depth: 64, Mode: control.ModeCopy, IntentLog: new(bool), IntentLogZone: 4 << 20, File: "f", Line: 9},
	}
	if err != nil || !reflect.DeepEqual(all, want) {
		t.Fatalf("%+v, %v\nwant %+v", all, err, want)
	}
	for i, b := range all {
		again, err := parseBootDevices("g", b.text(), true)
		if err != nil || len(again) != 1 {
			t.Fatalf("%s: %v", b.text(), err)
		}
		again[0].File, again[0].Line = b.File, b.Line
		if !reflect.DeepEqual(again[0], want[i]) {
			t.Errorf("written and read again: %+v, want %+v", again[0], want[i])
		}
	}
}

func TestBootTableErrors(t *testing.T) {
	const head = "queues = 1\n[[device]]\nname = \"a\"\n"
	for content, want := range map[string]string{
		"device = 1":               "f:1: device: write it as [[device]]",
		"\n[device]\nname = \"a\"": "f:2: device: write it as [[device]]",
		head:                       "f:2: path: is missing",
		"[[device]]\npath = \"/dev/disk/by-id/a\"":         "f:1: name: is missing",
		head + "path = \"/dev/sdb\"":                       "f:4: path: /dev/sdb may be another disk at the next boot",
		head + "path = \"/dev/disk/by-uuid/x\"":            "f:4: path: /dev/disk/by-uuid/x leads to the filter",
		head + "path = \"UUID=x\"":                         `f:4: path: "UUID=x" is not the path of a disk below /dev`,
		head + "path = \"/dev/disk/by-diskseq/1\"":         "f:4: path: /dev/disk/by-diskseq/1 may be another disk",
		head + "intent_log = 1":                            "f:4: intent_log: neither true nor false",
		head + "intent_log_zone = \"3M\"":                  "f:4: intent_log_zone: 3M is not a power of two",
		head + "path = \"/dev/disk/../sdb\"":               "f:4: path: ",
		head + "path = \"/dev/disk/by-id/*\"":              "f:4: path: ",
		head + "path = \"/dev/disk/by-id/a|b\"":            "f:4: path: ",
		head + "path = '/dev/disk/by-id/a\"'":              "f:4: path: ",
		head + "path = 7":                                  "f:4: path: not a text",
		head + "depth = 7":                                 "f:4: depth: no such key of a [[device]]",
		head + "queues = 0":                                "f:4: queues: 0 is not a whole number from 1 to 256",
		head + "queue_depth = 4097":                        "f:4: queue_depth: 4097 is not a whole number from 1 to 4096",
		head + "mode = \"fast\"":                           "f:4: mode: \"fast\" is not a mode",
		"[[device]]\nname = \"a/b\"\npath=\"/dev/a/b\"":    `f:2: name: "a/b": use up to 64`,
		"[[device]]\nname = \"images\"\npath=\"/dev/a/b\"": `f:2: name: "images"`,
	} {
		if _, err := parseBootDevices("f", content, false); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", content, err, want)
		}
	}
	if _, err := parseBootDevices("f", head, true); err == nil || !strings.HasPrefix(err.Error(), "f:1: queues: here may be [[device]] tables only") {
		t.Errorf("a parameter in the directory: %v", err)
	}
}

// TestBootFiles: a person's file is never touched, and what two files say fits
// together.
func TestBootFiles(t *testing.T) {
	config := filepath.Join(t.TempDir(), "x.conf")
	const mine = "# mine\n[[device]] # this\nname=\"mine\"\npath=\"/dev/vg/mine\"\n"
	if err := os.WriteFile(config, []byte(mine), 0o600); err != nil {
		t.Fatal(err)
	}
	// A dry run says the same, and writes nothing.
	add := func(name, path string) error {
		b := BootDevice{Name: name, Path: path, Queues: 2}
		before, _ := os.ReadDir(DropInDir(config))
		file, checked := CheckBootDevice(config, b)
		if after, _ := os.ReadDir(DropInDir(config)); len(after) != len(before) || file != filepath.Join(DropInDir(config), name+".conf") {
			t.Errorf("a check of %s names %s, and has made %v of %v", name, file, after, before)
		}
		err := AddBootDevice(config, b)
		if fmt.Sprint(checked) != fmt.Sprint(err) {
			t.Errorf("%s: the check said %v, and then came %v", name, checked, err)
		}
		return err
	}
	if err := add("data", "/dev/disk/by-id/data"); err != nil {
		t.Fatal(err)
	}
	if err := add("data", "/dev/disk/by-id/other"); err != nil {
		t.Errorf("another path for the same name: %v", err)
	}
	for what, want := range map[[2]string]string{
		{"mine", "/dev/vg/mine"}:         config + ":2 names the disk already",
		{"mine", "/dev/vg/other"}:        "name: " + config + ":2 has the filter of mine too",
		{"new", "/dev/vg/mine"}:          "path: " + config + ":2 names /dev/vg/mine too",
		{"new", "/dev/disk/by-id/other"}: "path: " + DropInDir(config) + "/data.conf:2 names /dev/disk/by-id/other too",
	} {
		if err := add(what[0], what[1]); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %s", what, err, want)
		}
	}
	c := DefaultConfig()
	if err := c.ReadConfig(config); err != nil || c != DefaultConfig() {
		t.Errorf("%+v, %v", c, err)
	}
	all, err := ReadBootDevices(config)
	if err != nil || len(all) != 2 || all[0].Name != "mine" || all[1].Path != "/dev/disk/by-id/other" || all[1].Queues != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	if err := RemoveBootDevice(config, all[0]); control.CodeOf(err) != control.Denied {
		t.Errorf("a person's table: %v", err)
	}
	b, ok, err := FindBootDevice(config, "data")
	if err != nil || !ok || b != all[1] {
		t.Fatalf("%+v, %v, %v", b, ok, err)
	}
	if err := RemoveBootDevice(config, b); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := FindBootDevice(config, "data"); ok || err != nil {
		t.Errorf("it is there: %v", err)
	}
	if text, err := os.ReadFile(config); err != nil || string(text) != mine {
		t.Errorf("the file is %q, %v", text, err)
	}
	left, err := os.ReadDir(DropInDir(config))
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	// What is wrong in the directory is wrong in the configuration.
	bad := filepath.Join(DropInDir(config), "bad.conf")
	if err := os.WriteFile(bad, []byte("[[device]]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadConfig(config); err == nil || !strings.HasPrefix(err.Error(), bad+":1: ") {
		t.Errorf("%v", err)
	}
}

func TestBootRules(t *testing.T) {
	if text := rulesText(nil); text != "" {
		t.Errorf("without disks: %s", text)
	}
	text := rulesText([]BootDevice{{Name: "a", Path: "/dev/disk/by-id/virtio-a"}, {Name: "b", Path: `/dev/disk/by-partlabel/b\x20b`}})
	const want = "\nENV{DEVTYPE}==\"partition\", IMPORT{parent}=\"UBLK_BLKSNAP_DISK\"\n" +
		"SYMLINK==\"disk/by-id/virtio-a\", ENV{UBLK_BLKSNAP_DISK}=\"a\"\n" +
		"SYMLINK==\"disk/by-partlabel/b\\x20b\", ENV{UBLK_BLKSNAP_DISK}=\"b\"\n" +
		"ENV{UBLK_BLKSNAP_DISK}==\"\", GOTO="
	if !strings.Contains(text, want) {
		t.Errorf("%s\nwant %s", text, want)
	}
}

func TestStateIsMountedLate(t *testing.T) {
	fstab := filepath.Join(t.TempDir(), "fstab")
	if err := os.WriteFile(fstab, []byte("a / ext4 x 0 1\nb /usr ext4 x 0 1\nc /var ext4 x 0 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/var/lib/ublk-blksnap": "/var", "/usr/state": "", "/etc/state": "", "": ""} {
		if got := mountOf(fstab, path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

// TestFstabNamesItself: what has the filter's names too is in order in fstab and crypttab; what is
// the disk's own is not.
func TestFstabNamesItself(t *testing.T) {
	numbers := map[string]disk.Disk{
		"/dev/mapper/vg0-home": {Num: disk.Num{Major: 254}, Name: "dm-0"},
		"/dev/mapper/vg0-var":  {Num: disk.Num{Major: 254, Minor: 1}, Name: "dm-1"},
		"/dev/vdb":             {Num: disk.Num{Major: 253, Minor: 16}, Name: "vdb"},
		"/dev/vdb1":            {Num: disk.Num{Major: 253, Minor: 17}, Name: "vdb1", Parent: "vdb"},
		"/dev/vdc1":            {Num: disk.Num{Major: 253, Minor: 33}, Name: "vdc1", Parent: "vdc"},
	}
	for link, to := range map[string]string{
		"/dev/vg0/home": "/dev/mapper/vg0-home", "/dev/disk/by-id/b": "/dev/vdb", "/dev/disk/by-id/b-part1": "/dev/vdb1",
		"/dev/disk/by-partuuid/b1": "/dev/vdb1", "/dev/disk/by-partuuid/c1": "/dev/vdc1", "/dev/disk/by-partlabel/c": "/dev/vdc1",
		// While a filter stands, it has these links. Otherwise they are the disk's.
		"/dev/disk/by-uuid/home": "/dev/mapper/vg0-home",
	} {
		numbers[link] = numbers[to]
	}
	lookup := func(path string) (*disk.Disk, error) {
		if d, ok := numbers[path]; ok {
			return &d, nil
		}
		return nil, fs.ErrNotExist
	}
	all := []BootDevice{
		{Name: "home", Path: "/dev/mapper/vg0-home"}, {Name: "b", Path: "/dev/disk/by-id/b"}, {Name: "c", Path: "/dev/disk/by-partuuid/c1"},
		{Name: "gone", Path: "/dev/disk/by-id/gone"},
	}
	for _, c := range []struct {
		name string
		want string // after the name; empty: it is in order
	}{
		{"/dev/mapper/vg0-home", "name the UUID there, or /dev/ublk-blksnap/home"},
		{"/dev/vg0/home", "or /dev/ublk-blksnap/home"},
		{"/dev/vdb1", "name the UUID there"},
		{"/dev/disk/by-id/b-part1", "name the UUID there"},
		{"PARTUUID=\"C1\"", "or /dev/ublk-blksnap/c"},
		{"PARTLABEL=c", "or /dev/ublk-blksnap/c"},
		{"ID=b", "or /dev/ublk-blksnap/b"},
		{"/dev/disk/by-id/gone", "or /dev/ublk-blksnap/gone"},
		{"PARTUUID=b1", ""}, {"UUID=home", ""}, {"/dev/disk/by-uuid/home", ""}, {"LABEL=home", ""},
		{"/dev/ublk-blksnap/home", ""}, {"/dev/mapper/vg0-var", ""}, {"/dev/vdx", ""}, {"none", ""}, {"tmpfs", ""}, {"server:/home", ""},
	} {
		for file, lines := range map[string]string{"fstab": "# a comment\n\n%s /home ext4 defaults 0 2\n", "crypttab": "/dev/vg0/home\n\nsafe %s none luks\n"} {
			column := 0
			if file == "crypttab" {
				column = 1
			}
			got := namedItself(file, fmt.Sprintf(lines, c.name), column, all, lookup)
			if c.want == "" {
				if len(got) != 0 {
					t.Errorf("%s in %s: %q", c.name, file, got)
				}
			} else if len(got) != 1 || !strings.HasPrefix(got[0], file+":3 names "+c.name+", which ") || !strings.HasSuffix(got[0], c.want) {
				t.Errorf("%s in %s: %q, want %q", c.name, file, got, c.want)
			}
		}
	}
	if got := namedItself("fstab", "/dev/vg0/home / ext4 defaults 0 1\n", 0, all, lookup); len(got) != 0 {
		t.Errorf("the root filesystem: %q", got)
	}
}
