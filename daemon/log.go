package daemon

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// logLines is how many lines may wait for an output that does not take them.
const logLines = 1024

// Log is a daemon's log. Its output may be a pipe that nobody reads, or a disk that
// the daemon itself serves. So whoever logs hands the line over and goes on, and
// nobody waits for the output. When logLines lines wait, further lines are dropped
// and counted until half of the waiting ones are taken. Then the log says how many
// were dropped.
type Log struct {
	*slog.Logger
	out io.Writer

	mu        sync.Mutex
	more      sync.Cond // a line to write, or the end
	lines     [][]byte  // to be written; the one that is being written stays until it is
	lost      uint64    // since the log last said so
	totalLost uint64
	closed    bool
	flushed   chan struct{} // closed once all is written after closed

	formatMu sync.Mutex // guards line, in which text writes
	line     bytes.Buffer
	text     slog.Handler
	prefix   func(slog.Level) string
}

// NewLog makes a log of what is at least as grave as level. Lines for the journal
// carry their priority (sd-daemon(3)), but no time and level, which the journal
// notes by itself.
func NewLog(out io.Writer, level slog.Level, journal bool) *Log {
	l := &Log{out: out, flushed: make(chan struct{}), prefix: func(slog.Level) string { return "" }}
	l.more.L = &l.mu
	o := &slog.HandlerOptions{Level: level}
	if journal {
		l.prefix = Priority
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		}
	}
	l.text = slog.NewTextHandler(&l.line, o)
	l.Logger = slog.New(logHandler{l, l.text})
	go l.write()
	return l
}

// Priority is the beginning of a line that tells the journal how grave it is.
func Priority(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "<3>"
	case level >= slog.LevelWarn:
		return "<4>"
	case level >= slog.LevelInfo:
		return "<6>"
	}
	return "<7>"
}

// ToJournal says whether what is written to f arrives in systemd's journal, line by
// line. JOURNAL_STREAM names the file that leads there (systemd.exec(5)).
func ToJournal(f *os.File) bool {
	var st unix.Stat_t
	var dev, ino uint64
	if n, _ := fmt.Sscanf(os.Getenv("JOURNAL_STREAM"), "%d:%d", &dev, &ino); n != 2 {
		return false
	}
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Dev == dev && st.Ino == ino
}

// Stderr is standard error for a log alone. Whatever else the process writes to
// standard error is dropped if it would have to wait. Above all that is the report
// of a crash: a process that waits there cannot end, and its users would wait too.
func Stderr() *os.File {
	fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return os.Stderr
	}
	var st unix.Stat_t
	_ = unix.Fstat(2, &st)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFIFO, unix.S_IFCHR:
		// Opened anew, because others may have the same open file and want to wait.
		again, err := unix.Open("/proc/self/fd/2", unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err == nil {
			_ = unix.Dup3(again, 2, 0)
			_ = unix.Close(again)
		}
	case unix.S_IFSOCK:
		_ = unix.SetNonblock(2, true) // the journal's, and ours alone
	}
	return os.NewFile(uintptr(fd), "/dev/stderr")
}

// Lost is the number of lines that were dropped.
func (l *Log) Lost() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.totalLost
}

// Flush ends the log: it waits until the output has taken the last line, or for
// the time given. What is logged after that is dropped.
func (l *Log) Flush(limit time.Duration) {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.more.Signal()
	select {
	case <-l.flushed:
	case <-time.After(limit):
	}
}

// logHandler is a handler of a log, with or without attributes of its own.
type logHandler struct {
	l    *Log
	text slog.Handler // writes into l.line
}

func (h logHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.text.Enabled(ctx, level)
}

func (h logHandler) WithAttrs(a []slog.Attr) slog.Handler {
	return logHandler{h.l, h.text.WithAttrs(a)}
}

func (h logHandler) WithGroup(name string) slog.Handler {
	return logHandler{h.l, h.text.WithGroup(name)}
}

func (h logHandler) Handle(ctx context.Context, r slog.Record) error {
	line, err := h.l.format(ctx, h.text, r)
	if err != nil {
		return err
	}
	l := h.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.lines) >= logLines || l.lost > 0 {
		l.lost++
		l.totalLost++
		return nil
	}
	l.lines = append(l.lines, line)
	l.more.Signal()
	return nil
}

func (l *Log) format(ctx context.Context, text slog.Handler, r slog.Record) ([]byte, error) {
	l.formatMu.Lock()
	defer l.formatMu.Unlock()
	l.line.Reset()
	l.line.WriteString(l.prefix(r.Level))
	err := text.Handle(ctx, r)
	return bytes.Clone(l.line.Bytes()), err
}

// logLostLocked adds the line that tells how many were dropped, in their place, once
// the output has taken enough.
func (l *Log) logLostLocked() {
	if l.lost == 0 || len(l.lines) > logLines/2 {
		return
	}
	r := slog.NewRecord(time.Now(), slog.LevelWarn, "lines of this log were dropped: nobody took them", 0)
	r.Add("lines", l.lost)
	if line, err := l.format(context.Background(), l.text, r); err == nil {
		l.lines = append(l.lines, line)
	}
	l.lost = 0
}

// write passes the lines on, on a goroutine of its own that may hang in it.
func (l *Log) write() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		for len(l.lines) == 0 {
			if l.closed {
				close(l.flushed)
				return
			}
			l.more.Wait()
		}
		line := l.lines[0]
		l.mu.Unlock()
		_, _ = l.out.Write(line) // there is no other place to say it
		l.mu.Lock()
		l.lines = l.lines[1:]
		l.logLostLocked()
	}
}
