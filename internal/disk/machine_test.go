package disk

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMachineID: each of its sources tells a machine from another, one is enough, and
// what is made up for a boot is none.
func TestMachineID(t *testing.T) {
	place := func(dir, text string) string {
		path := filepath.Join(dir, "id")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var dirs []string
	for range 5 {
		dir, err := os.MkdirTemp("/var/tmp", "machine")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		dirs = append(dirs, dir)
	}
	a, b, none := place(dirs[0], "a\n"), place(dirs[1], "b\n"), filepath.Join(dirs[2], "none")
	u, v := place(dirs[3], "u\n"), place(dirs[4], "v\n")
	for _, c := range []struct {
		one, other [2]string
		differ     bool
	}{
		{[2]string{a, u}, [2]string{a, u}, false}, {[2]string{a, u}, [2]string{a, v}, true}, {[2]string{a, u}, [2]string{b, u}, true},
		{[2]string{a, u}, [2]string{none, u}, false}, {[2]string{a, u}, [2]string{a, none}, false}, {[2]string{a, u}, [2]string{none, v}, true},
		{[2]string{a, none}, [2]string{none, u}, false}, {[2]string{none, none}, [2]string{a, u}, false},
	} {
		one, other := Machine().machineID(c.one[0], c.one[1]), Machine().machineID(c.other[0], c.other[1])
		if OtherMachine(one, other) != c.differ || OtherMachine(other, one) != c.differ {
			t.Errorf("%q and %q of %v: differ should be %v", one, other, c, c.differ)
		}
	}
	if onTmpfs := "/dev/shm"; exists(onTmpfs) {
		f, err := os.CreateTemp(onTmpfs, "machine")
		if err != nil {
			t.Skip("needs a tmpfs: ", err)
		}
		defer os.Remove(f.Name())
		if _, err := f.WriteString("c\n"); err != nil || f.Close() != nil {
			t.Fatal(err)
		}
		if id := Machine().machineID(f.Name(), none); id != "." {
			t.Errorf("made up for this boot: %q", id)
		}
	}
}
