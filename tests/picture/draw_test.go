package main

import (
	"encoding/xml"
	"slices"
	"strings"
	"testing"
)

// TestRecordAndDraw: what commands really print is in the picture, whatever characters it has, in lines as they were.
func TestRecordAndDraw(t *testing.T) {
	steps, err := record("here=there", []string{`echo "a   <b>  & $here"`, "x=1", "echo $x; echo; echo '  two' >&2"})
	if err != nil {
		t.Fatal(err)
	}
	picture, err := draw(steps)
	if err != nil {
		t.Fatal(err)
	}
	var svg struct {
		Text []struct {
			Class string   `xml:"class,attr"`
			Own   string   `xml:",chardata"`
			Spans []string `xml:"tspan"`
		} `xml:"text"`
	}
	if err := xml.Unmarshal([]byte(picture), &svg); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range svg.Text {
		if l.Class == "l" {
			got = append(got, strings.Join(l.Spans, "")+l.Own)
		}
	}
	want := []string{`# echo "a   <b>  & $here"`, "a   <b>  & there", "# x=1", "# echo $x; echo; echo '  two' >&2", "1", "", "  two"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q\n%s", got, want, picture)
	}
}

// TestNoPicture: what fails, or what the window cannot show, is refused.
func TestNoPicture(t *testing.T) {
	if _, err := record("", []string{"true", "echo no such disk; false", "true"}); err == nil || !strings.Contains(err.Error(), "echo no such disk; false: exit status 1: no such disk") {
		t.Errorf("a command that fails: %v", err)
	}
	if _, err := record("false", []string{"true"}); err == nil {
		t.Error("a preparation that fails is taken")
	}
	for _, output := range []string{strings.Repeat("x", columns+1), "a\tb", "\x1b[1mbold"} {
		if _, err := draw([]step{{"cat x", output}}); err == nil {
			t.Errorf("%q is drawn", output)
		}
	}
}
