package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "512": 512, "1K": 1 << 10, "64M": 64 << 20, "3G": 3 << 30, "2T": 2 << 40} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "K", "1k", "1.5G", "-1", "1GB"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", text, got)
		}
	}
}

func TestWatcher(t *testing.T) {
	seen := make(chan struct{}, 1)
	var out bytes.Buffer
	w := &watcher{to: &out, text: "mark", seen: seen}
	io.WriteString(w, "a\nma")
	io.WriteString(w, "rk")
	select {
	case <-seen:
		t.Fatal("told before the line had ended")
	default:
	}
	io.WriteString(w, " 1\nmark 2\n")
	select {
	case <-seen:
	default:
		t.Fatal("the line was not told")
	}
	if want := "a\nmark 1\nmark 2\n"; out.String() != want {
		t.Errorf("passed on %q, want %q", out.String(), want)
	}
}

func TestSkips(t *testing.T) {
	const output = `=== RUN   TestGood
--- PASS: TestGood (0.00s)
=== RUN   TestOld
    x_test.go:3: needs kernel 6.16 for UPDATE_SIZE
--- SKIP: TestOld (0.00s)
=== RUN   TestShared
    x_test.go:6: the other machine runs it: UBLK_BLKSNAP_SHARE=1
--- SKIP: TestShared (0.00s)
=== RUN   TestLazy
    x_test.go:9: not today
--- SKIP: TestLazy (0.00s)
=== RUN   TestBoth
=== RUN   TestBoth/old
    x_test.go:12: needs kernel 6.16
=== RUN   TestBoth/lazy
    x_test.go:15: no disk
--- PASS: TestBoth (0.00s)
    --- SKIP: TestBoth/old (0.00s)
    --- SKIP: TestBoth/lazy (0.00s)
PASS
`
	var out bytes.Buffer
	s := &skips{to: &out}
	for _, b := range []byte(output) {
		s.Write([]byte{b})
	}
	if out.String() != output {
		t.Errorf("passed on %q", out.String())
	}
	if got, want := strings.Join(s.found, " "), "TestLazy TestBoth/lazy"; got != want {
		t.Errorf("found %q, want %q", got, want)
	}
	if s.err() == nil {
		t.Error("no error")
	}
}

// Output without a test is no success, nor is it a failure that some binaries of several have none that fits.
func TestNoTest(t *testing.T) {
	const none = "testing: warning: no tests to run\nPASS\n"
	s := &skips{to: io.Discard}
	io.WriteString(s, none)
	if s.err() == nil {
		t.Error("no error without a test")
	}
	io.WriteString(s, "=== RUN   TestGood\n--- PASS: TestGood (0.00s)\nPASS\n"+none)
	if err := s.err(); err != nil {
		t.Error(err)
	}
}

// The tests below boot machines. They take the program as its users do: built, in a process of its own.

// vm builds the program and returns a function that makes a command of it.
func vm(t *testing.T) func(args ...string) *exec.Cmd {
	t.Helper()
	if os.Getenv("VM_TEST") == "" {
		t.Skip("boots virtual machines: set VM_TEST=1, as make test does")
	}
	program := filepath.Join(t.TempDir(), "vm")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build vm: %v\n%s", err, out)
	}
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	return func(args ...string) *exec.Cmd {
		cmd := exec.Command(program, args...)
		cmd.Env = append(os.Environ(), "VM_CACHE="+cache, "VM_OUT="+t.TempDir(), "VM_TIMEOUT=3m", "VM_MEM=1G")
		return cmd
	}
}

// result runs cmd and returns its outputs and exit status.
func result(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatalf("run vm: %v", err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestOutputAndStatus(t *testing.T) {
	vm := vm(t)
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	shared := t.TempDir()
	cmd := vm("-e", "GREETING=it's \"here\"\n$HOME", "-out", shared, `
		printf '%s|' "$GREETING"; pwd; echo complaint >&2
		echo kernel message >/dev/kmsg; echo kept >"$VM_OUT/file"; echo lost >"vm_test.lost"
		ls /dev/ublk-control 2>/dev/null; modprobe ublk_drv && ls /dev/ublk-control
		seq 100000; sleep 1000 & exit 42`)
	stdout, stderr, status := result(t, cmd)
	var numbers strings.Builder
	for i := 1; i <= 100000; i++ {
		fmt.Fprintln(&numbers, i)
	}
	if want := "it's \"here\"\n$HOME|" + dir + "\n/dev/ublk-control\n" + numbers.String(); stdout != want {
		t.Errorf("stdout is %d bytes, want %d; it begins with %.200q", len(stdout), len(want), stdout)
	}
	if stderr != "complaint\n" {
		t.Errorf("stderr is %q", stderr)
	}
	if status != 42 {
		t.Errorf("exit status is %d, want 42", status)
	}
	if kept, err := os.ReadFile(filepath.Join(shared, "file")); string(kept) != "kept\n" {
		t.Errorf("file in VM_OUT is %q, %v", kept, err)
	}
	if _, err := os.Stat("vm_test.lost"); err == nil {
		os.Remove("vm_test.lost")
		t.Error("the guest wrote to the host's tree")
	}
}

func TestTreeBelowTmp(t *testing.T) {
	vm := vm(t)
	dir, err := os.MkdirTemp("/tmp", "vm-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("below /tmp"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := vm("cat", "file")
	cmd.Dir = dir
	if stdout, stderr, status := result(t, cmd); stdout != "below /tmp" || status != 0 {
		t.Errorf("got %q, %q, status %d", stdout, stderr, status)
	}
}

func TestTimeout(t *testing.T) {
	began := time.Now()
	// The boot is part of it.
	stdout, stderr, status := result(t, vm(t)("-timeout", "45s", "echo up; sleep 1000"))
	if status != statusTimeout || stdout != "up\n" || !strings.Contains(stderr, "the time is up after 45s") {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	if took := time.Since(began); took > 5*time.Minute {
		t.Errorf("it took %v", took)
	}
	assertNothingLeft(t)
}

func TestPanic(t *testing.T) {
	_, stderr, status := result(t, vm(t)("echo c >/proc/sysrq-trigger"))
	if status != statusBroken || !strings.Contains(stderr, "the machine died") || !strings.Contains(stderr, "Kernel panic") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
	assertNothingLeft(t)
}

// A machine that dies before the command is tried again, not for ever, and the error tells of its end.
func TestNoBoot(t *testing.T) {
	vm := vm(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		deaths, starts, status int
		stdout                 string
	}{{2, 3, 0, "ran\n"}, {tries, tries, statusBroken, ""}} {
		dir := t.TempDir()
		script := fmt.Sprintf(`#!/bin/sh
echo start >>%[1]s/starts
[ $(wc -l <%[1]s/starts) -gt %[2]d ] || { echo no such luck >&2; exit 1; }
exec %[3]s "$@"
`, dir, c.deaths, qemu)
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(qemu)), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := vm("echo ran")
		cmd.Env = append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"))
		stdout, stderr, status := result(t, cmd)
		if status != c.status || stdout != c.stdout {
			t.Errorf("%d deaths: status %d, stdout %q, stderr %q", c.deaths, status, stdout, stderr)
		}
		if status != 0 && (!strings.Contains(stderr, "the machine died") || !strings.Contains(stderr, "no such luck")) {
			t.Errorf("stderr %q", stderr)
		}
		if told := strings.Count(stderr, "vm: tried again, for the "); told != c.starts-1 {
			t.Errorf("%d deaths: stderr %q", c.deaths, stderr)
		}
		if starts, err := os.ReadFile(filepath.Join(dir, "starts")); strings.Count(string(starts), "\n") != c.starts {
			t.Errorf("%d deaths: started %q, %v; want %d", c.deaths, starts, err, c.starts)
		}
	}
	assertNothingLeft(t)
}

// A fault of the emulated processor, told by the kernel as a breakpoint, is not the command's: with -again it runs once
// more, on new disks. Any other death is its own.
func TestAgain(t *testing.T) {
	vm := vm(t)
	const command = `echo start >>$VM_OUT/starts
		head -c 5 /dev/disk/by-vm/a | tr '\0' 0; echo dirty | dd of=/dev/disk/by-vm/a conv=fsync status=none
		[ $(wc -l <$VM_OUT/starts) = 1 ] || exit 7
		echo "<1>$OOPS" >/dev/kmsg; sleep 1; echo c >/proc/sysrq-trigger`
	const stale = "Oops: int3: 0000 [#1] SMP NOPTI"
	for _, c := range []struct {
		flag, oops, stdout string
		status             int
	}{
		{"-again", stale, "0000000000", 7},
		{"-again", "Oops: 0002 [#1] SMP NOPTI", "00000", statusBroken},
		{"-again=false", stale, "00000", statusBroken},
	} {
		if testing.Short() && c.flag == "-again=false" {
			continue
		}
		out := t.TempDir()
		again := c.flag == "-again" && c.oops == stale
		stdout, stderr, status := result(t, vm("-accel", "tcg", c.flag, "-disk", "a=1M", "-out", out, "-e", "OOPS="+c.oops, command))
		if status != c.status || stdout != c.stdout {
			t.Errorf("%s, %s: status %d, stdout %q, stderr %q", c.flag, c.oops, status, stdout, stderr)
		}
		if told := strings.Contains(stderr, "code that was no longer there"); told != (c.oops == stale) {
			t.Errorf("%s, %s: stderr %q", c.flag, c.oops, stderr)
		}
		if told := strings.Contains(stderr, "vm: tried again, for the second time\n"); told != again {
			t.Errorf("%s, %s: stderr %q", c.flag, c.oops, stderr)
		}
	}
}

// What was synced before the kill is on the disk of the next machine; what was not, in the guest's page cache, is not. A
// volatile disk has not even what it was given, unless that was flushed.
func TestKillAndBootAgain(t *testing.T) {
	vm := vm(t)
	dir := t.TempDir()
	disk, volatile := filepath.Join(dir, "disk"), filepath.Join(dir, "volatile")
	spec := "data=" + disk + ":64M"
	stdout, stderr, status := result(t, vm("-disk-file", spec, "-disk-file", "cached="+volatile+":64M,volatile", "-kill-on", "synced", `
		set -e
		disk=/dev/disk/by-vm/data
		blockdev --getsize64 $disk
		exec 9<>$disk # the last close would sync it
		echo durable | dd of=$disk bs=4k conv=fsync,sync status=none
		echo volatile | dd of=$disk bs=4k seek=1 conv=sync status=none
		disk=/dev/disk/by-vm/cached
		cat /sys/block/$(basename $(readlink -f $disk))/queue/write_cache
		page() { dd of=$disk bs=4k oflag=direct conv=sync,"$1" seek=$2 status=none; }
		echo durable | page fsync 3000
		echo volatile | page notrunc 1
		echo volatile | page notrunc 3000
		blkdiscard -o $((2999 * 4096)) -l 12288 $disk
		dd if=$disk bs=4k skip=3000 count=1 iflag=direct status=none | tr -d '\0'
		echo synced; sleep 1000`))
	if status != 0 || stdout != "67108864\nwrite back\nvolatile\nsynced\n" {
		t.Fatalf("first boot: status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	assertNothingLeft(t)
	image, err := os.ReadFile(volatile)
	if err != nil {
		t.Fatal(err)
	}
	if left := string(bytes.ReplaceAll(image, []byte{0}, nil)); left != "durable\n" || len(image) != 64<<20 {
		t.Errorf("the volatile disk has %q in %d bytes", left, len(image))
	}
	stdout, stderr, status = result(t, vm("-disk-file", spec, `head -c 8 /dev/disk/by-vm/data; tail -c +4097 /dev/disk/by-vm/data | tr -d '\0' | wc -c`))
	if status != 0 || stdout != "durable\n0\n" {
		t.Errorf("second boot: status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestKillTooLate(t *testing.T) {
	_, stderr, status := result(t, vm(t)("-kill-on", "never", "exit 7"))
	if status != statusNotKilled || !strings.Contains(stderr, "status 7 before the kill") {
		t.Errorf("status %d, stderr %q", status, stderr)
	}
}

func TestKillAfter(t *testing.T) {
	began := time.Now()
	stdout, stderr, status := result(t, vm(t)("-kill-after", "2s", "sleep 1000; echo slept"))
	if status != 0 || stdout != "" {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
	if took := time.Since(began); took < 2*time.Second || took > 5*time.Minute {
		t.Errorf("it took %v", took)
	}
}

func TestDisksAndUdev(t *testing.T) {
	stdout, stderr, status := result(t, vm(t)("-udev", "-disk", "a=1M", "-disk", "b=2M",
		`blockdev --getsize64 /dev/disk/by-vm/a /dev/disk/by-vm/b
		modprobe brd rd_nr=1 rd_size=4096; udevadm settle; udevadm info -q property /dev/ram0 | grep ^DEVNAME
		dmsetup create lin --table '0 2048 linear /dev/ram0 0'; ls /dev/mapper/lin; ls /dev/disk/by-id/virtio-a`))
	if status != 0 || stdout != "1048576\n2097152\nDEVNAME=/dev/ram0\n/dev/mapper/lin\n/dev/disk/by-id/virtio-a\n" {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

// The command is a service of a real systemd, which ends when the command has, and what it left for the end is run then.
func TestSystemd(t *testing.T) {
	vm := vm(t)
	stdout, stderr, status := result(t, vm("-systemd", "-disk", "a=1M", `
		pwd; cat /proc/1/comm; udevadm settle; ls /dev/disk/by-id/virtio-a; systemctl is-active systemd-journald
		systemd-run -q sleep 1000; mount -t tmpfs none /mnt
		echo 'echo complaint >&2; pgrep -x systemd-journal; pgrep -x sleep; findmnt -n /mnt; echo last; exit 3' >/run/vm/last`))
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if want := dir + "\nsystemd\n/dev/disk/by-id/virtio-a\nactive\nlast\n"; stdout != want || stderr != "complaint\n" || status != 3 {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

// A machine with ublk is at hand: the guest of another vm, which must be able to see the program.
func TestHost(t *testing.T) {
	vm := vm(t)
	program, err := filepath.Abs("../../.cache/test/vm-on-host")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build vm: %v\n%s", err, out)
	}
	defer os.Remove(program)
	stdout, stderr, status := result(t, vm("-e", "VM=host", "-e", "PROGRAM="+program,
		`"$PROGRAM" -e A=b 'echo $A; ls /dev/ublk-control; echo out >$VM_OUT/x && cat $VM_OUT/x; echo err >&2; exit 9'; echo $?
		"$PROGRAM" -timeout 1s sleep 100; echo $?`))
	if stdout != "b\n/dev/ublk-control\nout\n9\n124\n" || stderr != "err\nvm: the time is up after 1s\n" || status != 0 {
		t.Errorf("status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

// However vm itself ends, QEMU and virtiofsd end with it.
func TestSignals(t *testing.T) {
	vm := vm(t)
	signals := []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT}
	if testing.Short() {
		signals = signals[:2] // the third has the way of the second
	}
	for _, sig := range signals {
		t.Run(sig.String(), func(t *testing.T) {
			cmd := vm("echo up; sleep 1000")
			pipe, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var said bytes.Buffer
			cmd.Stderr = &said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(pipe, make([]byte, len("up\n"))); err != nil {
				err2 := cmd.Wait()
				t.Fatalf("wait for the guest: %v, %v: %s", err, err2, said.String())
			}
			cmd.Process.Signal(sig)
			if err := cmd.Wait(); err == nil {
				t.Error("vm succeeded")
			}
			assertNothingLeft(t)
		})
	}
}

var ourChildren = regexp.MustCompile(`qemu-system-x86_64|virtiofsd|nbdkit`)

// assertNothingLeft looks for processes of QEMU's and of what serves it that carry our marker in their environment.
func assertNothingLeft(t *testing.T) {
	t.Helper()
	marker := []byte("VM_TEST_MARK=" + mark)
	var left []string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		left = nil
		processes, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range processes {
			environ, _ := os.ReadFile(p + "/environ")
			cmdline, _ := os.ReadFile(p + "/cmdline")
			if bytes.Contains(environ, marker) && ourChildren.Match(cmdline) {
				left = append(left, filepath.Base(p)+" "+string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
			}
		}
		if left == nil {
			return
		}
	}
	t.Errorf("still running: %s", strings.Join(left, "; "))
}

var mark = fmt.Sprint(os.Getpid(), ".", time.Now().UnixNano())

func TestMain(m *testing.M) {
	os.Setenv("VM_TEST_MARK", mark)
	os.Exit(m.Run())
}
