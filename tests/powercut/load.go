package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

const (
	files    = 8
	fileSize = 8 << 20
)

// prepare makes the files that the load writes to. They are there after a power failure.
func (m *machine) prepare() {
	buf := make([]byte, fileSize)
	for n := range files {
		m.rnd.Read(buf)
		try(os.WriteFile(file(n), buf, 0o600))
	}
	for name := range numbered {
		try(os.WriteFile(filepath.Join(mounted, name), make([]byte, 4096), 0o600))
		note(name, "0")
	}
	unix.Sync()
}

// numbered are files with a number that rises, and how they are opened: what is written is durable by an fsync, or by itself.
var numbered = map[string]int{"fsync": 0, "dsync": unix.O_DIRECT | unix.O_DSYNC}

// writeNumber writes the next number, and notes it once it is durable.
func writeNumber(name string) {
	n := readNumber(name) + 1
	f := must(os.OpenFile(filepath.Join(mounted, name), os.O_WRONLY|numbered[name], 0))
	defer f.Close()
	buf := page(4096)
	defer func() { _ = unix.Munmap(buf) }()
	binary.LittleEndian.PutUint64(buf, n)
	must(f.WriteAt(buf, 0))
	if numbered[name] == 0 {
		try(f.Sync())
	}
	note(name, fmt.Sprint(n))
}

func readNumber(name string) uint64 { return must(strconv.ParseUint(readNote(name), 10, 64)) }

// compareNumbers: what was durable is there after the power failure.
func compareNumbers() {
	for name := range numbered {
		is := binary.LittleEndian.Uint64(must(os.ReadFile(filepath.Join(mounted, name))))
		if was := readNumber(name); is < was {
			fail("number %d was written by %s, and after the power failure it is %d", was, name, is)
		}
	}
}

func file(n int) string { return filepath.Join(mounted, fmt.Sprint("file", n)) }

func (m *machine) destroy(ctx context.Context, id string) error {
	_, err := m.DestroySnapshot(ctx, control.DestroyRequest{ID: id})
	return err
}

// load does everything that the map must know of until the power fails.
func (m *machine) load(ctx context.Context) {
	note("lose", fmt.Sprint(m.mayLose))
	time.Sleep(settle)
	m.noteNow(ctx)
	go m.takes(ctx, rand.New(rand.NewSource(m.rnd.Int63())))
	fsync, dsync := func(*rand.Rand) { writeNumber("fsync") }, func(*rand.Rand) { writeNumber("dsync") }
	for _, work := range []func(*rand.Rand){writeDirect, writeSynced, makeAndRemove, fsync, dsync} {
		rnd := rand.New(rand.NewSource(m.rnd.Int63()))
		go func() {
			for {
				m.working.RLock()
				work(rnd)
				m.working.RUnlock()
				// So that some zones stay as they are.
				time.Sleep(time.Duration(rnd.Intn(30)) * time.Millisecond)
			}
		}()
	}
	// At the beginning, when every write is the first one to its zone, or any time later.
	wait := time.Duration(m.rnd.Intn(500)) * time.Millisecond
	if m.rnd.Intn(3) > 0 {
		wait += time.Duration(m.rnd.Intn(15000)) * time.Millisecond
	}
	switch {
	case m.frozen && !m.mayLose:
		time.Sleep(wait)
		m.taking.Lock() // and nobody takes any more
		wait = settle
	case !m.frozen && m.rnd.Intn(2) == 0:
		time.Sleep(wait)
		m.backsUpLast()
		wait = 0
	}
	m.cut(wait)
}

// backsUpLast makes a backup the last that happens, of what nobody but the take has flushed.
func (m *machine) backsUpLast() {
	m.working.Lock() // and nobody works any more
	for range 20 {
		writeDirect(m.rnd)
	}
	s := m.take()
	m.noteTake(s)
	m.increment(s)
}

// noteNow notes the map at a time when nothing happens.
func (m *machine) noteNow(ctx context.Context) {
	s := m.take()
	m.noteTake(s)
	try(m.destroy(ctx, s.ID))
}

// writeDirect writes to a place in one half of the files.
func writeDirect(rnd *rand.Rand) {
	f := must(os.OpenFile(file(rnd.Intn(files/2)), os.O_WRONLY|unix.O_DIRECT, 0))
	defer f.Close()
	buf := page(4096 << rnd.Intn(6))
	defer func() { _ = unix.Munmap(buf) }()
	rnd.Read(buf)
	must(f.WriteAt(buf, rnd.Int63n((fileSize-int64(len(buf)))/4096)*4096))
}

// writeSynced writes through the page cache, or makes holes.
func writeSynced(rnd *rand.Rand) {
	f := must(os.OpenFile(file(rnd.Intn(files/2)), os.O_WRONLY, 0))
	defer f.Close()
	at := rnd.Int63n(fileSize - 1<<16)
	if rnd.Intn(4) == 0 {
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, at&^4095, 1<<16)
	} else {
		buf := make([]byte, 1+rnd.Intn(1<<14))
		rnd.Read(buf)
		must(f.WriteAt(buf, at))
	}
	try(f.Sync())
}

// makeAndRemove changes directories, and discards.
func makeAndRemove(rnd *rand.Rand) {
	path := filepath.Join(mounted, fmt.Sprint("small", rnd.Intn(20)))
	if err := os.Remove(path); err != nil {
		buf := make([]byte, rnd.Intn(1<<16))
		rnd.Read(buf)
		try(os.WriteFile(path, buf, 0o600))
	}
	if rnd.Intn(20) == 0 {
		unix.Sync()
	}
}

// takes takes, writes to images, marks, and makes increments.
func (m *machine) takes(ctx context.Context, rnd *rand.Rand) {
	var held []control.Snapshot
	for {
		m.working.RLock()
		m.taking.Lock()
		s := m.take()
		m.taking.Unlock()
		held = append(held, s)
		m.noteTake(s)
		for range rnd.Intn(4) {
			writeImage(rnd, s.Images[0].Path)
		}
		if rnd.Intn(2) == 0 {
			at := diskSize*3/4 + rnd.Int63n(diskSize/4-1<<16)
			r := control.Range{Sector: uint64(at / 512), Count: 64}
			try(m.MarkDirty(ctx, control.MarkRequest{Device: "data", Ranges: []control.Range{r}}))
			noteMark(*s.Images[0].Take, r)
		}
		if rnd.Intn(3) == 0 {
			m.increment(s)
		}
		if len(held) > 2 || rnd.Intn(2) == 0 {
			try(m.destroy(ctx, held[0].ID))
			held = held[1:]
		}
		m.working.RUnlock()
		time.Sleep(time.Duration(rnd.Intn(2000)) * time.Millisecond)
	}
}

// writeImage writes to an image, where no filesystem looks.
func writeImage(rnd *rand.Rand, image string) {
	f := openDirect(image, unix.O_WRONLY)
	defer f.Close()
	buf := page(4096)
	defer func() { _ = unix.Munmap(buf) }()
	rnd.Read(buf)
	must(f.WriteAt(buf, diskSize*3/4+rnd.Int63n(diskSize/4/4096)*4096))
}
