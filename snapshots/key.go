package snapshots

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"unsafe"

	"golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// A snapshot that is encrypted has a key of its own, fresh from the kernel's random
// numbers, for AES-256 in XTS mode: the numbers of the sectors (diffarea.Sector) are
// the tweaks. XTS is made for data that is replaced sector by sector in its place, as
// an image's writes do. It hides what is stored; it does not prove that nobody has
// changed it.
//
// The key is in the file "key" of the state, on the tmpfs, and expanded in this
// process's memory, which is locked and goes into no core. It is overwritten in both
// when the snapshot ends or breaks. Without it nobody can read what is stored, so that
// need not be wiped. One round key of the fifteen of a half may remain in registers that
// the kernel or the runtime has saved on a stack of this process: no program in Go can
// prevent that.
const (
	keyName = "key"
	keySize = 64
)

// regionCipher implements diffarea.Cipher.
type regionCipher struct {
	xts    *xts.Cipher
	blocks []cipher.Block // of xts, to be wiped
}

func newRegionCipher(key []byte) (*regionCipher, error) {
	c := &regionCipher{}
	var err error
	c.xts, err = xts.NewCipher(func(half []byte) (cipher.Block, error) {
		b, err := aes.NewCipher(half)
		c.blocks = append(c.blocks, b)
		return b, err
	}, key)
	return c, err
}

// Encrypt implements diffarea.Cipher.
func (c *regionCipher) Encrypt(dst, src []byte, at diffarea.Sector) {
	for ; len(src) > 0; at++ {
		c.xts.Encrypt(dst[:sector.Size], src[:sector.Size], uint64(at))
		dst, src = dst[sector.Size:], src[sector.Size:]
	}
}

// Decrypt implements diffarea.Cipher.
func (c *regionCipher) Decrypt(dst, src []byte, at diffarea.Sector) {
	for ; len(src) > 0; at++ {
		c.xts.Decrypt(dst[:sector.Size], src[:sector.Size], uint64(at))
		dst, src = dst[sector.Size:], src[sector.Size:]
	}
}

// wipe overwrites the expanded key; nobody uses the cipher any more. The package that
// expands it has no way to do that, so it is done from outside, unless there are
// pointers in it (TestWipe looks).
func (c *regionCipher) wipe() {
	for _, b := range c.blocks {
		if v := reflect.ValueOf(b); v.Kind() == reflect.Pointer && plain(v.Type().Elem()) {
			clear(unsafe.Slice((*byte)(v.UnsafePointer()), v.Type().Elem().Size()))
		}
	}
}

// plain says whether a type has no pointers.
func plain(t reflect.Type) bool {
	switch k := t.Kind(); k {
	case reflect.Struct:
		for i := range t.NumField() {
			if !plain(t.Field(i).Type) {
				return false
			}
		}
		return true
	case reflect.Array:
		return plain(t.Elem())
	default:
		return k >= reflect.Bool && k <= reflect.Complex128 && k != reflect.Uintptr
	}
}

// newSeal makes a key.
func (s *state) newSeal() (*diffarea.Seal, error) {
	key, f, err := s.file(keyName, keySize, true)
	if err != nil {
		return nil, err
	}
	f.Close()
	defer s.unmap(key)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	deathpoint.Point()
	return s.sealWith(key)
}

// reopenSeal finds the key again.
func (s *state) reopenSeal() (*diffarea.Seal, error) {
	key, f, err := s.reopen(keyName, keySize, true)
	if err != nil {
		return nil, err
	}
	f.Close()
	defer s.unmap(key)
	return s.sealWith(key)
}

func (s *state) sealWith(key []byte) (*diffarea.Seal, error) {
	any := byte(0)
	for _, b := range key { // which is copied nowhere, not onto the stack either
		any |= b
	}
	if any == 0 {
		return nil, damaged(filepath.Join(s.dir, keyName), "it holds no key")
	}
	memory, err := unix.Mmap(-1, 0, diffarea.SealMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes to encrypt in: %w", diffarea.SealMemory, err)
	}
	s.maps = append(s.maps, memory)
	if s.cipher, err = newRegionCipher(key); err != nil {
		return nil, err
	}
	return &diffarea.Seal{Cipher: s.cipher, Memory: memory}, nil
}

// forgetCipher wipes this process's copy of the key.
func (s *state) forgetCipher() {
	if s.cipher != nil {
		s.cipher.wipe()
		s.cipher = nil
	}
}

// removeKey overwrites a key's file and removes it.
func removeKey(path string) {
	if f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0); err == nil {
		_, _ = f.WriteAt(make([]byte, keySize), 0) // on a tmpfs, over what is there
		f.Close()
		deathpoint.Point()
	}
	os.Remove(path)
}
