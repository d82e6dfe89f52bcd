package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// TestFormat: fresh and older state gets the number of this program's format; what is
// newer, or cannot be read, is refused and stays as it is.
func TestFormat(t *testing.T) {
	setUp := func(name, text string) (RunDir, string) {
		t.Helper()
		dir := RunDir(t.TempDir())
		if err := os.Mkdir(dir.State(), 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir.State(), name)
		if text != "" {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir, path
	}
	for name, text := range map[string]string{"": "", "frozen": "/srv"} {
		dir, _ := setUp(name, text)
		want := 0
		if name != "" {
			want = 1
		}
		if got, err := dir.formatFound(); got != want || err != nil {
			t.Errorf("with %q: format %d, %v; want %d", name, got, err, want)
		}
		for range 2 {
			if err := dir.migrate(); err != nil {
				t.Error(err)
			}
			if got, err := dir.formatFound(); got != stateFormat || err != nil {
				t.Errorf("after the migration with %q: format %d, %v", name, got, err)
			}
		}
	}

	for old := 1; old < stateFormat; old++ {
		dir, path := setUp(formatName, "")
		if err := errors.Join(statefile.Write(path, formatKind, old, format{Program: "0.1"}), dir.migrate()); err != nil {
			t.Error(err)
		}
		if got, err := dir.formatFound(); got != stateFormat || err != nil {
			t.Errorf("after the migration from format %d: %d, %v", old, got, err)
		}
	}

	dir, path := setUp(formatName, "")
	if err := statefile.Write(path, formatKind, stateFormat+1, format{Program: "9.9"}); err != nil {
		t.Fatal(err)
	}
	newer, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for text, words := range map[string][]string{
		string(newer): {fmt.Sprintf("has version %d", stateFormat+1), fmt.Sprintf("up to %d", stateFormat), path, "daemon stop"},
		strings.Replace(string(newer), "9", "8", 1): {"damaged", path, "remove "},
		"": {"damaged"},
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := dir.migrate()
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%q: %v; want %q", text, err, w)
			}
		}
		if code := control.CodeOf(err); text == string(newer) && code != control.Unsupported {
			t.Errorf("%q: %v", text, code)
		}
		if _, err := CheckTakeover(dir); err == nil {
			t.Errorf("%q could be taken over", text)
		}
		if now, err := os.ReadFile(path); err != nil || string(now) != text {
			t.Errorf("%q has become %q, %v", text, now, err)
		}
	}
}
