package docs

import (
	"encoding/xml"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// picture is the README's picture of a session, which "make picture" records.
const picture = "docs/session.svg"

// pictured are the lines of the picture.
func pictured(t *testing.T) (lines []string) {
	t.Helper()
	var svg struct {
		Text []struct {
			Class string   `xml:"class,attr"`
			Own   string   `xml:",chardata"`
			Spans []string `xml:"tspan"`
		} `xml:"text"`
	}
	if err := xml.Unmarshal([]byte(text(t, picture)), &svg); err != nil {
		t.Fatalf("%s: %v", picture, err)
	}
	for _, l := range svg.Text {
		if l.Class == "l" {
			lines = append(lines, strings.Join(l.Spans, "")+l.Own)
		}
	}
	return lines
}

// TestPicture: the README shows the picture, which is of the commands that are recorded, and small.
func TestPicture(t *testing.T) {
	var commands []string
	for _, line := range pictured(t) {
		if command, ok := strings.CutPrefix(line, "# "); ok {
			commands = append(commands, command)
		}
	}
	if want := strings.Split(strings.TrimSpace(text(t, "tests/picture/session")), "\n"); !slices.Equal(commands, want) {
		t.Errorf("%s is of other commands than tests/picture/session (make picture):\n%q\nwant\n%q", picture, commands, want)
	}
	// What was recorded is what a run of the picture's commands may print.
	steps, err := pictureBlock(t).steps()
	if err != nil {
		t.Fatal(err)
	}
	for i, at := 0, 0; i < len(steps); i++ {
		lines := pictured(t)[at+1 : at+1+len(steps[i].output)]
		at += 1 + len(lines)
		if said := strings.Join(append(lines, ""), "\n"); !steps[i].matches(said) {
			t.Errorf("%s: %q is not what %q is taken to print", picture, said, steps[i].script)
		}
	}
	if n := len(text(t, picture)); n > 30<<10 {
		t.Errorf("%s has %d bytes", picture, n)
	}
	if !strings.Contains(text(t, "README.md"), "]("+picture+")") {
		t.Errorf("README.md does not show %s", picture)
	}
}

// pictureBlock is the picture as a text: figures differ each time.
func pictureBlock(t *testing.T) block {
	b := block{line: 1, kind: "console"}
	for _, line := range pictured(t) {
		if !strings.HasPrefix(line, "# ") {
			line = regexp.MustCompile(`\S*\d\S*|\B-\B`).ReplaceAllString(line, "…")
		}
		b.lines = append(b.lines, line)
	}
	return b
}
