package uring

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newRing is a ring for the length of the test, on a thread of its own.
func newRing(t testing.TB, cfg Config) *Ring {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// mapped is memory off the Go heap for the length of the test.
func mapped(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

func tempFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mustSQE(t testing.TB, r *Ring) *SQE {
	t.Helper()
	s := r.SQE()
	if s == nil {
		t.Fatal("submission queue is full")
	}
	return s
}

// prepNop makes of a zeroed entry one that does nothing: IORING_OP_NOP is 0.
func prepNop(s *SQE) { s.Fd = -1 }

// collect submits and waits until n completions came.
func collect(t testing.TB, r *Ring, n int) []CQE {
	t.Helper()
	var got []CQE
	buf := make([]CQE, 16)
	for end := time.Now().Add(time.Minute); len(got) < n; {
		if time.Now().After(end) {
			t.Fatalf("%d of %d completions after a minute", len(got), n)
		}
		// Without waiting in there: what never comes fails the test.
		if err := r.SubmitAndWait(0, false); err != nil {
			t.Fatal(err)
		}
		k := r.Reap(buf)
		if got = append(got, buf[:k]...); k == 0 {
			time.Sleep(100 * time.Microsecond)
		}
	}
	if len(got) != n {
		t.Fatalf("%d completions, want %d", len(got), n)
	}
	return got
}

func one(t testing.TB, r *Ring) CQE {
	t.Helper()
	return collect(t, r, 1)[0]
}

func wantRes(t testing.TB, what string, c CQE, res int32) {
	t.Helper()
	if c.Res != res {
		t.Fatalf("%s: result %d, want %d", what, c.Res, res)
	}
}

var configs = map[string]Config{
	"plain":         {Entries: 8},
	"single issuer": {Entries: 8, SingleIssuer: true, CoopTaskrun: true},
	"deferred":      {Entries: 8, SingleIssuer: true, DeferTaskrun: true, CoopTaskrun: true},
	"wide":          {Entries: 8, SQE128: true},
}

func TestNopKeepsOrderAndData(t *testing.T) {
	for name, cfg := range configs {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, cfg)
			next := uint64(0)
			// More than the counters' first lap of the queue, in odd batches.
			for round := range 50 {
				n := round%8 + 1
				for i := range n {
					s := mustSQE(t, r)
					prepNop(s)
					s.UserData = next + uint64(i)
				}
				for i, c := range collect(t, r, n) {
					if c.UserData != next+uint64(i) || c.Res != 0 {
						t.Fatalf("completion %+v, want user data %d", c, next+uint64(i))
					}
				}
				next += uint64(n)
			}
		})
	}
}

func TestDeferredWhereSupported(t *testing.T) {
	r := newRing(t, configs["deferred"])
	if r.flags&ioringSetupDeferTaskrun == 0 {
		t.Skip("kernel older than 6.1: no DEFER_TASKRUN")
	}
}

// TestDue: a deferred ring says what the kernel holds back until the next
// enter.
func TestDue(t *testing.T) {
	r := newRing(t, configs["deferred"])
	if r.flags&ioringSetupDeferTaskrun == 0 {
		t.Skip("kernel older than 6.1: no DEFER_TASKRUN")
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	mustSQE(t, r).PrepRead(fd, uint64(uintptr(unsafe.Pointer(&mem[0]))), 8, 0, 0)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if r.Due() {
		t.Error("due before anything happened")
	}
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); !r.Due(); {
		if time.Now().After(end) {
			t.Fatal("not due though the read is done")
		}
	}
	if n := r.Ready(); n != 0 {
		t.Fatalf("%d completions without an enter", n)
	}
	wantRes(t, "read", one(t, r), 8)
	if r.Due() {
		t.Error("still due")
	}
}

func TestFullQueueHandsOutNil(t *testing.T) {
	const entries = 4
	r := newRing(t, Config{Entries: entries})
	for range 2 {
		for range entries {
			prepNop(mustSQE(t, r))
		}
		if r.SQE() != nil {
			t.Fatalf("an entry beyond the %d of the queue", entries)
		}
		if err := r.Submit(); err != nil {
			t.Fatal(err)
		}
	}
	collect(t, r, 2*entries)
}

func TestEntriesAreZeroed(t *testing.T) {
	r := newRing(t, Config{Entries: 1, SQE128: true})
	for range 2 {
		s := mustSQE(t, r)
		if *s.Cmd80() != [80]byte{} {
			t.Fatalf("command area holds %x", *s.Cmd80())
		}
		user := *s
		if user != (SQE{}) {
			t.Fatalf("entry holds %+v", user)
		}
		prepNop(s)
		s.Addr3 = ^uint64(0)
		*s.Cmd80() = [80]byte{79: 0xff}
		one(t, r)
	}
}

func TestCompletionQueueOverflow(t *testing.T) {
	for name, cfg := range configs {
		t.Run(name, func(t *testing.T) {
			cfg.Entries = 4 // and 8 completions
			r := newRing(t, cfg)
			const n = 64
			for i := range uint64(n) {
				s := r.SQE()
				if s == nil {
					if err := r.Submit(); err != nil {
						t.Fatal(err)
					}
					s = mustSQE(t, r)
				}
				prepNop(s)
				s.UserData = i
			}
			if err := r.Submit(); err != nil {
				t.Fatal(err)
			}
			// Without another wait: Reap itself sees to those that found no room.
			var got []CQE
			buf := make([]CQE, 3)
			for k := r.Reap(buf); k > 0; k = r.Reap(buf) {
				got = append(got, buf[:k]...)
			}
			if len(got) != n {
				t.Fatalf("%d completions, want %d", len(got), n)
			}
			for i, c := range got {
				if c.UserData != uint64(i) {
					t.Fatalf("completion %d has user data %d", i, c.UserData)
				}
			}
		})
	}
}

func TestReadWrite(t *testing.T) {
	const n = 8192
	for _, how := range []string{"plain", "fixed file", "fixed file and buffer"} {
		t.Run(how, func(t *testing.T) {
			r := newRing(t, configs["deferred"])
			f, other := tempFile(t), tempFile(t)
			mem := mapped(t, 2*n)
			for i := range n {
				mem[i] = byte(i * 7)
			}
			fd := int(f.Fd())
			if how != "plain" {
				if err := r.RegisterFiles(4); err != nil {
					t.Fatal(err)
				}
				// Two at once: the second goes to place 2.
				if err := r.UpdateFiles(1, []int32{int32(other.Fd()), int32(f.Fd())}); err != nil {
					t.Fatal(err)
				}
				fd = 2
			}
			if how == "fixed file and buffer" {
				if err := r.RegisterBuffers(3); err != nil {
					t.Fatal(err)
				}
				if err := r.UpdateBuffers(1, [][]byte{mem[:n], mem[n:]}); err != nil {
					t.Fatal(err)
				}
			}
			s := mustSQE(t, r)
			if how == "fixed file and buffer" {
				s.PrepWriteFixed(fd, address(mem), n, 512, unix.RWF_DSYNC, 1)
			} else {
				s.PrepWrite(fd, address(mem), n, 512, unix.RWF_DSYNC)
			}
			if how != "plain" {
				s.SetFixedFile()
			}
			wantRes(t, "write", one(t, r), n)
			s = mustSQE(t, r)
			s.PrepFsync(fd, IORING_FSYNC_DATASYNC)
			if how != "plain" {
				s.SetFixedFile()
			}
			wantRes(t, "fsync", one(t, r), 0)
			s = mustSQE(t, r)
			if how == "fixed file and buffer" {
				s.PrepReadFixed(fd, address(mem[n:]), n, 512, 0, 2)
			} else {
				s.PrepRead(fd, address(mem[n:]), n, 512, 0)
			}
			if how != "plain" {
				s.SetFixedFile()
			}
			wantRes(t, "read", one(t, r), n)
			if !bytes.Equal(mem[:n], mem[n:]) {
				t.Fatal("read differs from what was written")
			}
			onDisk, err := os.ReadFile(f.Name())
			if err != nil || len(onDisk) != n+512 || !bytes.Equal(onDisk[512:], mem[:n]) {
				t.Fatalf("file holds %d bytes (%v), want %d at 512", len(onDisk), err, n)
			}
			if st, _ := other.Stat(); st.Size() != 0 {
				t.Fatal("the write went to the other file")
			}
		})
	}
}

func TestReadIntoSlotOfCommand(t *testing.T) {
	// What a command leaves behind in an entry must not reach the next user.
	r := newRing(t, Config{Entries: 1})
	f := tempFile(t)
	mem := mapped(t, 4096)
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	s := mustSQE(t, r)
	s.PrepCommand(int(f.Fd()), 0x1200)
	*s.Cmd() = [16]byte{0: 1, 15: 0xff}
	s.OpFlags = 1 << 7
	if c := one(t, r); c.Res >= 0 {
		t.Fatalf("command on a regular file: result %d, want an error", c.Res)
	}
	mustSQE(t, r).PrepRead(int(f.Fd()), address(mem), 4096, 0, 0)
	wantRes(t, "read", one(t, r), 4096)
}

func TestFallocate(t *testing.T) {
	r := newRing(t, Config{Entries: 1})
	f := tempFile(t)
	const size = 5 << 30 // beyond 32 bits
	mustSQE(t, r).PrepFallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 1<<20, 1<<20)
	wantRes(t, "allocate", one(t, r), 0)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), size-1); err != nil {
		t.Fatal(err)
	}
	mustSQE(t, r).PrepFallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
	wantRes(t, "punch", one(t, r), 0)
	got := []byte{1}
	if _, err := f.ReadAt(got, size-1); err != nil || got[0] != 0 {
		t.Fatalf("last byte %d (%v) after the hole, want 0", got[0], err)
	}
}

func TestPollTimeoutCancel(t *testing.T) {
	r := newRing(t, configs["deferred"])
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(efd)

	ts := (*Timespec)(unsafe.Pointer(&mapped(t, 4096)[0]))
	ts.Nsec = int64(time.Millisecond)
	mustSQE(t, r).PrepTimeout(ts, 0, 0)
	wantRes(t, "timeout", one(t, r), -int32(unix.ETIME))

	s := mustSQE(t, r)
	s.PrepPollAdd(efd, unix.POLLIN)
	s.UserData = 1
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	s = mustSQE(t, r)
	s.PrepCancel(1)
	s.UserData = 2
	for _, c := range collect(t, r, 2) {
		want := int32(0)
		if c.UserData == 1 {
			want = -int32(unix.ECANCELED)
		}
		wantRes(t, fmt.Sprintf("entry %d", c.UserData), c, want)
	}

	mustSQE(t, r).PrepPollAdd(efd, unix.POLLIN)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(efd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	wantRes(t, "poll", one(t, r), unix.POLLIN)
}

func TestRegisteredRing(t *testing.T) {
	r := newRing(t, configs["deferred"])
	for range 2 {
		if err := r.RegisterRing(); err != nil {
			t.Fatal(err)
		}
		for _, raw := range []bool{false, true} {
			prepNop(mustSQE(t, r))
			if err := r.SubmitAndWait(1, raw); err != nil {
				t.Fatal(err)
			}
			wantRes(t, "nop", one(t, r), 0)
		}
		if err := r.unregisterRing(); err != nil {
			t.Fatal(err)
		}
		prepNop(mustSQE(t, r))
		wantRes(t, "nop", one(t, r), 0)
	}
}

func TestRegisterErrors(t *testing.T) {
	r := newRing(t, Config{Entries: 1})
	if err := r.UpdateFiles(0, []int32{0}); !errors.Is(err, unix.ENXIO) {
		t.Errorf("update without a table: %v, want ENXIO", err)
	}
	mem := mapped(t, 4096)
	if err := r.UpdateBuffers(0, [][]byte{mem}); !errors.Is(err, unix.ENXIO) {
		t.Errorf("update of buffers without a table: %v, want ENXIO", err)
	}
	if err := r.RegisterBuffers(0); err == nil {
		t.Error("no buffers at all were registered")
	}
	if err := r.RegisterBuffers(16); err != nil {
		t.Error(err)
	}
	if err := r.RegisterBuffers(16); !errors.Is(err, unix.EBUSY) {
		t.Errorf("second table of buffers: %v, want EBUSY", err)
	}
	if err := r.UpdateBuffers(15, [][]byte{mem, mem}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("buffer beyond the table: %v, want EINVAL", err)
	}
	if err := r.UpdateBuffers(15, [][]byte{mem}); err != nil {
		t.Error(err)
	}
	if err := r.UpdateBuffers(15, [][]byte{nil}); err != nil {
		t.Errorf("emptying a place: %v", err)
	}
	if err := r.RegisterFiles(2); err != nil {
		t.Error(err)
	}
	if err := r.UpdateFiles(0, []int32{1 << 20}); !errors.Is(err, unix.EBADF) {
		t.Errorf("bad descriptor: %v, want EBADF", err)
	}
}

func TestBadConfig(t *testing.T) {
	for _, cfg := range []Config{{}, {Entries: MaxEntries + 1}, {Entries: 1, DeferTaskrun: true}} {
		if r, err := New(cfg); err == nil {
			r.Close()
			t.Errorf("New(%+v) made a ring", cfg)
		}
	}
}

// ringMappings counts the process's mappings of rings and its descriptors of
// them.
func ringMappings(t *testing.T) (maps, fds int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	maps = strings.Count(string(b), "[io_uring]")
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.Contains(to, "[io_uring]") {
			fds++
		}
	}
	return maps, fds
}

func TestCloseLeavesNothing(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, cfg := range []Config{
		{Entries: 1}, {Entries: 256}, {Entries: 1, SQE128: true}, {Entries: 32, SQE128: true},
		{Entries: 64, SQE128: true}, {Entries: 512, SQE128: true, SingleIssuer: true, DeferTaskrun: true},
	} {
		maps, fds := ringMappings(t)
		r, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if m, f := ringMappings(t); m <= maps || f != fds+1 {
			t.Fatalf("%+v: %d mappings and %d descriptors with the ring, %d and %d without", cfg, m, f, maps, fds)
		}
		flags, err := unix.FcntlInt(uintptr(r.fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%+v: descriptor flags %#x (%v), want close-on-exec", cfg, flags, err)
		}
		if err := r.RegisterRing(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if m, f := ringMappings(t); m != maps || f != fds {
			t.Fatalf("%+v: %d mappings and %d descriptors left, were %d and %d", cfg, m, f, maps, fds)
		}
	}
}

// TestCloseEndsPendingOperations: a closed ring lets go of the files of its
// operations, though the thread that it was registered with lives on.
func TestCloseEndsPendingOperations(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, err := New(configs["deferred"])
	if err != nil {
		t.Fatal(err)
	}
	if err := r.RegisterRing(); err != nil {
		t.Fatal(err)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[1])
	r.SQE().PrepRead(pipe[0], address(mapped(t, 4096)), 1, 0, 0)
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
	unix.Close(pipe[0])
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// The pipe has no reader once the operation is gone.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		fds := []unix.PollFd{{Fd: int32(pipe[1])}}
		if n, _ := unix.Poll(fds, 0); n == 1 && fds[0].Revents&unix.POLLERR != 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the operation of a closed ring still holds its file")
		}
	}
}

func TestNoAllocation(t *testing.T) {
	r := newRing(t, configs["deferred"])
	var buf [8]CQE
	for _, raw := range []bool{false, true} {
		allocs := testing.AllocsPerRun(500, func() {
			for i := range uint64(4) {
				s := r.SQE()
				prepNop(s)
				s.UserData = i
			}
			if err := r.SubmitAndWait(4, raw); err != nil {
				panic(err)
			}
			for got := 0; got < 4; got += r.Reap(buf[:]) {
				if err := r.SubmitAndWait(0, raw); err != nil {
					panic(err)
				}
			}
		})
		if allocs != 0 {
			t.Errorf("raw %v: %v allocations a turn, want 0", raw, allocs)
		}
	}
}

// TestCollectDuringRawWait: a thread that waits raw, without a time limit,
// must not stop the world's stopping.
func TestCollectDuringRawWait(t *testing.T) {
	if strings.Contains(os.Getenv("GODEBUG"), "asyncpreemptoff=1") {
		t.Skip("without the preemption signal a raw wait needs a time limit")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	efd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(efd)
	mem := mapped(t, 4096)
	waiting := make(chan error)
	go func() {
		runtime.LockOSThread()
		r, err := New(configs["deferred"])
		waiting <- err
		if err != nil {
			return
		}
		r.SQE().PrepRead(efd, address(mem), 8, 0, 0)
		for r.Ready() == 0 && err == nil {
			err = r.SubmitAndWait(1, true)
		}
		r.Close()
		waiting <- err
	}()
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Millisecond)
	collected := make(chan time.Duration)
	go func() {
		begin := time.Now()
		for range 10 {
			runtime.GC()
		}
		collected <- time.Since(begin) / 10
	}()
	select {
	case d := <-collected:
		t.Logf("a collection takes %v", d)
	case <-time.After(time.Minute):
		t.Error("runtime.GC does not end while a ring waits raw")
	}
	if _, err := unix.Write(efd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
}

func TestSetupErrors(t *testing.T) {
	for _, c := range []struct {
		errno  unix.Errno
		sysctl string
		is     error
		says   string
	}{
		{unix.EPERM, "2", ErrDisabled, "kernel.io_uring_disabled=2"},
		{unix.EPERM, "1", ErrDisabled, "kernel.io_uring_group"},
		{unix.EPERM, "0", ErrDisabled, "seccomp"},
		{unix.EPERM, "", ErrDisabled, "seccomp"},
		{unix.ENOSYS, "", ErrNotSupported, "CONFIG_IO_URING"},
		{unix.ENOMEM, "0", ErrMemlock, "RLIMIT_MEMLOCK"},
		{unix.EMFILE, "0", unix.EMFILE, "too many open files"},
	} {
		err := setupError(c.errno, c.sysctl)
		if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("errno %d, sysctl %q: %q, want %v and %q", c.errno, c.sysctl, err, c.is, c.says)
		}
	}
}

// TestSeccomp makes a ring in a process whose seccomp filter refuses it.
func TestSeccomp(t *testing.T) {
	const env = "URING_TEST_SECCOMP"
	if os.Getenv(env) != "" {
		runtime.LockOSThread()
		if err := refuseSetup(unix.EPERM); err != nil {
			fmt.Println("cannot filter:", err)
			os.Exit(0)
		}
		_, err := New(Config{Entries: 1})
		fmt.Println(errors.Is(err, ErrDisabled), err)
		os.Exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSeccomp$")
	cmd.Env = append(os.Environ(), env+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("child: %v: %s", err, out)
	}
	if strings.Contains(string(out), "cannot filter") {
		t.Skipf("this machine allows no seccomp filter: %s", out)
	}
	if !strings.HasPrefix(string(out), "true make ring: io_uring is disabled") {
		t.Fatalf("refused by seccomp: %s", out)
	}
}

// refuseSetup has io_uring_setup fail with errno on this thread for good.
func refuseSetup(errno unix.Errno) error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0)
}

func BenchmarkNop(b *testing.B) {
	for _, batch := range []int{1, 32} {
		for _, raw := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/batch=%d/raw=%v", Build, batch, raw), func(b *testing.B) {
				r := newRing(b, Config{Entries: 64, SingleIssuer: true, DeferTaskrun: true, CoopTaskrun: true})
				var cqes [64]CQE
				for n := 0; n < b.N; n += batch {
					for range batch {
						prepNop(r.SQE())
					}
					if err := r.SubmitAndWait(uint32(batch), raw); err != nil {
						b.Fatal(err)
					}
					for got := 0; got < batch; {
						k := r.Reap(cqes[:])
						if got += k; k == 0 {
							if err := r.SubmitAndWait(1, raw); err != nil {
								b.Fatal(err)
							}
						}
					}
				}
			})
		}
	}
}
