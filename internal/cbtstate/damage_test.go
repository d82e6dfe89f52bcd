package cbtstate

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile/statefiletest"
)

// TestDamage: no file of the state directory is believed that is damaged in any way.
func TestDamage(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "damage")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	dir = filepath.Join(dir, "state")
	s, err := Open("/", dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	files := filepath.Join(dir, key(aDisk.Identity))
	later := func(whole []byte) []byte {
		return bytes.Replace(whole, []byte(title+version+" "), []byte(title+"9 "), 1)
	}
	heading := func(path string) int {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.IndexByte(b, '\n') + 1
	}

	clean := func() error {
		_, _, err := s.Find(aDisk.Identity, "data", 1<<20)
		return err
	}
	if err := s.Save(Record{ID: uuid.New(), Name: "data", Disk: aDisk}, bytes.Repeat([]byte("map "), 100), always); err != nil {
		t.Fatal(err)
	}
	statefiletest.Try(t, statefiletest.File{Kind: "saved record", Path: files + recordSuffix, Header: heading(files + recordSuffix), Future: later, Read: clean})
	statefiletest.Try(t, statefiletest.File{Kind: "saved map", Path: files + mapSuffix, Header: 64, Read: clean})
	// A record that says what was used before is of another save.
	text, err := (&Record{ID: uuid.New(), Name: "data", Disk: aDisk}).encode()
	if err == nil {
		err = os.WriteFile(files+usedSuffix, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	statefiletest.Try(t, statefiletest.File{Kind: "used record", Path: files + usedSuffix, Header: heading(files + usedSuffix), Future: later, Read: clean})

	r := Record{ID: uuid.New(), Name: "data", Disk: aDisk}
	base, log := realLog(t, r.ID, 1<<20)
	f, err := s.NewLog(r.Identity, r.ID, int64(len(log)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(log, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), s.WriteBase(r.Identity, r.ID, base), s.Run(r)); err != nil {
		t.Fatal(err)
	}
	running := func() error {
		_, base, log, err := s.FindRunning(r.Identity, 1<<20)
		if err == nil {
			_, err = intentlog.Recover(base, log)
		}
		return err
	}
	baseName, logName := pair(key(r.Identity), r.ID)
	statefiletest.Try(t, statefiletest.File{Kind: "running record", Path: files + runningSuffix, Header: heading(files + runningSuffix), Future: later, Read: running})
	statefiletest.Try(t, statefiletest.File{Kind: "base", Path: filepath.Join(dir, baseName), Header: len(base),
		Future: func(whole []byte) []byte { whole[7]++; return whole }, Read: running})
	statefiletest.Try(t, statefiletest.File{Kind: "intent log", Path: filepath.Join(dir, logName), Header: 1024,
		Future: func(whole []byte) []byte { whole[7]++; return whole }, Read: running})
}

// realLog is a write-intent log and its base, as the engine writes them.
func realLog(t *testing.T, id uuid.UUID, size int64) (base, log []byte) {
	t.Helper()
	sched := blockdevtest.NewSched(0)
	m, err := cbtmap.NewMemory(size, cbtmap.Params{MinimumShift: 16, MaximumShift: 16, MaximumCount: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	const shift = intentlog.MinZoneShift
	file := blockdevtest.NewMemoryDevice("log", intentlog.FileSize(size, shift))
	l, err := intentlog.New(intentlog.Config{Size: size, ZoneShift: shift, Orig: blockdevtest.NewMemoryDevice("disk", size), File: file,
		Queue: sched.NewQueue("log"), Memory: make([]byte, intentlog.FileSize(size, shift)), Failed: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	l.Follow(m)
	l.Start(id, func(e error) { err = e })
	sched.Run()
	if err != nil {
		t.Fatal(err)
	}
	if base, err = l.Base(m); err != nil {
		t.Fatal(err)
	}
	log = make([]byte, file.Size())
	if _, err := file.ReadAt(log, 0); err != nil {
		t.Fatal(err)
	}
	return base, log
}
