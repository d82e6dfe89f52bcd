package filter

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// hungryEnv is how many bytes of memory TestHungry uses, for how many seconds, and the
// directory for its files.
const hungryEnv = "UBLK_TEST_HUNGRY"

// TestHungry is a process for TestLowMemory. It writes to its memory, and to files, and
// looks whether all is there, over and over. It does nothing unless that test starts it.
func TestHungry(t *testing.T) {
	var size, seconds int
	var dir string
	if n, _ := fmt.Sscan(os.Getenv(hungryEnv), &size, &seconds, &dir); n != 3 {
		return
	}
	end := time.Now().Add(time.Duration(seconds) * time.Second)
	files := make(chan int)
	go func() {
		rounds := 0
		for ; rounds < 2 || time.Now().Before(end); rounds++ {
			if err := writeFiles(dir, rounds); err != nil {
				t.Error(err)
				break
			}
		}
		files <- rounds
	}()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	passes := 0
	for ; passes < 2 || time.Now().Before(end); passes++ {
		for at := 0; at < len(mem); at += 4096 {
			if passes > 0 && string(mem[at:at+16]) != fmt.Sprintf("%8d%8d", passes-1, at/4096) {
				t.Fatalf("pass %d: the page %d holds %q", passes, at/4096, mem[at:at+16])
			}
			copy(mem[at:], fmt.Sprintf("%8d%8d", passes, at/4096))
		}
	}
	fmt.Printf("%d times through its memory, %d times through its files\n", passes, <-files)
}

// writeFiles reads what the round before has written and writes anew.
func writeFiles(dir string, round int) error {
	const size, count = mib, 6
	for i := range count {
		content := func(round int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%8d%8d", round, i)), size/16) }
		path := filepath.Join(dir, strconv.Itoa(i))
		if round > 0 {
			got, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if !bytes.Equal(got, content(round-1)) {
				return fmt.Errorf("round %d: %s is not as it was written", round, path)
			}
		}
		f, err := os.Create(path)
		if err == nil {
			_, err = f.Write(content(round))
		}
		if err == nil && i%4 == 0 {
			err = f.Sync()
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// number is the value of a line "NAME VALUE" of a file of the kernel.
func number(t *testing.T, file, name string) int64 {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) >= 2 && strings.TrimSuffix(f[0], ":") == name {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s says nothing of %s", file, name)
	return 0
}

// setting gives a file below /proc/sys a value, until the test ends. Then the file
// named back gets the value again that it has now.
func setting(t *testing.T, name, value, back string) {
	t.Helper()
	old, err := os.ReadFile(filepath.Join("/proc/sys", back))
	if err != nil {
		t.Fatal(err)
	}
	guest.Write(t, filepath.Join("/proc/sys", name), value)
	t.Cleanup(func() { guest.Write(t, filepath.Join("/proc/sys", back), string(old)) })
}

// killed kills the daemon, waits for the next one, which the guard starts, and says for
// how long I/O waited.
func killed(t *testing.T, d *program.Daemon) time.Duration {
	t.Helper()
	before, err := d.Info(guest.Context(t))
	if err == nil {
		err = unix.Kill(before.PID, unix.SIGKILL)
	}
	if err != nil {
		t.Fatal(err)
	}
	died := time.Now()
	var now control.Info
	guest.WaitFor(t, "the next daemon", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		now, err = d.Info(ctx)
		return err == nil && now.PID != before.PID
	})
	if now.Recovered == nil || now.Lost != nil {
		t.Errorf("the next daemon says %+v", now)
	}
	pause := time.Since(died)
	allFlushers(t, now.PID)
	return pause
}

// allFlushers: no thread of a daemon, or of the process that it starts, waits for disks
// to get memory.
func allFlushers(t *testing.T, daemon int) {
	t.Helper()
	const noIO = 0x80000 // PF_MEMALLOC_NOIO (include/linux/sched.h)
	all, _ := filepath.Glob("/proc/[0-9]*/task/*/stat")
	seen := map[string]bool{}
	for _, file := range all {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		head, rest, _ := bytes.Cut(b, []byte(") "))
		f := strings.Fields(string(rest)) // from the state on
		pid := strings.Split(file, "/")[2]
		if pid != strconv.Itoa(daemon) && f[1] != strconv.Itoa(daemon) || f[0] == "Z" || f[0] == "X" {
			continue
		}
		seen[pid] = true
		if flags, err := strconv.ParseUint(f[6], 10, 64); err != nil || flags&noIO == 0 {
			t.Errorf("%s: %s) is no I/O flusher: %#x, %v", file, head, flags, err)
		}
	}
	if len(seen) < 2 {
		t.Errorf("the daemon and its prober are not found: %v", seen)
	}
}

const mib = 1 << 20

// hungry is a machine whose swap space, and the files that are written, lie on filters,
// with hardly any dirty pages allowed.
type hungry struct {
	t           *testing.T
	d           *program.Daemon
	files, swap control.Device
	dir         string // where files is mounted
	sums        map[string][32]byte
	swapped     int64 // pages, before
}

func makeHungry(t *testing.T, disks []string) *hungry {
	t.Helper()
	d := program.Start(t, "guard=true")
	allFlushers(t, d.PID)
	h := &hungry{t: t, d: d}
	t.Cleanup(func() {
		if t.Failed() { // the last daemon is no child of this process
			for _, name := range []string{"ram0", "ram1"} {
				d.Call("ublk-blksnap", "remove", "--force", name)
			}
			d.Call("ublk-blksnap", "daemon", "stop")
		}
	})
	// What is on its way to a daemon that has died cannot be freed. If that were nearly all
	// that a control group has, the kernel would kill a process. Short queues bound it.
	h.files, h.swap = d.Add(disks[0], program.Queues(1, 32)), d.Add(disks[1], program.Queues(1, 32))
	guest.Ext4.Make(t, h.files.Link)
	h.dir = guest.Mount(t, h.files.Link)
	h.sums = guest.SomeFiles(t, filepath.Join(h.dir, "files"), 1)
	setting(t, "vm/dirty_bytes", strconv.Itoa(mib), "vm/dirty_ratio")
	setting(t, "vm/dirty_background_bytes", strconv.Itoa(mib/2), "vm/dirty_background_ratio")
	setting(t, "vm/swappiness", "100", "vm/swappiness")
	h.swapped = number(t, "/proc/vmstat", "pswpout")
	return h
}

// run has a process use size bytes, for span at least, in a control group if there is
// one. It calls each again and again.
func (h *hungry) run(size int64, span time.Duration, group string, each func()) {
	t := h.t
	t.Helper()
	c := exec.Command(os.Args[0], "-test.run=^TestHungry$", "-test.timeout=0")
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %s", hungryEnv, size, int(span.Seconds()), h.dir))
	if group != "" {
		fd, err := unix.Open(group, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	late := time.After(span + guest.Patience)
	for alive := true; alive; {
		select {
		case err := <-ended:
			alive = false
			if err != nil {
				t.Errorf("the process that needs much memory: %v: %s", err, &out)
			}
		case <-late:
			_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
			t.Fatal("the process that needs much memory hangs")
		case <-time.After(guest.Span(4*time.Second, 20*time.Second)):
			each()
		}
	}
	swapped := (number(t, "/proc/vmstat", "pswpout") - h.swapped) * 4096
	t.Logf("%s; %d MiB went to swap", strings.Split(out.String(), "\n")[0], swapped/mib)
	if swapped < 8*mib {
		t.Error("that is too little to prove anything")
	}
}

// end looks at the files, and takes all down. No swap space is in use any more.
func (h *hungry) end(disk string) {
	t := h.t
	t.Helper()
	guest.DropCaches(t)
	guest.SameFiles(t, filepath.Join(h.dir, "files"), h.sums)
	guest.Unmount(t, h.dir)
	h.d.Remove(h.files)
	h.d.Remove(h.swap)
	if a := h.d.Call("ublk-blksnap", "daemon", "stop"); a.Status != 0 {
		t.Errorf("%+v", a)
	}
	guest.Ext4.Check(t, disk)
}

// TestLowMemory: processes need more memory than they may have. Files and swap lie on
// filters. So what memory the kernel frees for them, it frees through a daemon, which
// must not wait for memory itself.
func TestLowMemory(t *testing.T) {
	guest.Need(t)
	t.Run("group", groupWithoutMemory)
	if guest.Long() {
		t.Run("machine", machineWithoutMemory)
	}
}

// groupWithoutMemory: the processes are in a control group that has too little memory,
// a snapshot is held, and daemons are killed. One part of the swap space is a file.
func groupWithoutMemory(t *testing.T) {
	disks := guest.RAMDisks(t, 4, 128*mib)
	h := makeHungry(t, disks)
	d := h.d
	inFile := filepath.Join(h.dir, "swap")
	guest.Run(t, "dd", "if=/dev/zero", "of="+inFile, "bs=1M", "count=16")
	guest.Run(t, "chmod", "600", inFile)
	offFile, offDisk := guest.Swap(t, inFile, 16*mib), guest.Swap(t, h.swap.Link, 64*mib)
	s := d.Create(control.CreateRequest{Devices: []string{h.files.Name, h.swap.Name}, Storage: []control.Storage{{Path: disks[2], Overwrite: true}, {Path: disks[3], Overwrite: true}}})
	s = d.Taken(s.ID)
	const limit = 32 * mib
	var pauses []time.Duration
	h.run(limit+12*mib, guest.Span(8*time.Second, 10*time.Minute), guest.Cgroup(t, "hungry", limit), func() {
		if guest.Long() || len(pauses) < 2 {
			pauses = append(pauses, killed(t, d))
		}
	})
	slices.Sort(pauses)
	t.Logf("%d daemons were killed, and the next one answered after %v at most", len(pauses), pauses[len(pauses)-1])
	offFile()
	offDisk()
	for _, im := range s.Images {
		if im.Device == h.files.Name {
			was := guest.Mount(t, im.Path, "ro")
			guest.SameFiles(t, filepath.Join(was, "files"), h.sums)
			guest.Unmount(t, was)
		}
	}
	d.Destroy(s.ID)
	h.end(disks[0])
}

// machineWithoutMemory: the whole machine has too little memory. The daemon lives.
func machineWithoutMemory(t *testing.T) {
	disks := guest.RAMDisks(t, 2, 128*mib)
	for _, disk := range disks { // a RAM disk takes its memory when it is written to
		guest.Run(t, "dd", "if=/dev/urandom", "of="+disk, "bs=1M", "oflag=direct", "count=128")
	}
	h := makeHungry(t, disks)
	off := guest.Swap(t, h.swap.Link, 128*mib)
	const left = 256 * mib
	guest.DropCaches(t)
	available := number(t, "/proc/meminfo", "MemAvailable") << 10
	setting(t, "vm/nr_hugepages", strconv.FormatInt((available-left)/(2*mib), 10), "vm/nr_hugepages")
	available = number(t, "/proc/meminfo", "MemAvailable") << 10
	if available > 2*left {
		t.Fatalf("%d MiB are available still", available/mib)
	}
	// Not all that is said to be available can be had, and the swap space must not run out.
	h.run(available+16*mib, 10*time.Minute, "", func() {})
	off()
	h.end(disks[0])
}
