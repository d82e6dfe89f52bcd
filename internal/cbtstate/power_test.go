package cbtstate

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// lossy is a folder that loses power after some operations: of what was not synced
// any subset survives, sector by sector of a file, and of the names each as it was
// at some time since the folder was synced.
type lossy struct {
	rnd   *rand.Rand
	left  int // operations until the power fails
	files map[string]*lossyFile
	past  map[string][]*lossyFile // by name: what it meant since the last sync; nil: nothing
}

type lossyFile struct {
	in      *lossy
	now     []byte
	durable []byte
}

var errPower = errors.New("no power")

func newLossy(rnd *rand.Rand) *lossy {
	return &lossy{rnd: rnd, left: 1 << 30, files: map[string]*lossyFile{}, past: map[string][]*lossyFile{}}
}

func (l *lossy) step() error {
	if l.left--; l.left < 0 {
		return errPower
	}
	return nil
}

func (l *lossy) set(name string, f *lossyFile) {
	if len(l.past[name]) == 0 {
		l.past[name] = []*lossyFile{l.files[name]}
	}
	l.past[name] = append(l.past[name], f)
	if l.files[name] = f; f == nil {
		delete(l.files, name)
	}
}

func (l *lossy) create(name string) (file, error) {
	if err := l.step(); err != nil {
		return nil, err
	}
	f := &lossyFile{in: l}
	l.set(name, f)
	return f, nil
}

func (l *lossy) read(name string, _ int64) ([]byte, error) {
	if f := l.files[name]; f != nil {
		return bytes.Clone(f.now), nil
	}
	return nil, fs.ErrNotExist
}

func (l *lossy) names() (out []string, err error) {
	for n := range l.files {
		out = append(out, n)
	}
	return out, nil
}

func (l *lossy) rename(from, to string) error {
	if err := l.step(); err != nil {
		return err
	}
	f := l.files[from]
	if f == nil {
		return fs.ErrNotExist
	}
	l.set(to, f)
	l.set(from, nil)
	return nil
}

func (l *lossy) remove(name string) error {
	if err := l.step(); err != nil {
		return err
	}
	if l.files[name] != nil {
		l.set(name, nil)
	}
	return nil
}

func (l *lossy) sync() error {
	if err := l.step(); err != nil {
		return err
	}
	clear(l.past)
	return nil
}

func (l *lossy) close() {}

func (f *lossyFile) Write(p []byte) (int, error) {
	if err := f.in.step(); err != nil {
		return 0, err
	}
	f.now = append(f.now, p...)
	return len(p), nil
}

func (f *lossyFile) Sync() error {
	if err := f.in.step(); err != nil {
		return err
	}
	f.durable = bytes.Clone(f.now)
	return nil
}

func (f *lossyFile) Close() error { return f.in.step() }

// after is the folder when the power is back.
func (l *lossy) after() *lossy {
	next := newLossy(l.rnd)
	all := map[string]*lossyFile{}
	for n, f := range l.files {
		all[n] = f
	}
	for n, past := range l.past {
		all[n] = past[l.rnd.Intn(len(past))]
	}
	for n, f := range all {
		if f != nil {
			b := f.survives()
			next.files[n] = &lossyFile{in: next, now: b, durable: b}
		}
	}
	return next
}

func (f *lossyFile) survives() []byte {
	rnd := f.in.rnd
	out := bytes.Clone(f.durable)
	if len(f.now) > len(out) && rnd.Intn(2) == 0 {
		out = append(out, make([]byte, len(f.now)-len(out))...)
	}
	for at := 0; at < len(out); at += 512 {
		if rnd.Intn(2) == 0 {
			copy(out[at:min(at+512, len(out))], f.now[min(at, len(f.now)):])
		}
	}
	return out
}

func always() bool { return true }

// TestPowerFailure takes the power at every operation of a life of the state: saved,
// used, saved again. What is found is what was saved last, whole, and never what was
// used; once Save has returned it is found, once Use has it is not.
func TestPowerFailure(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	id := disk.Identity{"serial=x"}
	maps := [3][]byte{}
	var records [3]Record
	for i := range maps {
		maps[i] = make([]byte, 3000+1000*i)
		rnd.Read(maps[i])
		records[i] = Record{ID: uuid.New(), Name: "data", Disk: Disk{Identity: id, Size: int64(i)}}
	}
	for n, whole := 0, 0; whole < 50; n++ {
		for range 60 {
			l := newLossy(rnd)
			s := &Store{l}
			last, may, used := -1, map[int]bool{}, map[int]bool{} // saved for sure, perhaps, used
			l.left = n
			life := func() error {
				for i := range maps {
					may = map[int]bool{i: true}
					if err := s.Save(records[i], maps[i], always); err != nil {
						return err
					}
					last = i
					if r, m, err := s.Find(id, "data", 1<<20); err != nil || r.ID != records[i].ID || !bytes.Equal(m, maps[i]) {
						t.Fatalf("saved, and found %v, %v", r, err)
					}
					if i == len(maps)-1 {
						break
					}
					last = -1
					if err := s.Use(id); err != nil {
						return err
					}
					used[i] = true
				}
				return nil
			}
			if life() == nil {
				whole++
			}
			r, m, err := (&Store{l.after()}).Find(id, "data", 1<<20)
			var no *Refusal
			switch {
			case err != nil && !errors.As(err, &no):
				t.Fatal(err)
			case err != nil && last >= 0:
				t.Fatalf("power lost after %d operations: Save had returned, and %v", n, err)
			case err != nil:
			default:
				i := int(r.Size)
				if used[i] || !may[i] && last != i || r.ID != records[i].ID || !bytes.Equal(m, maps[i]) {
					t.Fatalf("power lost after %d operations: record %d is believed; used %v, last %d", n, i, used, last)
				}
			}
		}
	}
}

// TestSaveGivenUp: what was given up just before its last step does not count.
func TestSaveGivenUp(t *testing.T) {
	l := newLossy(rand.New(rand.NewSource(1)))
	s := &Store{l}
	r := Record{ID: uuid.New(), Disk: Disk{Identity: disk.Identity{"serial=x"}}}
	if err := s.Save(r, nil, func() bool { return false }); err == nil {
		t.Error("saved")
	}
	if _, _, err := s.Find(r.Identity, "", 100); err == nil {
		t.Error("found")
	}
}
