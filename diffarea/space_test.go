package diffarea_test

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// write writes chunks up to one, and returns how many were used of how many when storage
// ran low.
func (b *bench) write(used diffarea.Chunk) (low [][2]int64) {
	b.t.Helper()
	b.protect(0, used)
	b.sched.Run()
	for _, e := range b.events {
		if e.Kind == diffarea.LowFreeSpace {
			low = append(low, [2]int64{e.Used / chunk, e.Limit / chunk})
		}
	}
	b.events = slices.DeleteFunc(b.events, func(e diffarea.Event) bool { return e.Kind == diffarea.LowFreeSpace })
	return low
}

// A file that leaves its filesystem some room stays within it, however that changes. It is
// told once each time that it runs low.
func TestRoom(t *testing.T) {
	b := newBench(t, 100, 8, 4*chunk)
	f := blockdevtest.NewMemoryFile("f", 1<<30)
	if err := b.append(diffarea.Storage{File: f, Room: 10*chunk + 5, Spare: true}); err != nil {
		t.Fatal(err)
	}
	room := func(used, now int64) {
		b.log.SetRoom(b.w, f, used, now)
		b.sched.Run()
	}
	expect := func(when string, got [][2]int64, want ...[2]int64) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: low with %v, want %v", when, got, want)
		}
	}
	if u := b.log.Usage(); u.Limit != 10 || u.Need != 100 {
		t.Errorf("at the beginning: %+v", u)
	}
	expect("at the beginning", b.write(7))
	expect("with four fifths used", b.write(8), [2]int64{8, 10})
	expect("after that", b.write(9))
	used := b.log.Reach(f)
	room(used-chunk, 100*chunk) // from before the last growth
	if u := b.log.Usage(); u.Limit != 10 || u.Regions != 9 {
		t.Errorf("with a room from before: %+v", u)
	}
	room(used, 20*chunk)
	if u := b.log.Usage(); u.Limit != 20 {
		t.Errorf("with more room: %+v", u)
	}
	expect("with more room", b.write(15))
	expect("with four fifths of that used", b.write(16), [2]int64{16, 20})
	room(b.log.Reach(f), 21*chunk)
	expect("with hardly more", b.write(17))
	room(b.log.Reach(f), 1)
	if u := b.log.Usage(); u.Limit != u.Capacity {
		t.Errorf("without room: %+v", u)
	}
	room(b.log.Reach(f), 21*chunk)
	b.write(21)
	if b.log.Err() != 0 {
		t.Fatalf("broke with %v before there was no room", b.log.Err())
	}
	b.write(22)
	if b.log.Err() != unix.ENOSPC || b.log.Usage().Capacity != 21 {
		t.Errorf("without room: %v, %+v", b.log.Err(), b.log.Usage())
	}
	b.check()
}

// A limit that somebody has given is used up, whatever room the filesystem seems to have.
// But it is told that it may not come to that.
func TestRoomWithinLimit(t *testing.T) {
	b := newBench(t, 100, 8, 4*chunk)
	if err := b.append(diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30), Size: 40 * chunk, Room: 10 * chunk}); err != nil {
		t.Fatal(err)
	}
	if low := b.write(12); !slices.Equal(low, [][2]int64{{8, 10}}) {
		t.Errorf("low with %v", low)
	}
	b.write(40)
	if b.log.Err() != 0 {
		t.Errorf("broke with %v before the limit", b.log.Err())
	}
	b.check()
}

// Others may write and remove something again and again, on the filesystem that has hardly
// enough room.
func TestLowIsToldOnceAtTheBorder(t *testing.T) {
	b := newBench(t, 100, 8, 4*chunk)
	f := blockdevtest.NewMemoryFile("f", 1<<30)
	if err := b.append(diffarea.Storage{File: f, Room: 99 * chunk, Spare: true}); err != nil {
		t.Fatal(err)
	}
	if low := b.write(80); len(low) != 1 {
		t.Fatalf("low with %v", low)
	}
	room := func(chunks int64) {
		b.log.SetRoom(b.w, f, b.log.Reach(f), chunks*chunk)
		b.sched.Run()
	}
	for range 3 {
		room(101)
		room(98)
	}
	if low := b.write(81); len(low) != 0 {
		t.Errorf("low again with %v", low)
	}
	room(110)
	room(98)
	if low := b.write(82); len(low) != 1 {
		t.Errorf("after there was plenty low with %v", low)
	}
	b.check()
}

// The next process does not tell again that storage runs low.
func TestLowIsToldOnce(t *testing.T) {
	state := make([]byte, diffarea.LogStateSize)
	pool := make([]byte, 8*chunk)
	b := newBench(t, 100, 8, 4*chunk)
	c := diffarea.LogConfig{
		ChunkSize: chunk, Pool: diffarea.Pool{Mem: pool, File: blockdevtest.MapMemory("pool", pool)}, State: state, Portion: 4 * chunk,
		OnEvent: func(e diffarea.Event) { b.events = append(b.events, e) },
	}
	var err error
	if b.log, err = diffarea.NewLog(c); err != nil {
		t.Fatal(err)
	}
	words := make([]byte, diffarea.TableSize(100))
	area := diffarea.AreaConfig{Log: b.log, Orig: b.disk, Size: 100 * chunk, Words: words}
	b.area = diffarea.NewArea(area)
	st := diffarea.Storage{File: blockdevtest.NewMemoryFile("f", 1<<30), Size: 10 * chunk}
	if err := b.append(st); err != nil {
		t.Fatal(err)
	}
	if low := b.write(8); len(low) != 1 {
		t.Fatalf("low with %v", low)
	}
	if b.log, err = diffarea.OpenLog(c, []diffarea.Storage{st}); err != nil {
		t.Fatal(err)
	}
	area.Log = b.log
	if b.area, err = diffarea.OpenArea(area, nil); err != nil {
		t.Fatal(err)
	}
	b.log.Resume(b.w)
	b.sched.Run()
	if low := b.write(9); len(low) != 0 {
		t.Errorf("low again with %v", low)
	}
	b.check()
}
