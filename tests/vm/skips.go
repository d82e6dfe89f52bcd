package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// skips passes on the output of a verbose Go test and notes each test that was skipped for a reason of its own. In
// the machine everything is there that a test may want, so such a skip is a test that is not run anywhere. Two reasons
// count: a kernel that is too old, told by the words "needs kernel", and a machine beside this one with which it shares
// the tests, told by "the other machine runs it". For the same reason some test has to run: a name that no test has
// proves nothing.
type skips struct {
	to      io.Writer
	part    []byte
	current string          // the test whose output follows
	allowed map[string]bool // tests that gave the reason
	found   []string
	ran     bool // any test at all
}

var allowedSkips = []string{"needs kernel", "the other machine runs it"}

var (
	testStarts  = regexp.MustCompile(`^=== (?:RUN|CONT|NAME) +(\S+)`)
	testSkipped = regexp.MustCompile(`^ *--- SKIP: (\S+)`)
)

func (s *skips) Write(p []byte) (int, error) {
	s.part = append(s.part, p...)
	lines := strings.Split(string(s.part), "\n")
	s.part = []byte(lines[len(lines)-1])
	for _, line := range lines[:len(lines)-1] {
		s.line(line)
	}
	return s.to.Write(p)
}

func (s *skips) line(line string) {
	if m := testStarts.FindStringSubmatch(line); m != nil {
		s.current, s.ran = m[1], true
	} else if m := testSkipped.FindStringSubmatch(line); m != nil {
		// A subtest that was allowed to skip is its own affair, and so is its parent.
		if !s.allowed[m[1]] {
			s.found = append(s.found, m[1])
		}
	} else if slices.ContainsFunc(allowedSkips, func(reason string) bool { return strings.Contains(line, reason) }) {
		if s.allowed == nil {
			s.allowed = map[string]bool{}
		}
		s.allowed[s.current] = true
	}
}

// err tells of the tests that were skipped, or that there were none.
func (s *skips) err() error {
	if !s.ran {
		return errors.New("no test has run")
	}
	if len(s.found) == 0 {
		return nil
	}
	return fmt.Errorf("skipped without a reason that says one of %q: %s", allowedSkips, strings.Join(s.found, ", "))
}
