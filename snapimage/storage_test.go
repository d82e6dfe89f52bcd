package snapimage

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestStorageOfOthers: a file that is somebody else's, or has another name, is
// not filled with what was on the disk; a new file, an empty one of ours and a
// directory are.
func TestStorageOfOthers(t *testing.T) {
	dir := t.TempDir()
	empty := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o666); err != nil {
			t.Fatal(err)
		}
		return path
	}
	linked := empty("linked")
	if err := os.Link(linked, filepath.Join(dir, "second")); err != nil {
		t.Fatal(err)
	}
	refused := []string{linked}
	if os.Geteuid() == 0 {
		theirs := empty("theirs")
		if err := os.Chown(theirs, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		refused = append(refused, theirs)
	}
	for _, path := range refused {
		if _, err := openStorage(path, 0, 512); !errors.Is(err, ErrStorageInUse) {
			t.Errorf("%s: %v, want %v", path, err, ErrStorageInUse)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("a file that was refused is gone: %v", err)
		}
	}
	for _, path := range []string{empty("ours"), filepath.Join(dir, "new"), dir} {
		s, err := openStorage(path, 0, 512)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstat(s.file.Fd(), &st); err != nil || st.Mode&0o777 != 0o600 {
			t.Errorf("%s: mode %o, %v", path, st.Mode, err)
		}
		if err := s.discard(0); err != nil {
			t.Error(err)
		}
	}
}
