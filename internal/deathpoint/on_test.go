//go:build deathpoints

package deathpoint

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestPoint runs itself as the process that is to die.
func TestPoint(t *testing.T) {
	if os.Getenv(DieAt) != "" {
		for i := range 3 {
			Point()
			fmt.Println("passed", i+1)
		}
		os.Exit(0)
	}
	armed := filepath.Join(t.TempDir(), "armed")
	for n := 1; n <= 4; n++ {
		for _, file := range []string{"", armed} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestPoint$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", DieAt, n), DieFile+"="+file)
			out, err := cmd.Output()
			died := false
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
				died = exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
			}
			want := n - 1
			if n > 3 || file != "" {
				want = 3 // it lives: the file is not there
			}
			if passed := strings.Count(string(out), "passed"); died != (want == n-1 && n <= 3) || passed != want {
				t.Errorf("at %d, file %q: died %v after %d points, %v; want %d", n, file, died, passed, err, want)
			}
		}
	}
	if err := os.WriteFile(armed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestPoint$")
	cmd.Env = append(os.Environ(), DieAt+"=2", DieFile+"="+armed)
	if out, err := cmd.Output(); err == nil || strings.Count(string(out), "passed") != 1 {
		t.Errorf("with the file there: %q, %v", out, err)
	}
}
