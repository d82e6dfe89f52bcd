// Package docs has the tests of what the texts for people say: of the tree, and of what their commands do.
package docs

import (
	"fmt"
	"regexp"
	"strings"
)

// A block is commands of a text for people, which a test runs (see TestCommands):
//
//	```sh           a piece of a shell script; so is what is indented by four spaces
//	```console      commands behind "# ", each with what it prints; … stands for anything
//	```sh not-run   commands that cannot run in the test's machine, each of them in the list notRun
//
// Fenced blocks of other languages hold no commands.
type block struct {
	line   int // of the text, of the block's first line
	kind   string
	notRun bool
	lines  []string
}

var fence = regexp.MustCompile("^( *)```(.*)$")

// blocksOf are the blocks of a text in Markdown that hold commands.
func blocksOf(text string) (all []block, err error) {
	var fenced *block // that is open
	indent := ""
	var open *block // that is indented
	item := 0       // indentation of the list's item that goes on
	blank := true
	for i, line := range strings.Split(text, "\n") {
		m := fence.FindStringSubmatch(line)
		switch {
		case fenced != nil && m != nil && m[2] == "":
			switch fenced.kind {
			case "sh", "console":
				all = append(all, *fenced)
			case "":
				return nil, fmt.Errorf("line %d: a block without a language: sh, console or text", fenced.line-1)
			}
			fenced = nil
		case fenced != nil:
			fenced.lines = append(fenced.lines, strings.TrimPrefix(line, indent))
		case m != nil:
			words := strings.Fields(m[2])
			fenced, indent, open = &block{line: i + 2}, m[1], nil
			if len(words) > 0 {
				fenced.kind, fenced.notRun = words[0], len(words) > 1 && words[1] == "not-run"
			}
		case strings.HasPrefix(line, strings.Repeat(" ", item+4)) && (blank || open != nil):
			if open == nil {
				all = append(all, block{line: i + 1, kind: "sh"})
				open = &all[len(all)-1]
			}
			open.lines = append(open.lines, line[item+4:])
		case strings.TrimSpace(line) != "":
			open = nil
			if !strings.HasPrefix(line, " ") {
				item = 0
			}
			if strings.HasPrefix(line, "- ") {
				item = 2
			}
		}
		blank = strings.TrimSpace(line) == ""
	}
	if fenced != nil {
		return nil, fmt.Errorf("line %d: a block that does not end", fenced.line-1)
	}
	return all, nil
}

// A step is a command of a block, or all of a block that is a piece of a script.
type step struct {
	line   int
	script string
	// What it prints, if the text says so.
	prints bool
	output []string
}

func (b block) steps() (all []step, err error) {
	if b.kind == "sh" {
		return []step{{line: b.line, script: strings.Join(b.lines, "\n")}}, nil
	}
	for i, line := range b.lines {
		if command, ok := strings.CutPrefix(line, "# "); ok {
			all = append(all, step{line: b.line + i, script: command, prints: true})
		} else if len(all) == 0 {
			return nil, fmt.Errorf("line %d: a console begins with a command behind \"# \"", b.line)
		} else {
			last := &all[len(all)-1]
			last.output = append(last.output, line)
		}
	}
	return all, nil
}

// matches says whether output is what the text shows, in which … stands for anything, on a line of its own for any lines,
// and several spaces for any number of them.
func (s step) matches(output string) bool {
	var pattern strings.Builder
	pattern.WriteString("^")
	for _, line := range s.output {
		if line == "…" {
			pattern.WriteString(`(?:.*\n)*?`)
			continue
		}
		line = regexp.QuoteMeta(strings.TrimRight(line, " "))
		line = strings.ReplaceAll(line, "…", ".*")
		line = regexp.MustCompile(" {2,}").ReplaceAllString(line, " +")
		pattern.WriteString(line + ` *\n`)
	}
	return regexp.MustCompile(pattern.String() + "$").MatchString(output)
}
