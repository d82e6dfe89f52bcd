package attach

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/dm"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// shapeOf is what the kernel says a device is like to its users.
func shapeOf(t testing.TB, i dm.Info) string {
	t.Helper()
	name := fmt.Sprintf("dm-%d", i.Num.Minor)
	var all []string
	for _, attribute := range []string{"logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "discard_granularity",
		"discard_max_bytes", "write_zeroes_max_bytes", "write_cache", "fua", "rotational", "dma_alignment", "virt_boundary_mask", "stable_writes", "read_ahead_kb", "zoned"} {
		value := guest.QueueLimit(t, name, attribute)
		if strings.HasSuffix(attribute, "_max_bytes") && value != "0" {
			value = "some" // how much at a time is the driver's
		}
		all = append(all, attribute+"="+value)
	}
	for _, attribute := range []string{"size", "ro", "alignment_offset"} {
		b, err := os.ReadFile(filepath.Join("/sys/block", name, attribute))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, attribute+"="+strings.TrimSpace(string(b)))
	}
	return strings.Join(all, "\n")
}

// TestAttachShape: two volumes on a disk of 4096-byte blocks that can trim, one with a name that
// nobody would give it, look to their users as before while they are attached, and afterwards.
// They trim, hold a snapshot, outlive a death of the daemon, and are detached by its stop.
func TestAttachShape(t *testing.T) {
	guest.NeedEither(t)
	c := controlDM(t)
	d := program.Start(t)
	disk := numOf(t, guest.SCSIDisk(t, 64, 4096))
	const half = 28 << 20
	volumes := []dm.Info{
		makeDM(t, c, `odd "name" %s'`, dm.Linear(half, disk)),
		makeDM(t, c, "beside", dm.Table{{Length: half / 512, Type: "linear", Args: fmt.Appendf(nil, "%s %d", disk, half/512)}}),
	}
	guest.Write(t, fmt.Sprintf("/sys/block/dm-%d/queue/read_ahead_kb", volumes[0].Num.Minor), "64")
	var before, dirs []string
	var stops []func()
	var devs []control.Device
	for n, v := range volumes {
		guest.Ext4.Make(t, node(v))
		dirs = append(dirs, guest.Mount(t, node(v)))
		stops = append(stops, busy(t, filepath.Join(dirs[n], "busy")))
		before = append(before, shapeOf(t, v))
	}
	same := func(what string) {
		t.Helper()
		for n, v := range volumes {
			if now := shapeOf(t, v); now != before[n] {
				t.Errorf("%s: %s was\n%s\nis\n%s", what, v.Name, before[n], now)
			}
		}
	}
	d.Refused([]string{"64 letters"}, "add", node(volumes[0]))
	for n, v := range volumes {
		dev, err := d.AddDevice(guest.Context(t), control.AddRequest{Path: node(v), Name: fmt.Sprintf("volume%d", n)})
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, dev)
	}
	same("attached")
	for _, dir := range dirs {
		guest.Run(t, "fstrim", dir)
	}
	if status, err := d.DeviceStatus(guest.Context(t), devs[0].Name); err != nil || status.Operations[control.OpDiscard].Requests == 0 {
		t.Errorf("a trim did not come to the filter: %+v, %v", status.Operations, err)
	}
	// What is stored on one would be copied into the storage of a snapshot of the other.
	_, err := d.CreateSnapshot(guest.Context(t), control.CreateRequest{Devices: []string{devs[1].Name}, Storage: []control.Storage{{Path: dirs[0]}}})
	program.WantError(t, err, control.Busy, "lies on")
	s := d.Take(0, devs...)
	for n, dir := range dirs {
		guest.Run(t, "fstrim", dir)
		guest.Ext4.Check(t, s.Images[n].Path)
	}
	d.Kill()
	d.Restart()
	same("taken over")
	for args, want := range map[string]string{"list": devs[0].Original, "status": devs[0].Original, "status volume0": "attached:"} {
		if a := d.Call("ublk-blksnap", strings.Fields(args)...); a.Status != 0 || !strings.Contains(a.Out, want) {
			t.Errorf("%s: %+v", args, a)
		}
	}
	d.Destroy(s.ID)
	if a := d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 0 {
		t.Errorf("stop: %+v", a)
	}
	d.StopAndWait()
	same("detached")
	nothingLeft(t, c)
	for n, v := range volumes {
		stops[n]()
		guest.Unmount(t, dirs[n])
		guest.Ext4.Check(t, node(v))
	}
}
