package machine

import (
	"regexp"
	"slices"
	"strings"
	"sync"
)

// lastLines keeps the end of what was written to it, and the kernel's alarms among that.
type lastLines struct {
	mu    sync.Mutex
	part  string
	lines []string
	alarm []string
}

const (
	keptLines  = 60
	keptAlarms = 20
)

// alarmWords are in the kernel's messages that explain why a command did not end.
var alarmWords = []string{"Kernel panic", "Oops", "int3: ", "BUG:", "blocked for more than", "WARNING: ", "Out of memory", "I/O error"}

func (l *lastLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	parts := strings.Split(l.part+strings.ReplaceAll(string(p), "\r", ""), "\n")
	l.part = parts[len(parts)-1]
	for _, line := range parts[:len(parts)-1] {
		l.lines = append(l.lines, line)
		for _, word := range alarmWords {
			if strings.Contains(line, word) && len(l.alarm) < keptAlarms {
				l.alarm = append(l.alarm, line)
				break
			}
		}
	}
	if extra := len(l.lines) - keptLines; extra > 0 {
		l.lines = append(l.lines[:0], l.lines[extra:]...)
	}
	return len(p), nil
}

func (l *lastLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(append(l.lines[:len(l.lines):len(l.lines)], l.part), "\n")
}

// without returns the lines that do not hold text.
func (l *lastLines) without(text string) string {
	var out []string
	for _, line := range strings.Split(l.String(), "\n") {
		if !strings.Contains(line, text) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

// oopsOfBreakpoint is the first line of the kernel's report of a breakpoint that is not its own; the word before is
// newer than 6.1.
var oopsOfBreakpoint = regexp.MustCompile(`^\[ *[\d.]+\] (Oops: )?int3: .*\[#1\]`)

func (l *lastLines) breakpoint() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.alarm, oopsOfBreakpoint.MatchString)
}

func (l *lastLines) alarms() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.alarm, "\n")
}

// indent makes a titled block of text for the end of an error, nothing if text is empty.
func indent(title, text string) string {
	text = strings.TrimSpace(text)
	if text == "" {
		return ""
	}
	return "\n" + title + ":\n  " + strings.ReplaceAll(text, "\n", "\n  ")
}
