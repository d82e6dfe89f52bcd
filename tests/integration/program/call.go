package program

import (
	"bytes"
	"context"
	"os/exec"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// Refused calls the program and wants a status that the program has, nothing on
// standard output and one line on standard error that says all of the words.
func (d *Daemon) Refused(words []string, args ...string) {
	d.t.Helper()
	a := d.Call("ublk-blksnap", args...)
	if a.Status < 1 || a.Status > 8 || a.Out != "" || strings.Count(a.Err, "\n") != 1 || !strings.HasPrefix(a.Err, "ublk-blksnap: ") {
		d.t.Errorf("%v: status %d, printed %q, said %q", args, a.Status, a.Out, a.Err)
	}
	for _, w := range words {
		if !strings.Contains(a.Err, w) {
			d.t.Errorf("%v said %q, not %q", args, a.Err, w)
		}
	}
	// What is said is for people: nothing of the daemon's own view, nothing twice.
	for _, w := range []string{"/proc/1/root", "strconv", "ublk-blksnap: ublk-blksnap:"} {
		if strings.Contains(a.Err, w) {
			d.t.Errorf("%v said %q", args, a.Err)
		}
	}
}

// Answer is what a call of the program came to.
type Answer struct {
	Status   int
	Out, Err string
}

// Call runs the program on this daemon's run directory. as is the name it is
// called by.
func (d *Daemon) Call(as string, args ...string) Answer {
	d.t.Helper()
	c, cancel := context.WithTimeout(context.Background(), guest.Patience)
	defer cancel()
	cmd := exec.CommandContext(c, Path(d.t), append([]string{"--run-dir", string(d.RunDir)}, args...)...)
	cmd.Args[0] = as
	var out, errout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errout
	return Answer{guest.ExitStatus(d.t, cmd.Run()), out.String(), errout.String()}
}

// WantError fails the test unless err has the code, and says all of the words.
func WantError(t testing.TB, err error, code control.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %q with %q", code, words)
		return
	}
	if got := control.CodeOf(err); got != code {
		t.Errorf("error %q (%v), want %q", got, err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
