package cbtmap

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand"
	"os"
	"testing"
)

// lossy is a filesystem of one folder that loses power after some operations:
// of what was not synced any subset survives, sector by sector of a file, and of
// the names each as it was at some time since the folder was synced.
type lossy struct {
	rnd   *rand.Rand
	left  int // operations until the power fails
	names map[string]*lossyFile
	past  map[string][]*lossyFile // by name: what it meant since the last sync; nil: nothing
}

type lossyFile struct {
	fs      *lossy
	now     []byte
	durable []byte
}

var errPower = errors.New("no power")

func newLossy(rnd *rand.Rand, left int) *lossy {
	return &lossy{rnd: rnd, left: left, names: map[string]*lossyFile{}, past: map[string][]*lossyFile{}}
}

func (l *lossy) step() error {
	if l.left--; l.left < 0 {
		return errPower
	}
	return nil
}

func (l *lossy) set(name string, f *lossyFile) {
	if len(l.past[name]) == 0 {
		l.past[name] = []*lossyFile{l.names[name]}
	}
	l.past[name] = append(l.past[name], f)
	if l.names[name] = f; f == nil {
		delete(l.names, name)
	}
}

func (l *lossy) create(path string) (file, error) {
	if err := l.step(); err != nil {
		return nil, err
	}
	f := &lossyFile{fs: l}
	l.set(path, f)
	return f, nil
}

func (l *lossy) rename(from, to string) error {
	if err := l.step(); err != nil {
		return err
	}
	f := l.names[from]
	l.set(to, f)
	l.set(from, nil)
	return nil
}

func (l *lossy) remove(path string) error {
	if err := l.step(); err != nil {
		return err
	}
	l.set(path, nil)
	return nil
}

func (l *lossy) syncDir(string) error {
	if err := l.step(); err != nil {
		return err
	}
	clear(l.past)
	return nil
}

func (f *lossyFile) Write(p []byte) (int, error) {
	if err := f.fs.step(); err != nil {
		return 0, err
	}
	f.now = append(f.now, p...)
	return len(p), nil
}

func (f *lossyFile) Sync() error {
	if err := f.fs.step(); err != nil {
		return err
	}
	f.durable = bytes.Clone(f.now)
	return nil
}

func (f *lossyFile) Close() error { return f.fs.step() }

// after is what the file at path holds when the power is back.
func (l *lossy) after(path string) ([]byte, error) {
	f := l.names[path]
	if past := l.past[path]; len(past) > 0 {
		f = past[l.rnd.Intn(len(past))]
	}
	if f == nil {
		return nil, fs.ErrNotExist
	}
	out := bytes.Clone(f.durable)
	if len(f.now) > len(out) && l.rnd.Intn(2) == 0 {
		out = append(out, make([]byte, len(f.now)-len(out))...)
	}
	for at := 0; at < len(out); at += 512 {
		if l.rnd.Intn(2) == 0 {
			copy(out[at:min(at+512, len(out))], f.now[min(at, len(f.now)):])
		}
	}
	return out, nil
}

// TestSavePowerFailure takes the power at every operation of a Save that
// replaces an older map: the file is one of the two, whole, and the new one once
// Save has returned.
func TestSavePowerFailure(t *testing.T) {
	const path = "folder/map"
	rnd := rand.New(rand.NewSource(1))
	old, fresh := make([]byte, 5000), make([]byte, 6000)
	rnd.Read(old)
	rnd.Read(fresh)
	saved := 0
	for n := 0; saved < 100; n++ {
		for range 100 {
			l := newLossy(rnd, 1<<30)
			if err := writeFile(l, path, old); err != nil {
				t.Fatal(err)
			}
			l.left = n
			err := writeFile(l, path, fresh)
			if err == nil {
				saved++
			}
			got, rerr := l.after(path)
			switch {
			case rerr != nil:
				t.Fatalf("power lost after %d operations: %v", n, rerr)
			case bytes.Equal(got, fresh):
			case bytes.Equal(got, old) && err != nil:
			case bytes.Equal(got, old):
				t.Fatalf("power lost after %d operations: Save had returned, and the old map is there", n)
			default:
				t.Fatalf("power lost after %d operations: the file is neither map", n)
			}
		}
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a real file was written")
	}
}
