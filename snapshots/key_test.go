package snapshots

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/filter"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestCipher: it is XTS-AES-256 of IEEE 1619 (test vector 10), sector by sector.
func TestCipher(t *testing.T) {
	key, _ := hex.DecodeString("2718281828459045235360287471352662497757247093699959574966967627" +
		"3141592653589793238462643383279502884197169399375105820974944592")
	c, err := newRegionCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	clear := make([]byte, 3*sector.Size)
	for i := range clear {
		clear[i] = byte(i)
	}
	sealed := make([]byte, len(clear))
	c.Encrypt(sealed, clear, 0xff)
	if got := hex.EncodeToString(sealed[:32]); got != "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b" {
		t.Errorf("sector 255 begins with %s", got)
	}
	// A sector is what it is, whatever goes before it, and in its place.
	one := bytes.Clone(clear[sector.Size : 2*sector.Size])
	c.Encrypt(one, one, 0x100)
	if !bytes.Equal(one, sealed[sector.Size:2*sector.Size]) || bytes.Equal(one, sealed[:sector.Size]) {
		t.Error("sector 256 depends on others, or not on its number")
	}
	c.Decrypt(sealed, sealed, 0xff)
	if !bytes.Equal(sealed, clear) {
		t.Error("decrypted is not what was encrypted")
	}
	if n := testing.AllocsPerRun(100, func() { c.Encrypt(sealed, clear, 1) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestWipe: the expanded key is nowhere any more.
func TestWipe(t *testing.T) {
	c, err := newRegionCipher(bytes.Repeat([]byte{7}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.blocks) != 2 {
		t.Fatalf("%d halves", len(c.blocks))
	}
	for _, b := range c.blocks {
		if v := reflect.ValueOf(b); v.Kind() != reflect.Pointer || !plain(v.Type().Elem()) {
			t.Errorf("%T cannot be overwritten", b)
		} else if v.Elem().IsZero() {
			t.Errorf("%T holds no key", b)
		}
	}
	c.wipe()
	for _, b := range c.blocks {
		if !reflect.ValueOf(b).Elem().IsZero() {
			t.Errorf("%T still holds a key", b)
		}
	}
}

// inClear counts what the storage holds as it was on the disk: of a file that is kept
// by a mount, or a device.
func (l life) inClear(t *testing.T) (n int) {
	t.Helper()
	for i, path := range l.Storage {
		if filepath.Dir(path) != "/dev" {
			path = pins{dir: l.path("state/" + l.ID)}.point(i)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		n += bytes.Count(b, bytes.Repeat([]byte{l.Before}, 64))
		n += bytes.Count(b, bytes.Repeat([]byte{'I'}, 64))
	}
	return n
}

// TestEncrypted: what is stored cannot be read, by whatever kind of storage, and the
// next daemon can.
func TestEncrypted(t *testing.T) {
	for _, kind := range lifeKinds {
		for _, encrypt := range []bool{false, true} {
			l := newLife(t, kind)
			l.Encrypt = encrypt
			dieTaken(t, l, func(d *daemon, s *Snapshot) {
				// What was copied is stored before it is written to.
				q := s.Image(0).NewQueue(d.show)
				if err := do(d.show, q, ublk.OpWrite, 512, bytes.Repeat([]byte{'I'}, 512)); err != nil {
					t.Fatal(err)
				}
			})
			if n := l.inClear(t); (n > 0) == encrypt {
				t.Errorf("%s, encrypted %v: %d pieces can be read", kind, encrypt, n)
			}
			left := l.left(t)
			if left.Encrypted != encrypt {
				t.Errorf("on record: encrypted %v", left.Encrypted)
			}
			d := daemonOf(t, l)
			s, err := left.Reopen(d.config(), []*filter.Filter{d.filter})
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, lifeSize)
			if err := do(d.show, s.Image(0).NewQueue(d.show), ublk.OpRead, 0, got); err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{l.Before}, lifeSize)
			copy(want[512:], bytes.Repeat([]byte{'I'}, 512))
			if !bytes.Equal(got, want) {
				t.Errorf("%s, encrypted %v: the image is not what it was", kind, encrypt)
			}
			if err := d.destroy(s); err != nil {
				t.Error(err)
			}
			l.checkGone(t)
		}
	}
}

// TestKeyDamaged: without its key a snapshot is not taken over, and ends.
func TestKeyDamaged(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"another": func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte{9}, keySize), 0) },
		"zeroes":  func(path string) error { return os.WriteFile(path, make([]byte, keySize), 0) },
		"short":   func(path string) error { return os.Truncate(path, keySize-1) },
		"gone":    os.Remove,
		"open":    func(path string) error { return os.Chmod(path, 0o644) },
	} {
		l := newLife(t, "directory")
		l.Encrypt = true
		dieTaken(t, l, nil)
		path := filepath.Join(l.path("state"), l.ID, keyName)
		if st := stat(t, path); st.Mode&0o777 != 0o600 || st.Size != keySize {
			t.Errorf("the key is in a file of %d bytes with the mode %o", st.Size, st.Mode)
		}
		if err := spoil(path); err != nil {
			t.Fatal(err)
		}
		d := daemonOf(t, l)
		left := l.left(t)
		if _, err := left.Reopen(d.config(), []*filter.Filter{d.filter}); err == nil {
			t.Errorf("%s: taken over", name)
		}
		if d.filter.Held() {
			t.Errorf("%s: the filter is held", name)
		}
		if err := left.Clear(d.config()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		l.checkGone(t)
	}
}

// TestKeyOfBroken: what is stored for a broken snapshot cannot be read any more, and
// the next daemon does not miss the key.
func TestKeyOfBroken(t *testing.T) {
	l := newLife(t, "directory")
	l.Encrypt = true
	key := filepath.Join(l.path("state"), l.ID, keyName)
	dieTaken(t, l, func(d *daemon, s *Snapshot) {
		f, err := os.Open(key)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		s.Break(unix.ETIMEDOUT)
		if e := <-d.events; e.Kind != diffarea.Corrupted {
			t.Fatalf("%+v", e)
		}
		s.Told()
		b := make([]byte, keySize)
		if _, err := f.ReadAt(b, 0); err != nil || !bytes.Equal(b, make([]byte, keySize)) {
			t.Errorf("the key is still there: %v", err)
		}
	})
	if _, err := os.Stat(key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key's file: %v", err)
	}
	d := daemonOf(t, l)
	s, err := l.left(t).Reopen(d.config(), []*filter.Filter{d.filter})
	if err != nil {
		t.Fatal(err)
	}
	if err := do(d.show, s.Image(0).NewQueue(d.show), ublk.OpRead, 0, make([]byte, 512)); !errors.Is(err, unix.EIO) {
		t.Errorf("its image: %v", err)
	}
	if err := d.destroy(s); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}
