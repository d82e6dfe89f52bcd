package guest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// SomeFiles writes files of all sizes below dir and returns their sums.
func SomeFiles(t testing.TB, dir string, seed int64) map[string][32]byte {
	t.Helper()
	rnd := rand.New(rand.NewSource(seed))
	sums := map[string][32]byte{}
	for i := range 60 {
		name := fmt.Sprintf("set%d/%d/file%d", seed, i%7, i)
		p := make([]byte, rnd.Intn(1<<uint(4+rnd.Intn(17))))
		rnd.Read(p)
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, p, 0o644); err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(p)
	}
	return sums
}

// SameFiles fails the test unless the files below dir are those of sums.
func SameFiles(t testing.TB, dir string, sums map[string][32]byte) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		sum, ok := sums[name]
		switch {
		case !ok:
			t.Errorf("%s: nobody wrote it", path)
		case sum != sha256.Sum256(p):
			t.Errorf("%s: content differs", path)
		}
		seen++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(sums) {
		t.Errorf("%d files, want %d", seen, len(sums))
	}
}

// DropCaches has the next reads come from the disks.
func DropCaches(t testing.TB) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// Below are the sums of the files below a directory, named from there.
func Below(dir string, sums map[string][32]byte) map[string][32]byte {
	out := map[string][32]byte{}
	for name, sum := range sums {
		if rest, ok := strings.CutPrefix(name, dir+"/"); ok {
			out[rest] = sum
		}
	}
	return out
}

// BusyFiles makes, syncs and removes files below dir/busy until stopped.
func BusyFiles(t testing.TB, dir string) (stop func()) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "busy"), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	for n := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, 40<<10)
			for i := 0; ; i++ {
				select {
				case <-end:
					return
				default:
				}
				name := filepath.Join(dir, "busy", fmt.Sprintf("%d-%d", n, i%16))
				f, err := os.Create(name)
				if err == nil {
					_, err = f.Write(p[:1+i*977%len(p)])
				}
				if err == nil && i%4 == 0 {
					err = f.Sync()
				}
				f.Close()
				if err == nil && i%3 == 0 {
					err = os.Remove(name)
				}
				if err != nil {
					t.Errorf("busy files: %v", err)
					return
				}
			}
		}()
	}
	var once sync.Once
	stop = func() { once.Do(func() { close(end); wg.Wait() }) }
	t.Cleanup(stop)
	return stop
}

// Verified has fio write into dir, many requests at a time, and read back what it wrote, over
// and over until stopped.
func Verified(t testing.TB, dir string) (stop func()) {
	t.Helper()
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-end:
				return
			default:
			}
			out, err := Try("fio", "--name=verified", "--directory="+dir, "--size=8m", "--rw=randwrite", "--bsrange=4k-64k",
				"--ioengine=libaio", "--direct=1", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1")
			if err != nil {
				t.Errorf("fio: %v: %s", err, out)
				return
			}
		}
	}()
	stop = sync.OnceFunc(func() { close(end); wg.Wait() })
	t.Cleanup(stop)
	return stop
}
