package attach

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestAttachRemovedStays: a volume in use that the configuration names is attached when the daemon
// starts. Removed on purpose, its filter stays away, while other disks get theirs.
func TestAttachRemovedStays(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	d.StopAndWait()
	guest.Run(t, "modprobe", "dm-mod")
	volume := guest.DMDisk(t, "vgb-data", guest.LinearTable(t, guest.LoopDisk(t, 24<<20, 512)))
	guest.Ext4.Make(t, volume)
	dir := guest.Mount(t, volume)
	config := filepath.Join(t.TempDir(), "conf")
	text := "state_size = \"512M\"\nstate_dir = \"\"\nguard = false\n"
	for _, name := range []string{"data", "later"} { // they are looked at in this order
		text += fmt.Sprintf("[[device]]\nname = %q\npath = \"/dev/mapper/vgb-%[1]s\"\n", name)
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.With("--config", config)
	d.Restart()
	if !goesThroughFilter(t, volume) {
		t.Fatalf("it is not attached: table %s", tableOf(t, volume))
	}
	blksnap(t, d, "detach", "-d", volume)

	guest.DMDisk(t, "vgb-later", guest.LinearTable(t, guest.LoopDisk(t, 8<<20, 512)))
	named := map[string]bool{}
	guest.WaitFor(t, "the filter of a disk that has come later", func() bool {
		all, err := d.Devices(guest.Context(t))
		for _, dev := range all {
			named[dev.Name] = true
		}
		return err == nil && named["later"]
	})
	if named["data"] || goesThroughFilter(t, volume) {
		t.Errorf("a filter that was removed has come back: %v; table %s", named, tableOf(t, volume))
	}
	d.StopAndWait()
	nothingLeft(t, c)
	guest.Unmount(t, dir)
	guest.Ext4.Check(t, volume)
}
