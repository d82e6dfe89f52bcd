package daemon

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestNotRoot: another user is told to be root, whether a daemon runs or not.
func TestNotRoot(t *testing.T) {
	guest.NeedEither(t)
	d := program.Start(t)
	// The program may lie where others cannot go.
	bin := filepath.Join("/run", "ublk-blksnap-test")
	guest.Run(t, "install", "-m", "755", program.Path(t), bin)
	defer os.Remove(bin)
	for _, dir := range []string{string(d.RunDir), "/run/no-daemon-here"} {
		for _, args := range [][]string{{"list"}, {"add", "/dev/null"}, {"daemon"}} {
			cmd := exec.Command(bin, append([]string{"--run-dir", dir}, args...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			var errs bytes.Buffer
			cmd.Stderr = &errs
			err := cmd.Run()
			// Who only looks is told that there is nothing to see.
			status, words := 1, ": run this as root"
			if dir != string(d.RunDir) && args[0] == "list" {
				status, words = 4, "no daemon runs on "+dir
			}
			if guest.ExitStatus(t, err) != status || !strings.Contains(errs.String(), words) {
				t.Errorf("%v on %s: %v: %s", args, dir, err, &errs)
			}
		}
	}
}

// fresh is a run directory without a daemon, and a call of the program on it.
func fresh(t *testing.T) (dir string, call func(args ...string) program.Answer) {
	dir = filepath.Join(t.TempDir(), "run")
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "state"), unix.MNT_DETACH) })
	return dir, func(args ...string) program.Answer {
		t.Helper()
		cmd := exec.Command(program.Path(t), append([]string{"--run-dir", dir}, args...)...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		return program.Answer{Status: guest.ExitStatus(t, cmd.Run()), Out: out.String(), Err: errs.String()}
	}
}

// TestMachineCannot: what is missing on the machine is said by the first
// command, by doctor, and leaves nothing behind.
func TestMachineCannot(t *testing.T) {
	guest.NeedEither(t)
	t.Run("io_uring disabled", func(t *testing.T) {
		const sysctl = "/proc/sys/kernel/io_uring_disabled"
		if err := os.WriteFile(sysctl, []byte("2"), 0); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				t.Skip("needs kernel 6.6: sysctl kernel.io_uring_disabled")
			}
			t.Fatal(err)
		}
		defer os.WriteFile(sysctl, []byte("0"), 0)
		cannot(t, "io_uring is disabled by sysctl kernel.io_uring_disabled=2: set it to 0")
	})
	t.Run("no ublk_drv", func(t *testing.T) {
		guest.Unload(t, "ublk_drv")
		modules := filepath.Join("/lib/modules", ublk.KernelRelease())
		guest.Run(t, "mount", "-t", "tmpfs", "none", modules)
		defer guest.Run(t, "modprobe", "ublk_drv")
		defer guest.Run(t, "umount", modules)
		cannot(t, "no ublk driver", "ublk_drv")
	})
}

// TestOldKernel is the same on a kernel from before ublk, as KERNEL=6.1 boots.
func TestOldKernel(t *testing.T) {
	guest.Need(t)
	if guest.KernelAtLeast(t, 6, 5) {
		t.Skip("needs kernel 6.4 or older")
	}
	cannot(t, "too old: Linux 6.5 or newer is needed")
}

// cannot checks that commands fail and say these words.
func cannot(t *testing.T, words ...string) {
	t.Helper()
	dir, call := fresh(t)
	for _, args := range [][]string{{"add", "/dev/null"}, {"daemon"}, {"doctor"}} {
		a := call(args...)
		said := a.Out + a.Err
		if a.Status != 1 {
			t.Errorf("%v: status %d", args, a.Status)
		}
		for _, w := range words {
			if !strings.Contains(said, w) {
				t.Errorf("%v said %q, not %q", args, said, w)
			}
		}
	}
	version := exec.Command(program.Path(t), "version")
	version.Args[0] = "blksnap"
	said, err := version.CombinedOutput()
	if guest.ExitStatus(t, err) != 1 || !strings.HasPrefix(string(said), "blksnap: ") || !strings.Contains(string(said), words[0]) {
		t.Errorf("blksnap version: %v, %q", err, said)
	}
	if m, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(m, []byte(dir)) {
		t.Errorf("a mount is left in %s, %v", dir, err)
	}
}

// TestDoctorWell: on a machine that can, doctor says so.
func TestDoctorWell(t *testing.T) {
	guest.Need(t)
	_, call := fresh(t)
	a := call("doctor")
	if a.Status != 0 || strings.Contains(a.Out, "missing") {
		t.Fatalf("status %d: %s%s", a.Status, a.Out, a.Err)
	}
	for _, line := range []string{"ublk_drv", "io_uring", "USER_RECOVERY_REISSUE", "kernel"} {
		if !strings.Contains(a.Out, "ok      "+line) {
			t.Errorf("%s is not ok:\n%s", line, a.Out)
		}
	}
	if a := call("doctor", "--json"); a.Status != 0 || !strings.Contains(a.Out, `"ok": true`) {
		t.Errorf("JSON: status %d: %s", a.Status, a.Out)
	}
}
