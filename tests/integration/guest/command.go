package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// StartChild runs a test of the running binary, which env tells what to do, in a process of
// its own, and waits for a line that begins with sign: said is the rest of it. The
// process is killed at the end of the test at the latest.
func StartChild(t testing.TB, test, env, sign string) (child *exec.Cmd, said string) {
	t.Helper()
	child = exec.Command(os.Args[0], "-test.run=^"+test+"$")
	child.Env = append(os.Environ(), env)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		child.Process.Kill()
		child.Wait()
	})
	var before strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said, ok := strings.CutPrefix(lines.Text(), sign); ok {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return child, said
		}
		before.WriteString(lines.Text() + "\n")
	}
	t.Fatalf("the child ended: %s", before.String())
	return nil, ""
}

// Try runs a command and returns what it printed on both outputs.
func Try(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		// What hangs, and where, is in the kernel's log then.
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
		err = fmt.Errorf("took longer than %v: %w", Patience, err)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// Run is Try for a command that must succeed.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := Try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// ExitStatus is the exit status of a command that ran.
func ExitStatus(t testing.TB, err error) int {
	t.Helper()
	var e *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e) && e.Exited():
		return e.ExitCode()
	}
	t.Fatal(err)
	return -1
}
