package daemon

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLogNobodyReads: what logs never waits for the output. What did not fit is
// counted, and the log says so in its place.
func TestLogNobodyReads(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l := NewLog(w, slog.LevelInfo, false)
	const n = 5000
	fill := strings.Repeat("x", 200) // more than the pipe and the queue hold
	for i := range n {
		l.Info("line", "i", i, "fill", fill)
	}
	lost := l.Lost()
	if lost == 0 || lost >= n {
		t.Fatalf("%d lines lost of %d", lost, n)
	}
	began := time.Now()
	l.Flush(10 * time.Millisecond)
	if time.Since(began) > time.Minute {
		t.Error("flush waits for an output that takes nothing")
	}

	// The same once more, with a reader that comes late.
	r2, w2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Close()
	l = NewLog(w2, slog.LevelInfo, false)
	for i := range n {
		l.Info("line", "i", i, "fill", fill)
	}
	lost = l.Lost()
	read := make(chan []byte)
	go func() {
		var b bytes.Buffer
		_, _ = b.ReadFrom(r2)
		read <- b.Bytes()
	}()
	for l.busy() {
		time.Sleep(time.Millisecond)
	}
	l.Info("after")
	l.Flush(time.Minute)
	w2.Close()
	lines := strings.Split(strings.TrimSpace(string(<-read)), "\n")
	if want := n - int(lost) + 2; len(lines) != want {
		t.Fatalf("%d lines, want %d", len(lines), want)
	}
	for i, line := range lines[:len(lines)-2] {
		if !strings.Contains(line, fmt.Sprintf("i=%d ", i)) {
			t.Fatalf("line %d is %s", i, line)
		}
	}
	if got := lines[len(lines)-2]; !strings.Contains(got, "level=WARN") || !strings.Contains(got, fmt.Sprintf("lines=%d", lost)) {
		t.Errorf("of the lost lines: %s", got)
	}
	if got := lines[len(lines)-1]; !strings.Contains(got, "msg=after") {
		t.Errorf("the last line: %s", got)
	}
}

func (l *Log) busy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lines) > 0
}

// TestCrashNobodyReads: a process that dies of a bug ends, whoever reads of it.
func TestCrashNobodyReads(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fd := int(w.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = unix.Write(fd, make([]byte, 4096))
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "daemon", "--run-dir", t.TempDir())
	cmd.Env = append(os.Environ(), "TEST_DAEMON=crashes")
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("it did not crash")
		}
	case <-time.After(time.Minute):
		_ = cmd.Process.Kill()
		t.Error("it does not end")
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("the pipe does not block for others any more: %#x, %v", flags, err)
	}
}

// TestLogForm: the journal gets priorities, and no time of ours.
func TestLogForm(t *testing.T) {
	var b bytes.Buffer
	say := func(journal bool) string {
		b.Reset()
		l := NewLog(&b, slog.LevelDebug, journal)
		l.Debug("d")
		l.Info("i", "k", 1)
		l.With("a", "b").WithGroup("g").Warn("w", "time", 2)
		l.Error("e")
		l.Flush(time.Minute)
		l.Info("too late")
		return b.String()
	}
	if got, want := say(true), "<7>msg=d\n<6>msg=i k=1\n<4>msg=w a=b g.time=2\n<3>msg=e\n"; got != want {
		t.Errorf("journal: %q, want %q", got, want)
	}
	if got := say(false); !regexp.MustCompile(`^time=\S+ level=DEBUG msg=d\ntime=\S+ level=INFO msg=i k=1\n`).MatchString(got) {
		t.Errorf("elsewhere: %q", got)
	}
}

func TestToJournal(t *testing.T) {
	var st unix.Stat_t
	if err := unix.Fstat(2, &st); err != nil {
		t.Fatal(err)
	}
	for stream, want := range map[string]bool{
		"": false, "7": false,
		fmt.Sprintf("%d:%d", st.Dev, st.Ino):   true,
		fmt.Sprintf("%d:%d", st.Dev, st.Ino+1): false,
	} {
		t.Setenv("JOURNAL_STREAM", stream)
		if got := ToJournal(os.Stderr); got != want {
			t.Errorf("JOURNAL_STREAM=%q: %v", stream, got)
		}
	}
}
