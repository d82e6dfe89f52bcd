package daemon

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// startUdev runs udev with our rules until the test ends.
func startUdev(t *testing.T) {
	t.Helper()
	guest.Need(t)
	if _, err := os.Stat("/run/udev/control"); err == nil {
		t.Cleanup(func() { guest.Run(t, "udevadm", "control", "--reload") })
	} else {
		udevd := "/lib/systemd/systemd-udevd"
		if _, err := os.Stat(udevd); err != nil {
			t.Fatalf("%v: install udev", err)
		}
		guest.Run(t, udevd, "--daemon", "--resolve-names=never")
		t.Cleanup(func() {
			guest.Run(t, "udevadm", "control", "--exit")
			os.RemoveAll("/run/udev")
		})
	}
	rules, err := os.ReadFile(guest.TreeFile(t, "dist/59-ublk-blksnap.rules"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/udev/rules.d", 0o755); err != nil {
		t.Fatal(err)
	}
	place := "/run/udev/rules.d/59-ublk-blksnap.rules"
	if err := os.WriteFile(place, rules, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(place) })
	guest.Run(t, "udevadm", "control", "--reload")
}

// TestUdev: the links by-uuid lead to the filter while there is one, never to an
// image, and other programs are kept away from images and originals. udev makes
// our own links as well, but for a daemon whose run directory its rules do not
// know.
func TestUdev(t *testing.T) {
	guest.NeedEither(t)
	startUdev(t)
	const uuid = "7b268516-3b6a-4bfd-8a17-3e7eb26ed9bb"
	disk := guest.LoopDisk(t, 64<<20, 512)
	guest.Run(t, "mkfs.ext4", "-q", "-U", uuid, "-L", "udevtest", disk)
	guest.Run(t, "udevadm", "trigger", "--settle", disk)

	// The rules know the usual run directory only.
	const dir = "/run/ublk-blksnap"
	ours := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(program.Path(t), append([]string{"--run-dir", dir}, args...)...).Output()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		guest.Run(t, "udevadm", "settle")
		return strings.TrimSpace(string(out))
	}
	t.Cleanup(func() {
		exec.Command(program.Path(t), "--run-dir", dir, "remove", "--force", disk).Run()
		if pid := pidOf(t, dir); alive(pid) {
			unix.Kill(pid, unix.SIGTERM)
			guest.WaitFor(t, "the end of the daemon", func() bool { return !alive(pid) })
		}
		unix.Unmount(filepath.Join(dir, "state"), unix.MNT_DETACH)
		os.RemoveAll(dir)
	})
	leads := func(to string) {
		t.Helper()
		for _, link := range []string{"/dev/disk/by-uuid/" + uuid, "/dev/disk/by-label/udevtest"} {
			if got, err := filepath.EvalSymlinks(link); err != nil || got != to {
				t.Errorf("%s leads to %s, %v; want %s", link, got, err, to)
			}
		}
	}
	has := func(dev string, yes bool, properties ...string) {
		t.Helper()
		info := guest.Run(t, "udevadm", "info", "--query=property", dev)
		for _, p := range properties {
			if strings.Contains(info, p+"\n") != yes {
				t.Errorf("%s: %s should be there: %v\n%s", dev, p, yes, info)
			}
		}
	}
	away := []string{"UDISKS_IGNORE=1", "SYSTEMD_READY=0", "DM_UDEV_DISABLE_OTHER_RULES_FLAG=1", "DM_MULTIPATH_DEVICE_PATH=0"}

	linked := func(dev, link string) {
		t.Helper()
		if links := strings.Fields(guest.Run(t, "udevadm", "info", "--query=symlink", dev)); !slices.Contains(links, strings.TrimPrefix(link, "/dev/")) {
			t.Errorf("udev has given %s %q, not %s", dev, links, link)
		}
	}

	_, other := fresh(t)
	if a := other("add", disk); a.Status != 0 {
		t.Errorf("%+v", a)
	} else if to, err := filepath.EvalSymlinks(strings.TrimSpace(a.Out)); err != nil || !strings.HasPrefix(to, "/dev/ublkb") {
		t.Errorf("the link leads to %s, %v", to, err)
	}
	if a := other("daemon", "stop"); a.Status != 0 {
		t.Fatalf("%+v", a)
	}
	guest.Run(t, "udevadm", "settle")

	leads(disk)
	has(disk, false, away...)
	link := ours("add", disk, "--name", "udevtest")
	linked(link, link)
	filter, err := filepath.EvalSymlinks(link)
	if err != nil {
		t.Fatal(err)
	}
	leads(filter)
	has(disk, true, append(away, "UBLK_BLKSNAP_KIND=original")...)
	has(filter, true, "UBLK_BLKSNAP_KIND=filter", "UBLK_BLKSNAP_NAME=udevtest", "ID_FS_UUID="+uuid)
	has(filter, false, away...)

	for _, name := range []string{"", "u.d_e-v+Snap"} {
		imageLink := ours("snapshot", "create", "udevtest", "--storage", "/dev/shm", "--limit", "20M", "--take", "--name="+name)
		if want := "/dev/ublk-blksnap/images/" + name + "/udevtest"; name != "" && imageLink != want {
			t.Errorf("the image is %s, not %s", imageLink, want)
		}
		image, err := filepath.EvalSymlinks(imageLink)
		if err != nil {
			t.Fatal(err)
		}
		leads(filter)
		linked(image, imageLink)
		has(image, true, append(away, "UBLK_BLKSNAP_KIND=image")...)
		has(image, false, "ID_FS_UUID="+uuid)
		ours("snapshot", "destroy", "latest")
	}

	ours("remove", "udevtest")
	leads(disk)
	has(disk, false, append(away, "UBLK_BLKSNAP_KIND=original")...)
	notes, err := os.ReadDir(filepath.Join(dir, "udev"))
	if err != nil || len(notes) != 0 {
		t.Errorf("notes left for udev: %v, %v", notes, err)
	}
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}
	// udev looks at every device that comes; adding and removing bears that, with
	// any name that a device can have.
	const name = "u.d_e-v+Test"
	for range 5 {
		linked(ours("add", disk, "--name", name), "/dev/ublk-blksnap/"+name)
		if out, err := exec.Command(program.Path(t), "--run-dir", dir, "remove", name).CombinedOutput(); err != nil {
			t.Fatalf("remove: %v: %s", err, out)
		}
	}
}
