package disk

import (
	"os"
	"path/filepath"
	"testing"
)

func TestToBeDetached(t *testing.T) {
	sys := t.TempDir()
	for _, dir := range []string{"loop0/loop/", "loop0/loop0p1/", "loop1/loop/", "sda/"} {
		if err := os.MkdirAll(filepath.Join(sys, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for disk, text := range map[string]string{"loop0": "1\n", "loop1": "0\n"} {
		if err := os.WriteFile(filepath.Join(sys, disk, "loop/autoclear"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for d, want := range map[Disk]bool{
		{sys: "loop0"}: true, {sys: "loop0/loop0p1", Parent: "loop0"}: true, {sys: "loop1"}: false, {sys: "sda"}: false,
	} {
		d.sys = filepath.Join(sys, d.sys)
		if got := new(Host).ToBeDetached(&d); got != want {
			t.Errorf("%s: %v", d.sys, got)
		}
	}
}
