package snapshots

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSignature(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	look := func(content []byte) (string, error) {
		writeFile(t, path, string(content), 0o600)
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return signature(f)
	}
	seen := map[string]bool{}
	for _, s := range signatures {
		b := make([]byte, 256<<10)
		copy(b[s.at:], s.magic)
		what, err := look(b)
		if err != nil || what != s.what {
			t.Errorf("%q at %d: %q, %v; want %q", s.magic, s.at, what, err, s.what)
		}
		seen[what] = true
	}
	if len(seen) < 10 {
		t.Errorf("only %d kinds", len(seen))
	}
	for _, n := range []int{0, 512, 256 << 10} {
		if what, err := look(make([]byte, n)); what != "" || err != nil {
			t.Errorf("%d zero bytes: %q, %v", n, what, err)
		}
	}
}
