package main

import (
	"context"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
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
	unix.Sync()
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
	for _, work := range []func(*rand.Rand){writeDirect, writeSynced, makeAndRemove} {
		rnd := rand.New(rand.NewSource(m.rnd.Int63()))
		go func() {
			for {
				work(rnd)
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
	if m.frozen && !m.mayLose {
		time.Sleep(wait)
		m.taking.Lock() // and nobody takes any more
		wait = settle
	}
	m.cut(wait)
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
