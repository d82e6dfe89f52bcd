package snapshots

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
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// A life is what a daemon does with a snapshot, in a process of its own, which is
// killed. The next life is another process's.

const lifeEnv = "SNAPSHOTS_LIFE"

// life is what all processes of a test share.
type life struct {
	Dir     string   // of disk, change map and state
	ID      string   // of the snapshot
	Storage []string // paths, in order
	Until   string   // the step after which the process waits to be killed
	Root    string   // Config.Root
	Encrypt bool     // what is stored
	Reserve int      // of the storages
	// Keep is Config.Keep, nil in processes of their own: they forget.
	Keep   func(uuid.UUID, []byte) error `json:"-"`
	Before byte                          // of which the disk is full at the take
}

const lifeSize = 1 << 20

func (l life) path(name string) string { return filepath.Join(l.Dir, name) }

// daemon is the process: one disk and its filter.
type daemon struct {
	life
	control, thread, show *blockdev.RingQueue
	orig                  *blockdev.OSFile
	cbt                   *cbtmap.Map
	filter                *filter.Filter
	queue                 *filter.Queue
	events                chan diffarea.Event
}

func (l life) start() (d *daemon, err error) {
	d = &daemon{life: l, events: make(chan diffarea.Event, 16)}
	for name, q := range map[string]**blockdev.RingQueue{"control": &d.control, "filter": &d.thread, "image": &d.show} {
		if *q, err = blockdev.NewRingQueue(blockdev.RingConfig{Name: name, Depth: 8}); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Open(l.path("disk"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	d.orig = blockdev.NewOSFile(fd, l.path("disk"))
	if d.cbt, err = cbtmap.Open(l.path("cbt")); err != nil {
		return nil, err
	}
	d.filter = filter.New(filter.Config{Orig: d.orig, Size: lifeSize, CBT: d.cbt, Queues: 1})
	d.queue = d.filter.NewQueue(0, d.thread)
	return d, nil
}

func (d *daemon) config() Config {
	return Config{
		ID: uuid.MustParse(d.ID), ChunkSize: 4 << 10, PoolSize: 64 << 10, Portion: 256 << 10, StateDir: d.path("state"), Root: d.Root,
		Encrypt: d.Encrypt, Stores: d.control, Keep: d.Keep, MachineID: disk.Machine().MachineID,
		StorageTimeout: 20 * time.Second, Control: d.control, OnEvent: func(e diffarea.Event) { d.events <- e },
	}
}

// step says, to the test, that a step is done, and waits to be killed after it if
// that is the one.
func (d *daemon) step(name string) {
	fmt.Println("step", name)
	if name == d.Until {
		select {}
	}
}

// do is an operation of the filter or of an image.
func do(q blockdev.Queue, h ublk.Handler, op ublk.Op, off int64, b []byte) error {
	done := make(result, 1)
	r := ublk.NewRequest(0, done)
	r.Op, r.Off, r.Len, r.Buf = op, off, int64(len(b)), blockdev.MemBuf(b)
	q.Post(&blockdev.Task{Run: func() { h.Handle(r) }})
	if errno := <-done; errno != 0 {
		return errno
	}
	return nil
}

// write fills n bytes of the disk through its filter.
func (d *daemon) write(off, n int64, with byte) error {
	return do(d.thread, d.queue, ublk.OpWrite, off, bytes.Repeat([]byte{with}, int(n)))
}

// run is a whole life of a snapshot.
func (d *daemon) run() error {
	s, err := New(d.config())
	if err != nil {
		return err
	}
	d.step("new")
	if err := s.Add(d.filter, disk1); err != nil {
		return err
	}
	d.step("add")
	for _, path := range d.Storage {
		h := disk.Machine()
		if d.Root != "" {
			h.Root = d.Root
		}
		p, err := h.OpenPlace(path)
		if err != nil {
			return err
		}
		if err := s.Append(StorageConfig{
			Place: p, RealPath: h.RealPath(p), Reserve: d.Reserve, Note: json.RawMessage(`"` + path + `"`), Probe: func(*os.File) (string, error) { return "", nil },
		}); err != nil {
			return err
		}
		d.step("append")
	}
	if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil {
		return err
	}
	d.step("take")
	if err := s.SetImage(0, Image{Number: 7, Tag: 1 << 63, Link: "/dev/link"}); err != nil {
		return err
	}
	d.step("image")
	if err := d.write(0, lifeSize/2, 'A'); err != nil {
		return err
	}
	d.step("write")
	if err := d.write(lifeSize/2, lifeSize/4, 'A'); err != nil {
		return err
	}
	d.step("written")
	return d.destroy(s)
}

func (d *daemon) destroy(s *Snapshot) error {
	if err := s.Abort(); err != nil {
		return err
	}
	d.step("abort")
	if err := s.SetImage(0, Image{Number: NoImage}); err != nil {
		return err
	}
	s.Destroy()()
	d.step("destroy")
	if err := s.GiveBack(); err != nil {
		return err
	}
	d.step("gone")
	return nil
}

// takeOver is what the next daemon does first. There may be no snapshot any more.
func (d *daemon) takeOver() (s *Snapshot, stage Stage, err error) {
	left, err := LeftBehind(d.path("state"))
	if err != nil || len(left) == 0 {
		return nil, 0, err
	}
	l := left[0]
	if len(left) > 1 || l.Err != nil {
		return nil, 0, fmt.Errorf("%d left, %w", len(left), l.Err)
	}
	stage = l.Stage
	var filters []*filter.Filter
	for range l.Devices {
		filters = append(filters, d.filter)
	}
	if stage == Taking {
		if err := l.Void([]*cbtmap.Map{d.cbt}); err != nil {
			return nil, stage, err
		}
	}
	switch l.Stage {
	case Destroying:
		return nil, stage, l.Clear(d.config())
	case Taken:
		s, err = l.Reopen(d.config(), filters)
	default:
		s, err = l.Again(d.config(), filters)
	}
	return s, stage, err
}

// serve is a life that takes over: the image shows what the disk held, writes go on,
// and in the end it is destroyed.
func (d *daemon) serve() error {
	s, stage, err := d.takeOver()
	if err != nil {
		return err
	}
	d.step(stage.String())
	// A copy of a pin in this namespace would keep the storage for as long as it lives.
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil {
		return err
	} else if d.Root != "" && bytes.Contains(mounts, []byte(d.path("state"))) {
		return errors.New("it has pins of its own")
	}
	d.step("over")
	if s == nil {
		return nil
	}
	if stage == Taken {
		if s.Err() != 0 {
			return fmt.Errorf("the snapshot is broken: %w", s.Err())
		}
		if err := d.checkImage(s); err != nil {
			return err
		}
		if err := d.write(lifeSize/2, lifeSize/2, 'B'); err != nil {
			return err
		}
		if err := d.checkImage(s); err != nil {
			return fmt.Errorf("after another write: %w", err)
		}
		d.step("served")
	} else {
		d.step("served")
		if len(s.storage) > 0 && len(s.filters) > 0 {
			if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil {
				return fmt.Errorf("take what was made again: %w", err)
			}
			if err := d.write(0, 64<<10, 'A'); err != nil {
				return err
			}
			if err := d.checkImage(s); err != nil {
				return fmt.Errorf("made again: %w", err)
			}
		}
	}
	if len(s.filters) == 0 {
		if err := s.Abort(); err != nil {
			return err
		}
		s.Destroy()()
		return s.GiveBack()
	}
	return d.destroy(s)
}

func (d *daemon) checkImage(s *Snapshot) error {
	got := make([]byte, lifeSize)
	if err := do(d.show, s.Image(0).NewQueue(d.show), ublk.OpRead, 0, got); err != nil {
		return fmt.Errorf("read the image: %w", err)
	}
	for i, b := range got {
		if b != d.Before {
			return fmt.Errorf("byte %d of the image is %q, and was %q at the take", i, b, d.Before)
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	text := os.Getenv(lifeEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	var l life
	if err := json.Unmarshal([]byte(text), &l); err != nil {
		panic(err)
	}
	d, err := l.start()
	if err == nil {
		if len(os.Args) > 1 && os.Args[1] == "serve" {
			err = d.serve()
		} else {
			err = d.run()
		}
	}
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// newLife makes a disk, its change map, and storage of each kind that is asked for.
func newLife(t *testing.T, kinds ...string) life {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: storage is kept by a mount")
	}
	l := life{Dir: memoryDir(t), ID: uuid.NewString(), Before: 'x'}
	writeFile(t, l.path("disk"), strings.Repeat("x", lifeSize), 0o600)
	m, err := cbtmap.Create(l.path("cbt"), lifeSize, cbtmap.DefaultParams())
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	dir := t.TempDir()
	for _, kind := range kinds {
		path := filepath.Join(dir, kind)
		switch kind {
		case "new":
		case "directory":
			err = os.Mkdir(path, 0o700)
		case "lender":
			writeFile(t, path, "", 0o640)
			f, _ := os.OpenFile(path, os.O_RDWR, 0)
			err = errors.Join(f.Truncate(2*lifeSize), unix.Fallocate(int(f.Fd()), 0, 0, 2*lifeSize), f.Close())
		case "device":
			path = loopDevice(t, path)
		}
		if err != nil {
			t.Fatal(err)
		}
		l.Storage = append(l.Storage, path)
	}
	t.Cleanup(func() {
		states, _ := os.ReadDir(l.path("state"))
		for _, e := range states {
			p := pins{dir: filepath.Join(l.path("state"), e.Name())}
			for _, n := range p.all() {
				_ = p.release(n)
			}
		}
	})
	return l
}

// loopDevice makes a block device of zeroes.
func loopDevice(t *testing.T, path string) string {
	t.Helper()
	writeFile(t, path, "", 0o600)
	if err := os.Truncate(path, 4*lifeSize); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", path).Output()
	if err != nil {
		t.Skipf("needs loop devices: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "-d", dev).Run(); err != nil {
			t.Errorf("losetup -d %s: %v", dev, err)
		}
	})
	return dev
}

// live runs a process to the step at which it is killed, or to its end, and returns
// the steps that it has done. died says that a death point killed it.
func (l life) live(t *testing.T, what string, env ...string) (steps []string, died bool) {
	t.Helper()
	text, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], what)
	cmd.Env = append(append(os.Environ(), lifeEnv+"="+string(text)), env...)
	cmd.Stderr = os.Stderr
	if l.Root != "" {
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // and private
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if l.Until != "" && strings.HasSuffix(said.String(), "step "+l.Until+"\n") {
			_ = cmd.Process.Kill()
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	for _, line := range strings.Split(said.String(), "\n") {
		if s, ok := strings.CutPrefix(line, "step "); ok {
			steps = append(steps, s)
		}
	}
	killed := false
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		killed = exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	}
	if err != nil && !killed {
		t.Fatalf("%s: %v: %s", what, err, said.String())
	}
	return steps, killed && l.Until == ""
}

// checkGone sees to it that nothing is left of the snapshot, and that the disk and
// the storage are what they were but for what was written to the disk.
func (l life) checkGone(t *testing.T) {
	t.Helper()
	if left, err := os.ReadDir(l.path("state")); err != nil && !os.IsNotExist(err) || len(left) > 0 {
		t.Errorf("the state holds %v, %v", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(l.Dir)) {
		t.Errorf("mounts are left, %v", err)
	}
	for _, path := range l.Storage {
		switch base := filepath.Base(path); {
		case strings.HasPrefix(path, "/dev/"):
			if b, err := os.ReadFile(path); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
				t.Errorf("%s holds something, %v", path, err)
			}
		case base == "new":
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s is still there: %v", path, err)
			}
		case base == "directory":
			if left, err := os.ReadDir(path); err != nil || len(left) > 0 {
				t.Errorf("%s holds %v, %v", path, left, err)
			}
		case base == "lender":
			if st := stat(t, path); st.Size != 2*lifeSize || st.Blocks*512 < st.Size || st.Mode&0o777 != 0o640 {
				t.Errorf("%s has %d bytes in %d blocks, mode %o", path, st.Size, st.Blocks, st.Mode)
			}
		}
		left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), hiddenPrefix+"*"))
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}
