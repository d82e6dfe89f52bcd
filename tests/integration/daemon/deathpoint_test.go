package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// The daemon dies at the n-th step of an operation, for every n, and of taking over
// from one that did. Whoever asked for the operation can do so again, and whoever uses
// a device notices nothing.

// victim is a daemon that can be told where to die.
type victim struct {
	*program.Daemon
	t     *testing.T
	disk  string
	arm   string // file: steps count while it is there
	store string
}

// pattern is what is on the disk when a snapshot is taken.
func pattern(size int, version uint64) []byte {
	b := make([]byte, size)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], version<<32+uint64(i))
	}
	return b
}

const victimSize = 4 << 20

func newVictim(t *testing.T) *victim {
	guest.Need(t)
	v := &victim{t: t, arm: filepath.Join(t.TempDir(), "armed"), store: guest.SmallFS(t, 128<<20)}
	v.disk = guest.LoopDisk(t, victimSize, 512)
	v.Daemon = program.Start(t, "storage_timeout=10s")
	v.StopAndWait()
	v.Program = program.Path(t) + "-deathpoints"
	return v
}

// dies starts the daemon so that it dies at step n after the arming.
func (v *victim) dies(n int) {
	v.t.Helper()
	os.Remove(v.arm)
	v.Restart(fmt.Sprintf("%s=%d", deathpoint.DieAt, n), deathpoint.DieFile+"="+v.arm)
}

func (v *victim) armed() {
	v.t.Helper()
	if err := os.WriteFile(v.arm, nil, 0o600); err != nil {
		v.t.Fatal(err)
	}
}

// try is f with the steps counted. It says whether the daemon has died of it, and
// starts the next if so.
func (v *victim) try(f func() error) (died bool) {
	v.t.Helper()
	v.armed()
	err := f()
	os.Remove(v.arm)
	if !v.Ended(0) && err != nil {
		// It may be about to die, with the answer on its way.
		if v.Ended(time.Second) {
			v.Restart()
			return true
		}
		v.t.Fatalf("a daemon that lives says %v", err)
	}
	if v.Ended(guest.Span(100*time.Millisecond, time.Second)) {
		v.Restart()
		if i, err := v.Info(guest.Context(v.t)); err != nil || i.Lost != nil {
			v.t.Errorf("after the death: %+v, %v", i.Lost, err)
		}
		return true
	}
	return false
}

// device is the filter over the disk, there by now or added.
func (v *victim) device() control.Device {
	v.t.Helper()
	all, err := v.Devices(guest.Context(v.t))
	if err != nil || len(all) > 1 {
		v.t.Fatalf("devices %+v, %v", all, err)
	}
	if len(all) == 0 {
		dev, err := v.AddDevice(guest.Context(v.t), control.AddRequest{Path: v.disk})
		if err != nil {
			v.t.Fatalf("add: %v", err)
		}
		return dev
	}
	return all[0]
}

// write writes version all over the filter.
func (v *victim) write(version uint64) {
	v.t.Helper()
	v.writeHead(version, victimSize)
}

// writeHead writes version to the filter up to end.
func (v *victim) writeHead(version uint64, end int) {
	v.t.Helper()
	f := direct.MustOpen(v.t, v.device().Path, unix.O_RDWR)
	defer f.Close()
	p := direct.Pages(v.t, victimSize)
	copy(p, pattern(victimSize, version))
	for at := 0; at < end; at += 256 << 10 {
		if err := f.WriteAt(p[at:at+256<<10], int64(at)); err != nil {
			v.t.Fatalf("write: %v", err)
		}
	}
}

// shows makes sure that the device at path holds version.
func (v *victim) shows(path string, version uint64) {
	v.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || string(b) != string(pattern(victimSize, version)) {
		v.t.Errorf("%s does not hold version %d: %v", path, version, err)
	}
}

// request is a snapshot of the device.
func (v *victim) request(take bool) control.CreateRequest {
	return control.CreateRequest{Devices: []string{v.device().Name}, ChunkSize: 64 << 10, Storage: []control.Storage{{Path: v.store}}, Take: take}
}

// smallStorage is how much the storage holds that takeSmall gives a snapshot.
const smallStorage = victimSize / 4

// takeSmall takes a snapshot that has to get more storage before all of the disk is
// written to.
func (v *victim) takeSmall() control.Snapshot {
	v.t.Helper()
	r := v.request(false)
	r.Storage[0].Limit = smallStorage
	return v.Taken(v.Create(r).ID)
}

// appendTo gives a snapshot storage of that name.
func (v *victim) appendTo(ctx context.Context, id, name string) error {
	_, err := v.AppendStorage(ctx, control.StorageRequest{ID: id, Storage: control.Storage{Path: filepath.Join(v.store, name)}})
	return err
}

// storedAppended waits until a snapshot of takeSmall has stored all of the disk, and so
// most of it in storage that was appended.
func (v *victim) storedAppended(id string) {
	v.t.Helper()
	guest.WaitFor(v.t, "the whole disk in the storage", func() bool { return v.Show(id).Usage.Stored == victimSize })
}

// nothingRuns makes sure that soon no write-intent log is believed after a power failure of
// a disk that has no filter, because somebody may write to it now.
func (v *victim) nothingRuns() {
	v.t.Helper()
	devices, err := v.Devices(guest.Context(v.t))
	if err != nil {
		v.t.Fatal(err)
	}
	guest.WaitFor(v.t, fmt.Sprintf("the logs of all but %d devices to go", len(devices)), func() bool {
		left, err := filepath.Glob(filepath.Join(v.StateDir, "*.running"))
		return err == nil && len(left) <= len(devices)
	})
}

// clean removes all there is, and makes sure that nothing is left.
func (v *victim) clean() {
	v.t.Helper()
	for _, id := range program.SnapshotIDs(v.t, v.Daemon) {
		v.Destroy(id)
	}
	v.Remove(v.device())
	v.nothingRuns()
	if left, err := os.ReadDir(filepath.Join(v.StateDir, "snapshots")); len(left) > 0 || err != nil && !os.IsNotExist(err) {
		v.t.Errorf("notes left: %v, %v", left, err)
	}
	for _, kind := range []string{"cbt", "counters", "devices", "snapshots"} {
		if left, err := os.ReadDir(filepath.Join(v.RunDir.State(), kind)); err != nil || len(left) > 0 {
			v.t.Errorf("left in %s: %v, %v", kind, left, err)
		}
	}
	if left, err := os.ReadDir(v.store); err != nil || len(left) > 0 {
		v.t.Errorf("left in the storage: %v, %v", left, err)
	}
	if left := guest.UblkDevices(); len(left) > 0 {
		guest.WaitFor(v.t, fmt.Sprintf("the end of %v", left), func() bool { return len(guest.UblkDevices()) == 0 })
	}
	v.StopAndWait()
}

// everyStep runs a part for n = 1, 2, ... until it says that nothing died, and in the long form
// twice more, so that no step was passed over; in the short form some of them, and others on a
// newer kernel.
func everyStep(t *testing.T, offset int, part func(n int) (died bool)) {
	t.Helper()
	everyStepOf(t, 64, offset, part)
}

// everyStepOf is everyStep, each stride-th of them in the short form.
func everyStepOf(t *testing.T, stride, offset int, part func(n int) (died bool)) {
	t.Helper()
	stride = int(guest.Span(time.Duration(stride), 1))
	if guest.KernelAtLeast(t, 7, 0) {
		offset += stride / 2
	}
	lives := 0
	for n := 1 + offset%stride; lives < int(guest.Span(1, 3)) && !t.Failed(); n += stride {
		t.Logf("n = %d", n)
		if part(n) {
			lives = 0 // what runs beside it may have fewer steps at times
			continue
		}
		t.Logf("lives through it at n = %d", n)
		lives++
	}
}

// TestDeathInAdd: what was kept of the disk is not lost, because nobody has written to it.
func TestDeathInAdd(t *testing.T) {
	v := newVictim(t)
	v.Restart()
	before := v.CBT(v.device())
	v.clean()
	guest.Run(t, "addpart", v.disk, "1", "2048", "2048")
	everyStep(t, 0, func(n int) bool {
		v.dies(n)
		died := v.try(func() error {
			_, err := v.AddDevice(guest.Context(t), control.AddRequest{Path: v.disk})
			return err
		})
		v.nothingRuns()
		// From Linux 7.0 on the kernel looks into the table, and there is none.
		disk := filepath.Base(v.device().Path)
		if _, err := os.Stat(filepath.Join("/sys/block", disk, disk+"p1")); err != nil && !guest.KernelAtLeast(t, 7, 0) {
			t.Errorf("n = %d: the filter has no partition: %v", n, err)
		}
		if after := v.CBT(v.device()); after.GenerationID != before.GenerationID {
			t.Errorf("n = %d: the change map began anew: %+v", n, after.History)
		}
		v.write(uint64(n))
		v.shows(v.device().Link, uint64(n))
		v.clean()
		return died
	})
}

// TestDeathInSnapshot dies in each of the operations on a snapshot.
func TestDeathInSnapshot(t *testing.T) {
	v := newVictim(t)
	request := v.request
	// whole are the snapshots, of which there may be one.
	whole := func(t *testing.T) *control.Snapshot {
		t.Helper()
		all, err := v.Snapshots(guest.Context(t))
		if err != nil || len(all) > 1 {
			t.Fatalf("snapshots %+v, %v", all, err)
		}
		if len(all) == 0 {
			return nil
		}
		if all[0].Errno != 0 {
			t.Errorf("broken: %+v", all[0])
		}
		return &all[0]
	}
	held := func(t *testing.T) *control.Snapshot {
		t.Helper()
		if h := v.CBT(v.device()).History; h.Reason == control.HistoryDamaged {
			t.Errorf("the change map was whole all the time: %+v", h)
		}
		return whole(t)
	}
	call := func(f func(ctx context.Context) error) func() error {
		return func() error { return f(guest.Context(t)) }
	}
	t.Run("create", func(t *testing.T) {
		everyStep(t, 0, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			var made string
			died := v.try(call(func(ctx context.Context) error {
				s, err := v.CreateSnapshot(ctx, request(false))
				made = s.ID
				return err
			}))
			s := held(t)
			if made != "" && (s == nil || s.ID != made) {
				t.Errorf("%s was made, and there is %+v", made, s)
			}
			if s != nil {
				if len(s.Storage) != 1 || len(s.Images) != 1 {
					t.Fatalf("half made: %+v", s)
				}
				v.Taken(s.ID)
				v.write(uint64(n) + 1)
				v.shows(held(t).Images[0].Path, uint64(n))
			}
			v.clean()
			return died
		})
	})
	// The take meets a change map that is not whole, and it is said that it has begun a new
	// generation, whatever became of the snapshot.
	t.Run("createTake", func(t *testing.T) {
		// Within the forty-first the take has been made, and nothing told.
		everyStep(t, 40, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			markCorrupted(t, filepath.Join(v.RunDir.State(), "cbt", v.device().Name))
			var s *control.Snapshot
			died := v.try(call(func(ctx context.Context) error {
				made, err := v.CreateSnapshot(ctx, request(true))
				if err == nil {
					s = &made
				}
				return err
			}))
			v.write(uint64(n) + 1)
			now := whole(t)
			switch {
			case s != nil && (now == nil || now.ID != s.ID || now.State != control.SnapshotTaken):
				t.Errorf("it was made, and is %+v", now)
			case now != nil && now.State != control.SnapshotTaken:
				t.Errorf("half made: %+v", now)
			case now != nil:
				v.shows(now.Images[0].Link, uint64(n))
			default:
				v.Taken(v.Create(request(false)).ID)
			}
			if h := v.CBT(v.device()).History; h.Reason != control.HistoryDamaged {
				t.Errorf("n = %d: why there is a new generation: %+v", n, h)
			}
			v.clean()
			return died
		})
	})
	t.Run("take", func(t *testing.T) {
		// Within the sixteenth, the driver has the image's device, and not its disk.
		everyStep(t, 15, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			made := v.Create(request(false))
			died := v.try(call(func(ctx context.Context) error {
				_, err := v.TakeSnapshot(ctx, control.TakeRequest{ID: made.ID})
				return err
			}))
			now := held(t)
			if now == nil {
				t.Fatal("the snapshot is gone")
			}
			if now.State == control.SnapshotCreated {
				v.Taken(now.ID)
			}
			v.write(uint64(n) + 1)
			v.shows(held(t).Images[0].Link, uint64(n))
			v.shows(v.device().Link, uint64(n)+1)
			if _, ranges, err := v.Changes(v.device(), *held(t).Images[0].Take); err != nil || len(ranges) > 0 {
				t.Errorf("changes since the last take: %v, %v", ranges, err)
			}
			v.clean()
			return died
		})
	})
	t.Run("append", func(t *testing.T) {
		everyStep(t, 3, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			made := v.takeSmall()
			v.writeHead(uint64(n)+1, smallStorage/2)
			more := call(func(ctx context.Context) error { return v.appendTo(ctx, made.ID, "named") })
			died := v.try(more)
			v.shows(held(t).Images[0].Link, uint64(n))
			if len(held(t).Storage) == 1 {
				if err := more(); err != nil {
					t.Fatalf("append again: %v", err)
				}
			}
			v.write(uint64(n) + 1)
			v.storedAppended(made.ID)
			v.Kill()
			v.Restart()
			v.shows(held(t).Images[0].Link, uint64(n))
			v.clean()
			return died
		})
	})
	t.Run("destroy", func(t *testing.T) {
		everyStep(t, 0, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			made := v.Create(request(false))
			v.Taken(made.ID)
			v.write(uint64(n) + 1)
			died := v.try(call(func(ctx context.Context) error {
				return v.DestroySnapshot(ctx, control.DestroyRequest{ID: made.ID, Force: true})
			}))
			if s := held(t); s != nil {
				v.shows(s.Images[0].Link, uint64(n))
			}
			v.shows(v.device().Link, uint64(n)+1)
			v.clean()
			return died
		})
	})
	// The storages of which there are notes in the state directory, all their life.
	t.Run("note", func(t *testing.T) {
		raw, encrypted := guest.LoopDisk(t, 32<<20, 512), true
		everyStep(t, 2, func(n int) bool {
			v.dies(n)
			v.write(uint64(n))
			noted := request(true)
			noted.Encrypt = &encrypted // with a key that is made, and wiped
			noted.Storage = []control.Storage{{Path: filepath.Join(v.store, "named")}, {Path: raw}}
			died := v.try(call(func(ctx context.Context) error {
				s, err := v.CreateSnapshot(ctx, noted)
				if err == nil {
					err = v.DestroySnapshot(ctx, control.DestroyRequest{ID: s.ID, Force: true})
				}
				return err
			}))
			v.clean()
			head := make([]byte, 4096)
			if f, err := os.Open(raw); err != nil {
				t.Error(err)
			} else if _, err := f.ReadAt(head, 0); err != nil || f.Close() != nil || !bytes.Equal(head, make([]byte, len(head))) {
				t.Errorf("the device still has our header: %q, %v", head[:64], err)
			}
			return died
		})
	})
	t.Run("recovery", func(t *testing.T) {
		for _, midst := range []bool{false, true} {
			if !guest.Long() && midst == guest.KernelAtLeast(t, 7, 0) {
				continue // the short form has one of them on each kernel
			}
			everyStep(t, 1, func(n int) bool { return v.deathInRecovery(t, n, midst) })
		}
	})
}
