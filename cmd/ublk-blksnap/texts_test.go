package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// TestTexts: the commands and options that README and docs name within a sentence or a table, and those of the README's
// picture, are there. Whole commands are run by "make docs".
func TestTexts(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, span := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(string(text), -1) {
			if checkNamed(t, filepath.Base(page), strings.Fields(span[1])) {
				named++
			}
		}
	}
	session, err := os.ReadFile("../../tests/picture/session")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(session), "\n") {
		command, _, _ := strings.Cut(line, " |")
		if checkNamed(t, "session", strings.Fields(command)) {
			named++
		}
	}
	if named < 100 {
		t.Errorf("only %d commands were looked at", named)
	}
}

// checkNamed says whether words are a command of ours. If so, it must be there, and its options too.
func checkNamed(t *testing.T, page string, words []string) bool {
	t.Helper()
	program := &program{name: "ublk-blksnap"}
	ours := len(words) > 1 && (words[0] == "ublk-blksnap" || words[0] == "blksnap")
	if ours {
		program.name = words[0]
		words = words[1:]
	}
	root := program.root()
	c, rest, err := root.Find(words)
	if c == root && !ours {
		return false
	}
	if err != nil {
		t.Errorf("%s: %q: %v", page, words, err)
		return true
	}
	group := c == root || isGroup(c)
	c.InitDefaultHelpFlag()
	for _, word := range rest {
		name, _, _ := strings.Cut(strings.TrimLeft(word, "-"), "=")
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		flags.AddFlagSet(c.Flags())
		flags.AddFlagSet(c.InheritedFlags())
		switch {
		case strings.HasPrefix(word, "--") && flags.Lookup(name) == nil,
			len(word) == 2 && word[0] == '-' && flags.ShorthandLookup(name) == nil,
			group && word[0] != '-':
			t.Errorf("%s: %q: there is no %s", page, words, word)
		}
	}
	return true
}
