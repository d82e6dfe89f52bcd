//go:build nextformat && deathpoints

package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// TestFormatDeath: a death at any step of the way from one format to the next costs
// nothing, and a program of the older format is not given what is half done.
func TestFormatDeath(t *testing.T) {
	const dirEnv = "FORMAT_DEATH_DIR"
	if dir := RunDir(os.Getenv(dirEnv)); dir != "" {
		if err := dir.migrate(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	const older = stateFormat - 1
	for n := 1; ; n++ {
		dir := RunDir(t.TempDir())
		before := filepath.Join(dir.State(), "devices", "a.json")
		if err := errors.Join(os.MkdirAll(filepath.Dir(before), 0o700), os.WriteFile(before, []byte("a"), 0o600),
			statefile.Write(filepath.Join(dir.State(), formatName), formatKind, older, format{Program: "0.1"})); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestFormatDeath$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", deathpoint.DieAt, n), dirEnv+"="+string(dir))
		out, err := cmd.Output()
		died := false
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			died = exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		}
		if err != nil && !died {
			t.Fatalf("at step %d: %v, %s", n, err, out)
		}
		_, _, err = statefile.Read(filepath.Join(dir.State(), formatName), formatKind, older)
		if _, moved := os.Stat(before); moved != nil && !errors.Is(err, statefile.ErrNewer) {
			t.Errorf("died at step %d: the records are in their new place, and a program of format %d is told %v", n, older, err)
		}
		if err := dir.migrate(); err != nil {
			t.Errorf("died at step %d: %v", n, err)
		}
		if found, err := dir.formatFound(); found != stateFormat || err != nil {
			t.Errorf("died at step %d: then the format is %d, %v", n, found, err)
		}
		if text, err := os.ReadFile(filepath.Join(dir.State(), devicesName, "a.json")); string(text) != "a" {
			t.Errorf("died at step %d: the record is %q, %v", n, text, err)
		}
		if !died {
			if n < 5 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}
