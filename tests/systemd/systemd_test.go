// Package systemd tests the unit and the udev rules, as the package puts them, under
// a real systemd: make systemd. It is the rpm, whose scripts run here too, though the
// system is Debian. make boot installs the deb.
package systemd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is how long a test waits for what has to come. It says that something
// hangs, and never how long something may take.
const patience = 3 * time.Minute

const (
	unit   = "ublk-blksnap.service"
	disk   = "/dev/disk/by-vm/data"
	link   = "/dev/ublk-blksnap/data"
	device = `dev-ublk\x2dblksnap-data.device`
)

// reloaded is when the daemon's process was last taken over by another program.
func reloaded(t *testing.T) time.Time {
	t.Helper()
	var status struct {
		Daemon struct {
			Reloaded *struct{ At time.Time }
		}
	}
	if err := json.Unmarshal([]byte(run(t, "ublk-blksnap", "status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if status.Daemon.Reloaded == nil {
		return time.Time{}
	}
	return status.Daemon.Reloaded.At
}

// try runs a command and returns what it printed, on both outputs, and its status.
func try(t *testing.T, name string, args ...string) (said string, status int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return string(out), exit.ExitCode()
	}
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), 0
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, status := try(t, name, args...)
	if status != 0 {
		t.Fatalf("%s %s: status %d: %s", name, strings.Join(args, " "), status, out)
	}
	return strings.TrimSpace(out)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func property(t *testing.T, name string) string {
	t.Helper()
	return run(t, "systemctl", "show", "--property", name, "--value", unit)
}

// entry is a line of the journal.
type entry struct {
	Message  string `json:"MESSAGE"`
	Priority string `json:"PRIORITY"`
	Comm     string `json:"_COMM"`
}

// journal is what a unit has said.
func journal(t *testing.T, unit string) []entry {
	t.Helper()
	run(t, "journalctl", "--sync")
	var all []entry
	for d := json.NewDecoder(strings.NewReader(run(t, "journalctl", "-u", unit, "-o", "json", "_TRANSPORT=stdout"))); d.More(); {
		var e entry
		if err := d.Decode(&e); err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

func said(t *testing.T, all []entry, priority, text string) {
	t.Helper()
	for _, e := range all {
		if strings.Contains(e.Message, text) {
			if e.Priority != priority {
				t.Errorf("priority %s, want %s: %s", e.Priority, priority, e.Message)
			}
			return
		}
	}
	t.Errorf("the journal does not say %q: %v", text, all)
}

// packages are those of a version.
func packages(version string) []string {
	found, _ := filepath.Glob("../../.cache/test/rpm/" + version + "/*.rpm")
	return found
}

// rpm installs, upgrades or removes packages. What they depend on is here as Debian's.
func rpm(t *testing.T, verb string, packages ...string) string {
	t.Helper()
	return run(t, "rpm", append([]string{verb, "--nodeps", "--force-debian"}, packages...)...)
}

// TestUnit is the life of a filter that fstab names, from the start of the unit to
// the end of the machine. What that makes of the disk is looked at by the script
// that it leaves.
func TestUnit(t *testing.T) {
	if comm, _ := os.ReadFile("/proc/1/comm"); os.Getenv("UBLK_BLKSNAP_VM") != "1" || string(comm) != "systemd\n" {
		t.Skip("needs a machine of its own with systemd: make systemd")
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("journalctl", "-b", "-n", "100", "-o", "short-monotonic").CombinedOutput()
			t.Logf("the journal:\n%s", out)
		}
	})
	rpm(t, "-i", packages("now")...)
	run(t, "mkfs.ext4", "-q", disk)
	write(t, "/etc/systemd/system/"+unit+".d/override.conf", "[Service]\nWatchdogSec=10\nTimeoutStopSec=5\n")
	write(t, "/etc/ublk-blksnap.d/data.conf", "[[device]]\nname = \"data\"\npath = \"/dev/disk/by-id/virtio-data\"\n")
	write(t, "/etc/fstab", link+" /srv ext4 x-systemd.requires="+unit+" 0 2\n")
	run(t, "systemctl", "daemon-reload")

	// As at a boot: the mount brings the daemon, which brings the device.
	run(t, "systemctl", "start", "srv.mount")
	for _, u := range []string{unit, "srv.mount", device} {
		run(t, "systemctl", "is-active", u)
	}
	if from := run(t, "findmnt", "-n", "-o", "SOURCE", "/srv"); !strings.HasPrefix(from, "/dev/ublkb") {
		t.Errorf("mounted from %s", from)
	}
	pid := property(t, "MainPID")
	if comm := run(t, "cat", "/proc/"+pid+"/comm"); comm != "ublk-blksnap" {
		t.Errorf("the process is called %s", comm)
	}

	// A stop is refused at once, and again, and leaves the unit as it is.
	stays := func() {
		t.Helper()
		for name, want := range map[string]string{"ActiveState": "active", "SubState": "running", "MainPID": pid} {
			if got := property(t, name); got != want {
				t.Errorf("%s is %s, want %s", name, got, want)
			}
		}
		run(t, "touch", "/srv/file")
		run(t, "sync", "/srv/file")
	}
	for _, verb := range []string{"stop", "restart", "try-restart", "stop"} {
		if out, status := try(t, "systemctl", verb, unit); status == 0 || !strings.Contains(out, "Operation refused") {
			t.Errorf("%s: status %d, %s", verb, status, out)
		}
		stays()
	}
	write(t, "/run/systemd/system/vm.target.d/isolate.conf", "[Unit]\nAllowIsolate=yes\n")
	run(t, "systemctl", "daemon-reload")
	run(t, "systemctl", "isolate", "vm.target")
	stays()
	const why = "mounted on /srv"
	if out, status := try(t, "ublk-blksnap", "daemon", "stop"); status != 5 || !strings.Contains(out, why) {
		t.Errorf("daemon stop: status %d, %s", status, out)
	}
	stays()
	if text := property(t, "StatusText"); !strings.Contains(text, "asked to stop, but") || !strings.Contains(text, why) {
		t.Errorf("the unit's status says %q", text)
	}
	run(t, "kill", pid)
	for end := time.Now().Add(patience); !strings.Contains(run(t, "journalctl", "-u", unit), "not stopped") && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
	}
	stays()

	// The next one follows a daemon that has died, or of which one queue hangs: who writes to
	// the filter only waits. Another program may take over in the same process.
	end, written := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-end:
				written <- nil
				return
			default:
			}
			name := fmt.Sprintf("/srv/busy-%d", n%8)
			if err := os.WriteFile(name, bytes.Repeat([]byte{byte(n)}, 100000), 0o644); err != nil {
				written <- err
				return
			}
			if out, err := exec.Command("sync", name).CombinedOutput(); err != nil {
				written <- fmt.Errorf("sync: %w: %s", err, out)
				return
			}
		}
	}()
	for _, signal := range []string{"KILL", "KILL", "", "ABRT"} {
		if signal == "" {
			hang(t, pid, "data/0")
		} else {
			run(t, "kill", "-"+signal, pid)
		}
		dead := pid
		for end := time.Now().Add(patience); pid == dead || pid == "0" || property(t, "SubState") != "running"; pid = property(t, "MainPID") {
			if time.Now().After(end) {
				t.Fatalf("after %q nobody follows process %s", signal, dead)
			}
			time.Sleep(10 * time.Millisecond)
		}
		stays()
	}
	if out, status := try(t, "rpm", "-e", "--nodeps", "--force-debian", "ublk-blksnap"); status == 0 || !strings.Contains(out, "not removed, because filters are in use") {
		t.Errorf("rpm -e under a mounted filter: status %d, %s", status, out)
	}
	stays()
	if out := rpm(t, "-U", packages("next")...); !strings.Contains(out, "99.0.0 has taken over from ") {
		t.Errorf("the upgrade says %q", out)
	}
	stays()
	before := reloaded(t)
	run(t, "systemctl", "reload", unit)
	stays()
	if now := reloaded(t); now == before {
		t.Errorf("systemctl reload: the last reload is that of %s still", now)
	}
	if text := run(t, "ublk-blksnap", "daemon", "reload"); !strings.Contains(text, "has taken over") {
		t.Errorf("daemon reload says %q", text)
	}
	stays()
	close(end)
	if err := <-written; err != nil {
		t.Error(err)
	}

	// A snapshot, whose image udev knows, and which breaks.
	run(t, "dd", "if=/dev/zero", "of=/srv/file", "bs=1M", "count=24", "conv=fsync")
	image := run(t, "ublk-blksnap", "snapshot", "create", "data", "--storage", "/dev/shm", "--limit", "8M", "--take", "--name", "test")
	if links := run(t, "udevadm", "info", "--query=symlink", image); image != "/dev/ublk-blksnap/images/test/data" || !strings.Contains(" "+links+" ", " ublk-blksnap/images/test/data ") {
		t.Errorf("udev knows the image as %q", links)
	}
	run(t, "dd", "if=/dev/urandom", "of=/srv/file", "bs=1M", "count=24", "conv=notrunc,fsync")
	run(t, "ublk-blksnap", "snapshot", "destroy", "test")
	run(t, "udevadm", "settle")
	if _, err := os.Lstat(image); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link of the image is left: %v", err)
	}

	// Once nothing is in use it stops, stays stopped, and can be started at once.
	run(t, "systemctl", "stop", "srv.mount")
	run(t, "ublk-blksnap", "daemon", "stop")
	if out, _ := try(t, "systemctl", "is-active", unit); strings.TrimSpace(out) != "inactive" {
		t.Errorf("after its stop the unit is %s", out)
	}
	run(t, "udevadm", "settle")
	if _, err := os.Lstat(link); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link is left: %v", err)
	}

	// The package goes, and comes again. A configuration stays, and so does a mounted volume
	// that had a filter.
	volume := mountVolume(t)
	volume(false)
	run(t, "ublk-blksnap", "add", "/dev/mapper/volume")
	volume(true)
	rpm(t, "-e", "ublk-blksnap", "ublk-blksnap-compat")
	volume(false)
	for _, file := range []string{"/usr/sbin/ublk-blksnap", "/usr/sbin/blksnap", "/usr/lib/systemd/system/" + unit, "/etc/udev/rules.d/63-ublk-blksnap-disks.rules", "/run/ublk-blksnap"} {
		if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("left by the package: %s: %v", file, err)
		}
	}
	rpm(t, "-i", packages("next")...)
	run(t, "systemctl", "start", "srv.mount")
	run(t, "systemctl", "is-active", unit)
	run(t, "ublk-blksnap", "add", "/dev/mapper/volume")
	volume(true)

	// The journal knows how grave each line is, and notes the time by itself.
	all := journal(t, unit)
	said(t, all, "6", "daemon started")
	said(t, all, "3", "not stopped, still serving")
	said(t, all, "4", "event=no_space")
	for _, e := range all {
		for _, no := range []string{"time=", "level=", "errno 0"} {
			if e.Comm == "ublk-blksnap" && strings.Contains(e.Message, no) {
				t.Errorf("%s: %s", no, e.Message)
			}
		}
	}
	// What keeps a daemon from starting is grave as well.
	write(t, "/run/systemd/system/second.service", "[Service]\nType=oneshot\nExecStart=/usr/sbin/ublk-blksnap daemon\n")
	run(t, "systemctl", "daemon-reload")
	if out, status := try(t, "systemctl", "start", "second"); status == 0 {
		t.Errorf("a second daemon: %s", out)
	}
	said(t, journal(t, "second"), "3", "another daemon")

	endOfMachine(t)
}

// mountVolume mounts a device of device-mapper by its UUID, and returns what makes sure that
// udev, systemd and its users know it as before: with a filter or without, also when udev looks
// at everything again.
func mountVolume(t *testing.T) (check func(attached bool)) {
	t.Helper()
	const path = "/dev/mapper/volume"
	run(t, "modprobe", "dm_mod")
	run(t, "dmsetup", "create", "volume", "--table", "0 81920 linear /dev/disk/by-vm/volume 2048")
	run(t, "mkfs.ext4", "-q", path)
	run(t, "udevadm", "settle")
	id := "/dev/disk/by-uuid/" + run(t, "blkid", "-s", "UUID", "-o", "value", path)
	fstab := run(t, "cat", "/etc/fstab")
	write(t, "/etc/fstab", fstab+"\n"+id+" /mnt ext4 nofail 0 0\n")
	run(t, "systemctl", "daemon-reload")
	run(t, "systemctl", "start", "mnt.mount")
	return func(attached bool) {
		t.Helper()
		run(t, "udevadm", "trigger", "--subsystem-match=block")
		run(t, "udevadm", "settle")
		if table := run(t, "dmsetup", "table", "volume"); strings.HasSuffix(table, " 2048") == attached {
			t.Errorf("attached: %v, table %s", attached, table)
		}
		if known, node := run(t, "readlink", "-f", id), run(t, "readlink", "-f", path); known != node {
			t.Errorf("attached: %v, %s is %s, want %s", attached, id, known, node)
		}
		for _, u := range []string{"mnt.mount", "dev-mapper-volume.device"} {
			run(t, "systemctl", "is-active", u)
		}
		run(t, "touch", "/mnt/file")
		run(t, "sync", "/mnt/file")
	}
}

// endOfMachine leaves filters in use for the end of the machine. The filesystem goes first, and a
// volume that is mounted has its own table again.
// A snapshot is held. The swap goes beside the daemon's stop. A device of device-mapper is
// left to systemd-shutdown, which takes it apart when it has killed every process that it
// does not spare. All three maps are kept in the end, and every filter is gone.
func endOfMachine(t *testing.T) {
	contents := bytes.Repeat([]byte("to the end\n"), 100000)
	if err := os.WriteFile("/srv/last", contents, 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "ublk-blksnap", "snapshot", "create", "data", "--storage", "/dev/shm", "--take")
	id := run(t, "ublk-blksnap", "snapshot", "info", "latest", "--field", "uuid")
	run(t, "ublk-blksnap", "add", "/dev/disk/by-vm/swap", "--name", "swap")
	run(t, "mkswap", "/dev/ublk-blksnap/swap")
	run(t, "swapon", "/dev/ublk-blksnap/swap")
	lower := run(t, "ublk-blksnap", "add", "/dev/disk/by-vm/lower", "--name", "lower")
	run(t, "modprobe", "dm_mod")
	// Where LVM is installed, this unit would take the device apart before the daemon is stopped.
	run(t, "systemctl", "mask", "--runtime", "blk-availability.service")
	run(t, "dmsetup", "create", "over", "--table", "0 2048 linear "+lower+" 0")
	run(t, "dd", "if=/dev/urandom", "of=/dev/mapper/over", "bs=1M", "count=1", "conv=fsync")
	run(t, "udevadm", "settle")

	write(t, "/run/vm/contents", string(contents))
	write(t, "/run/vm/last", `set -e -o pipefail
		not() { if "$@" >&2; then echo "not expected: $*" >&2; exit 1; fi; }
		# The daemon, which is spared, is told of nothing: it sees that the filter is free. Beside this script that of
		# "make install" waits for it too.
		for ((n = 0; n < 12; n++)); do /usr/lib/systemd/system-shutdown/ublk-blksnap poweroff && break; done
		not ls /dev/ublkb*
		not pgrep -lf '^.blk-blksnap '
		cd /var/lib/ublk-blksnap
		for name in data swap lower; do grep -l "\"name\": *\"$name\"" *.json >/dev/null || { echo "the map of $name is not kept" >&2; ls -l >&2; exit 1; }; done
		not ls *.running
		ls snapshots/`+id+`.note
		journalctl -D /run/log/journal -u `+unit+` -o cat >/run/vm/said
		for line in "the machine ends, and a held snapshot with it\" snapshot=`+id+`" "snapshot destroyed\" snapshot=`+id+`" "removed, because the machine ends\" name=swap" "removed, because the machine ends\" name=volume" "held by the device-mapper device over"; do
			grep -F "$line" /run/vm/said || { echo "not said: $line" >&2; tail -n 30 /run/vm/said >&2; exit 1; }
		done
		dumpe2fs -h `+disk+` >/run/vm/super
		not grep needs_recovery /run/vm/super
		grep -E "Filesystem state: *clean$" /run/vm/super
		e2fsck -f -n `+disk+`
		e2fsck -f -n '/dev/disk/by-vm/volume?offset=1048576'
		debugfs -R "cat /last" `+disk+` 2>/dev/null | cmp - /run/vm/contents
		echo "the disk is whole"
`)
}
