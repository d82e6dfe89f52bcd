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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

var lifeKinds = []string{"new", "directory", "lender", "device"}

// TestReopen kills a process after each of its steps, with storage of each kind and
// with all of them. The next one takes over what there is, and is killed too, before
// a third does the rest.
func TestReopen(t *testing.T) {
	combinations := [][]string{lifeKinds, append([]string{"own"}, lifeKinds...), append([]string{"encrypted"}, lifeKinds...)}
	if !testing.Short() {
		for _, kind := range lifeKinds {
			combinations = append(combinations, []string{kind})
		}
	}
	for _, kinds := range combinations {
		for until, stage := range map[string]string{
			"new": "created", "add": "created", "append": "created", "take": "taken", "image": "taken", "write": "taken", "written": "taken",
			"abort": "destroying", "destroy": "destroying", "gone": "unknown",
		} {
			t.Run(kinds[0]+" "+until, func(t *testing.T) {
				var l life
				switch kinds[0] {
				case "own":
					l = ownNamespace(newLife(t, kinds[1:]...))
				case "encrypted":
					l = newLife(t, kinds[1:]...)
					l.Encrypt = true
				default:
					l = newLife(t, kinds...)
				}
				l.Until = until
				if steps, _ := l.live(t, "run"); !slices.Contains(steps, until) {
					t.Fatalf("it came to %v", steps)
				}
				l.Until = "over"
				if steps, _ := l.live(t, "serve"); !slices.Contains(steps, stage) {
					t.Errorf("what is taken over is %v, not %s", steps, stage)
				}
				l.Until = "served"
				l.live(t, "serve")
				l.Until = ""
				steps, _ := l.live(t, "serve")
				if !slices.Contains(steps, "over") {
					t.Errorf("the last came to %v", steps)
				}
				l.checkGone(t)
				b, err := os.ReadFile(l.path("disk"))
				if err != nil {
					t.Fatal(err)
				}
				if (until == "write" || until == "written") && (b[0] != 'A' || b[lifeSize/2] != 'B') {
					t.Errorf("the disk holds %q and %q", b[0], b[lifeSize/2])
				}
			})
		}
	}
}

// ownNamespace has the processes live in mount namespaces of their own. This one
// plays process 1.
func ownNamespace(l life) life {
	l.Root = fmt.Sprintf("/proc/%d/root", os.Getpid())
	return l
}

// dieTaken is the life of a snapshot that is taken, and written over, in a process
// that dies.
func dieTaken(t *testing.T, l life, change func(d *daemon, s *Snapshot)) {
	t.Helper()
	d, s := begun(t, l)
	if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if err := d.write(0, lifeSize/4, 'A'); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(d, s)
	}
	d.die(s)
}

// begun is a snapshot that was not taken.
func begun(t *testing.T, l life) (*daemon, *Snapshot) {
	t.Helper()
	d := daemonOf(t, l)
	c := d.config()
	c.Pending = true
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Add(d.filter, disk1); err != nil {
		t.Fatal(err)
	}
	for _, path := range l.Storage {
		p, err := disk.Machine().OpenPlace(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Append(StorageConfig{Place: p, RealPath: path, Reserve: l.Reserve, Note: json.RawMessage(`"` + path + `"`), Known: disk.Identity{"test"},
			Probe: func(*os.File) (string, error) { return "", nil }}); err != nil {
			t.Fatal(err)
		}
	}
	return d, s
}

func daemonOf(t *testing.T, l life) *daemon {
	t.Helper()
	d, err := l.start()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// die ends what a process has: its queues, and the claims that I/O under way keeps.
func (d *daemon) die(s *Snapshot) {
	for _, q := range []*blockdev.RingQueue{d.control, d.thread, d.show} {
		q.Stop()
	}
	for _, st := range s.storage {
		st.close()
	}
	d.orig.Close()
	d.cbt.Close()
}

func (l life) left(t *testing.T) *Left {
	t.Helper()
	left, err := LeftBehind(l.path("state"))
	if err != nil || len(left) != 1 {
		t.Fatalf("%d left, %v", len(left), err)
	}
	return left[0]
}

// TestLeft: the next daemon is told all that was on record.
func TestLeft(t *testing.T) {
	l := newLife(t, "directory", "new")
	im := Image{Number: 7, Tag: 1<<63 | 1, Link: "/dev/link"}
	old := disk1
	disk1.Block = 4 << 10
	defer func() { disk1 = old }()
	dieTaken(t, l, func(_ *daemon, s *Snapshot) {
		if err := errors.Join(s.SetImage(0, im), s.SetNote(json.RawMessage(`{"frozen":1}`))); err != nil {
			t.Fatal(err)
		}
	})
	left := l.left(t)
	if left.Err != nil || left.Stage != Taken || !left.Pending || left.ID.String() != l.ID || left.Chunk != 4<<10 || left.Broken != 0 ||
		!slices.Equal(left.Devices, []Device{disk1}) || !slices.Equal(left.Images, []Image{im}) || string(left.Note) != `{"frozen":1}` ||
		len(left.Storage) != 2 || string(left.Storage[1]) != `"`+l.Storage[1]+`"` || time.Since(left.Created) > time.Minute {
		t.Errorf("%+v", left)
	}
	d := daemonOf(t, l)
	s, err := left.Reopen(d.config(), []*filter.Filter{d.filter})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetPending(false); err != nil {
		t.Fatal(err)
	}
	if s.align != disk1.Block {
		t.Errorf("storage has to fit blocks of %d bytes", s.align)
	}
	// What the next daemon changes is on record too, and one more storage.
	dir := t.TempDir()
	appendDir(t, s, dir)
	d.die(s)
	if left = l.left(t); left.Pending || len(left.Storage) != 3 || !slices.Equal(left.Images, []Image{im}) {
		t.Errorf("after another: %+v", left)
	}
	if err := left.Clear(d.config()); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}

// TestReopenImage: what was written to an image is there in the next life, and what
// had not been stored when the process died.
func TestReopenImage(t *testing.T) {
	l := newLife(t, "directory")
	dieTaken(t, l, func(d *daemon, s *Snapshot) {
		q := s.Image(0).NewQueue(d.show)
		if err := do(d.show, q, ublk.OpWrite, lifeSize/2, bytes.Repeat([]byte{'I'}, 4096)); err != nil {
			t.Fatal(err)
		}
	})
	d := daemonOf(t, l)
	s, err := l.left(t).Reopen(d.config(), []*filter.Filter{d.filter})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, lifeSize)
	if err := do(d.show, s.Image(0).NewQueue(d.show), ublk.OpRead, 0, got); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{'x'}, lifeSize)
	copy(want[lifeSize/2:], bytes.Repeat([]byte{'I'}, 4096))
	if !bytes.Equal(got, want) {
		t.Error("the image is not what it was")
	}
	if err := d.destroy(s); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}

// TestReopenBroken: that a snapshot broke is told to the next daemon, unless the last
// one has said that it is known.
func TestReopenBroken(t *testing.T) {
	for _, told := range []bool{false, true} {
		l := newLife(t, "directory")
		dieTaken(t, l, func(d *daemon, s *Snapshot) {
			s.Break(unix.ETIMEDOUT)
			if e := <-d.events; e.Kind != diffarea.Corrupted {
				t.Fatalf("%+v", e)
			}
			if told {
				s.Told()
			}
		})
		left := l.left(t)
		if left.Stage != Taken || left.Broken != unix.ETIMEDOUT {
			t.Errorf("it is %v, broken by %v", left.Stage, left.Broken)
		}
		d := daemonOf(t, l)
		s, err := left.Reopen(d.config(), []*filter.Filter{d.filter})
		if err != nil {
			t.Fatal(err)
		}
		if s.Err() != unix.ETIMEDOUT {
			t.Errorf("it is broken by %v", s.Err())
		}
		if err := d.destroy(s); err != nil {
			t.Error(err)
		}
		select {
		case e := <-d.events:
			if told || e.Kind != diffarea.Corrupted || e.Errno != unix.ETIMEDOUT {
				t.Errorf("told %v, and told again: %+v", told, e)
			}
		default:
			if !told {
				t.Error("nobody was told")
			}
		}
		l.checkGone(t)
	}
}

// TestReopenGivenUp: a daemon that died right after Abort has begun to destroy.
func TestReopenGivenUp(t *testing.T) {
	l := newLife(t, "new")
	dieTaken(t, l, func(_ *daemon, s *Snapshot) {
		_ = s.call(func(done func(error)) { s.engine.Abort(); done(nil) })
	})
	left := l.left(t)
	if left.Stage != Destroying {
		t.Errorf("it is %v", left.Stage)
	}
	if err := left.Clear(patience); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}

// TestStorageLost: a storage that is not the one that it was ends the snapshot, and
// nobody else's data.
func TestStorageLost(t *testing.T) {
	for name, c := range map[string]struct {
		kind string
		lose func(t *testing.T, l life) error
	}{
		"unmounted": {"directory", func(_ *testing.T, l life) error {
			return unix.Unmount(pins{dir: l.path("state/" + l.ID)}.point(0), 0)
		}},
		"another disk of the number": {"device", func(t *testing.T, l life) error {
			file := filepath.Join(t.TempDir(), "other")
			writeFile(t, file, "precious"+strings.Repeat("x", 4*lifeSize-8), 0o600)
			return errors.Join(exec.Command("losetup", "-d", l.Storage[0]).Run(), exec.Command("losetup", l.Storage[0], file).Run())
		}},
		"held by another": {"device", func(t *testing.T, l life) error {
			f, err := os.OpenFile(l.Storage[0], os.O_RDONLY|unix.O_EXCL, 0)
			t.Cleanup(func() { f.Close() })
			return err
		}},
		"words cut off": {"directory", func(_ *testing.T, l life) error {
			return os.Truncate(filepath.Join(l.path("state"), l.ID, "words-0"), 8)
		}},
		"pool gone": {"directory", func(_ *testing.T, l life) error {
			return os.Remove(filepath.Join(l.path("state"), l.ID, "pool"))
		}},
		"log of others": {"directory", func(_ *testing.T, l life) error {
			return os.Chmod(filepath.Join(l.path("state"), l.ID, logName), 0o666)
		}},
		"log of zeroes": {"lender", func(_ *testing.T, l life) error {
			path := filepath.Join(l.path("state"), l.ID, logName)
			return errors.Join(os.Truncate(path, 0), os.Truncate(path, diffarea.LogStateSize))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLife(t, c.kind)
			dieTaken(t, l, nil)
			if err := c.lose(t, l); err != nil {
				t.Fatal(err)
			}
			d := daemonOf(t, l)
			config := d.config()
			config.StorageTimeout = time.Second
			left := l.left(t)
			if _, err := left.Reopen(config, []*filter.Filter{d.filter}); err == nil {
				t.Fatal("it is taken over")
			} else {
				t.Log(err)
			}
			if d.filter.Held() {
				t.Error("the filter holds it")
			}
			if err := d.write(0, 4096, 'C'); err != nil { // the device goes on
				t.Error(err)
			}
			err := left.Clear(config)
			if remains := err != nil && strings.Contains(err.Error(), "copied data may remain"); remains != (c.kind == "device") {
				t.Errorf("clear: %v", err)
			}
			if c.kind != "device" {
				l.checkGone(t)
			} else if name == "another disk of the number" {
				if b, err := os.ReadFile(l.Storage[0]); err != nil || string(b[:8]) != "precious" {
					t.Errorf("another's disk holds %q, %v", b[:8], err)
				}
			}
		})
	}
}

// TestClaimFailsOnce: a storage that cannot be had is waited for once, however many
// snapshots it has, and not again when they are to be taken over.
func TestClaimFailsOnce(t *testing.T) {
	shared := t.TempDir()
	var lives []life
	var left []*Left
	var held []*os.File
	errs := make([]error, 3)
	for range errs {
		l := newLife(t)
		l.Storage = []string{shared}
		dieTaken(t, l, nil)
		pin, err := os.Open(pins{dir: l.path("state/" + l.ID)}.point(0))
		if err != nil {
			t.Fatal(err)
		}
		defer pin.Close()
		if err := lock(int(pin.Fd())); err != nil { // as I/O under way would
			t.Fatal(err)
		}
		lives, left, held = append(lives, l), append(left, l.left(t)), append(held, pin)
	}
	config := func(l life) (*daemon, Config) {
		d := daemonOf(t, l)
		c := d.config()
		c.StorageTimeout = 100 * time.Millisecond
		return d, c
	}
	var wait sync.WaitGroup
	for i, l := range left {
		_, c := config(lives[i])
		wait.Add(1)
		go func() {
			defer wait.Done()
			errs[i] = l.Claim(c)
		}()
	}
	wait.Wait()
	for i, l := range left {
		if !errors.Is(errs[i], ErrStorageInUse) {
			t.Fatalf("claimed while another has it: %v", errs[i])
		}
		held[i].Close()
		// Whoever tried again would have it now.
		d, c := config(lives[i])
		if _, err := l.Reopen(c, []*filter.Filter{d.filter}); err == nil || err.Error() != errs[i].Error() {
			t.Errorf("reopened: %v, after %v", err, errs[i])
		}
		if err := l.Clear(c); err != nil {
			t.Error(err)
		}
		lives[i].checkGone(t)
	}
}

// TestVoid: a take that had begun and was not made leaves the change map such that
// the next increment has all that changed, and then the snapshot can be taken.
func TestVoid(t *testing.T) {
	l := newLife(t, "directory")
	d, s := begun(t, l)
	before, err := d.cbt.Info()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.write(0, 64<<10, 'y'); err != nil {
		t.Fatal(err)
	}
	if err := s.prepare(); err != nil {
		t.Fatal(err)
	}
	d.cbt.Switch() // at the cut, which the process does not survive
	d.die(s)

	left := l.left(t)
	d = daemonOf(t, l)
	if _, err := left.Again(d.config(), []*filter.Filter{d.filter}); left.Stage != Taking || err == nil {
		t.Fatalf("it is %v; again without Void: %v", left.Stage, err)
	}
	if err := left.Void([]*cbtmap.Map{d.cbt}); err != nil {
		t.Fatal(err)
	}
	if left = l.left(t); left.Stage != Created {
		t.Errorf("it is %v", left.Stage)
	}
	if s, err = left.Again(d.config(), []*filter.Filter{d.filter}); err != nil {
		t.Fatal(err)
	}
	void, err := d.cbt.Info()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Take(context.Background(), TakeOptions{Limit: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if n := s.TakeInfo(0).ChangesNumber; n != before.ChangesNumber+2 {
		t.Errorf("the take has number %d after %d and one that is void", n, before.ChangesNumber)
	}
	changed := false // since the take that was not: the write came before it
	ranges, err := d.cbt.Changes(void.GenerationID, uint64(void.ChangesNumber))
	if err != nil {
		t.Fatal(err)
	}
	for r, err := range ranges {
		changed = changed || err == nil && r.Offset == 0
	}
	if !changed {
		t.Error("who believed in the void take misses a change")
	}
	if err := d.destroy(s); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}

// TestLogFlipped flips a bit in each byte of the log's heading and of its first
// stretch of storage: the snapshot is refused, or broken, or its image is right.
func TestLogFlipped(t *testing.T) {
	refused := 0
	for i := range 64 + 32 {
		if testing.Short() && i%5 != 0 {
			continue
		}
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			l := newLife(t, "directory")
			dieTaken(t, l, nil)
			path := filepath.Join(l.path("state"), l.ID, logName)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[i] ^= 1 << (i % 8)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			d := daemonOf(t, l)
			left := l.left(t)
			s, err := left.Reopen(d.config(), []*filter.Filter{d.filter})
			if err != nil {
				refused++
				if err := left.Clear(d.config()); err != nil {
					t.Error(err)
				}
				l.checkGone(t)
				return
			}
			if err := d.write(lifeSize/2, lifeSize/2, 'B'); err != nil {
				t.Error(err)
			}
			if err := d.checkImage(s); err != nil && s.Err() == 0 {
				t.Error(err)
			}
			if err := d.destroy(s); err != nil {
				t.Error(err)
			}
			l.checkGone(t)
		})
	}
	if refused < 32 && !testing.Short() {
		t.Errorf("only %d were refused", refused)
	}
	t.Logf("%d were refused", refused)
}
