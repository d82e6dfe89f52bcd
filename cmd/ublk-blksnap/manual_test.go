package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

// TestExamples: each of our commands has examples, and each is a command line that the program takes.
func TestExamples(t *testing.T) {
	// The command's own words, without what the shell makes of their output.
	call := regexp.MustCompile(`ublk-blksnap ([^|>)]*)`)
	for _, c := range commandsBelow((&program{name: "ublk-blksnap"}).root()) {
		_, path, _ := strings.Cut(c.CommandPath(), " ")
		if isGroup(c) {
			continue
		}
		if c.Example == "" {
			t.Errorf("%s has no example", path)
		}
		for _, line := range strings.Split(c.Example, "\n") {
			root := (&program{name: "ublk-blksnap"}).root()
			ours := call.FindStringSubmatch(line)
			if ours == nil {
				continue
			}
			words := strings.Fields(ours[1])
			found, rest, err := root.Find(words)
			if err == nil {
				err = found.ParseFlags(rest)
			}
			if err == nil {
				err = found.ValidateArgs(found.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: %q: %v", path, line, err)
			} else if found.CommandPath() != c.CommandPath() && !strings.Contains(c.Example, "ublk-blksnap "+path) {
				t.Errorf("%s: %q is an example of %s", path, line, found.CommandPath())
			}
		}
	}
}

// TestManualPages: every command and every parameter is in the manual, and troff has nothing to say against a page.
func TestManualPages(t *testing.T) {
	dir := t.TempDir()
	if status, out, errs := execute(newFake(), "ublk-blksnap", "manual", dir); status != 0 || out != "" {
		t.Fatalf("status %d, printed %q: %s", status, out, errs)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	pages := map[string]string{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pages[filepath.Base(file)] = strings.ReplaceAll(string(b), `\-`, "-")
	}
	has := func(page string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(pages[page], w) {
				t.Errorf("%s does not say %q", page, w)
			}
		}
	}
	root := (&program{name: "ublk-blksnap"}).root()
	has("ublk-blksnap.8", ".SH EXAMPLES\n.PP\n", ".SH EXIT STATUS\n", "\\fB6\\fR\nthe generation of changes has ended", "/etc/ublk-blksnap.conf", "\\fB--run-dir\\fR")
	want := 3
	for _, c := range commandsBelow(root) {
		want++
		has(pageName(c)+".8", ".SH NAME\n"+pageName(c)+" - ", ".SH SYNOPSIS\n", ".SH DESCRIPTION\n", ".SH EXAMPLES\n.PP\n.RS 4\n.nf\n", ".SH EXIT STATUS\n", ".SH SEE ALSO\n")
		if !isGroup(c) {
			has("ublk-blksnap.8", "\\fB"+c.CommandPath()+"\\fR(8)")
		}
	}
	for _, c := range (&program{name: "blksnap"}).blksnapCommands() {
		has("blksnap.8", ".SS "+c.Name()+"\n")
	}
	has("ublk-blksnap.8", "/etc/ublk-blksnap.hooks", "/run/ublk-blksnap/control.sock", "/run/ublk-blksnap/read.sock")
	// Under that name it is the driver's.
	has("blksnap.8", "Print the version as four numbers")
	// No image is there before the take.
	_, examples, _ := strings.Cut(pages["blksnap.8"], ".SH EXAMPLES\n")
	if take, image := strings.Index(examples, "snapshot_take -i"), strings.Index(examples, "snapshot_info"); take < 0 || image < take {
		t.Errorf("the examples of blksnap.8 take the snapshot at %d and want its image at %d", take, image)
	}
	cfg := daemon.DefaultConfig()
	for _, q := range cfg.Params() {
		has("ublk-blksnap.conf.5", "\\fB"+q.Key+"\\fR")
	}
	if len(files) != want {
		t.Errorf("%d pages, want %d", len(files), want)
	}
	if _, err := exec.LookPath("man"); err != nil {
		t.Skip("no man")
	}
	for _, file := range files {
		show := exec.Command("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", file)
		show.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANROFFSEQ=")
		var said bytes.Buffer
		show.Stderr = &said
		if err := show.Run(); err != nil || said.Len() > 0 {
			t.Errorf("man %s: %v: %s", filepath.Base(file), err, said.String())
		}
	}
}

func TestTroff(t *testing.T) {
	for s, want := range map[string]string{
		".TH":         `\&.TH`,
		"a\n'b":       "a\n" + `\&\(aqb`,
		`a\b --c`:     `a\eb \-\-c`,
		"x^~`…":       `x\(ha\(ti\(ga\[u2026]`,
		"don't be a.": `don\(aqt be a.`,
	} {
		if got := troff(s); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

// TestCompletion: names come from the daemon, and nothing else is completed in their place.
func TestCompletion(t *testing.T) {
	for line, want := range map[string][]string{
		"remove ":                        {"vdb\t/dev/vdb", ":4"},
		"remove vdb ":                    {":4"},
		"status ":                        {"vdb\t/dev/vdb", ":4"},
		"cbt changes ":                   {"vdb\t/dev/vdb", ":4"},
		"snapshot create vdb ":           {":4"}, // it is there already
		"snapshot destroy " + id1 + " ":  {"latest", "nightly\ttaken /dev/vdb", id2 + "\tcorrupted /dev/vdb", ":4"},
		"snapshot append ":               {"latest", "nightly\ttaken /dev/vdb", id1 + "\ttaken /dev/vdb", id2 + "\tcorrupted /dev/vdb", ":4"},
		"snapshot append " + id1 + " ":   {":0"}, // a file
		"snapshot_destroy -i ":           {id1 + "\ttaken /dev/vdb", id2 + "\tcorrupted /dev/vdb", ":4"},
		"snapshot_create -d ":            {"/dev/vdb\tvdb", ":0"}, // or another file
		"detach -d ":                     {"/dev/vdb\tvdb", ":0"},
		"snapshot_info -f ":              {"image", "error_code", ":4"},
		"snapshot info nightly --field ": {"device", "expires", "image", "name", "state", "take", "uuid", ":4"},
		"completion ":                    {"bash", "fish", "zsh", ":4"},
		"add /dev/vdb --mode ":           {"auto", "copy", "zerocopy", ":4"},
		"add ":                           {":0"},
	} {
		_, out, _ := execute(newFake(), append([]string{"ublk-blksnap", cobra.ShellCompRequestCmd}, strings.Split(line, " ")...)...)
		if got := strings.Split(strings.TrimSpace(out), "\n"); !slices.Equal(got, want) {
			t.Errorf("%q completes %q, want %q", line, got, want)
		}
	}
	// Words that are always the same need no daemon.
	for line, want := range map[string][]string{
		"add /dev/vdb --mode ":           {"auto", "copy", "zerocopy", ":4"},
		"daemon --log-level ":            {"debug", "info", "warn", "error", ":4"},
		"snapshot info nightly --field ": {"device", "expires", "image", "name", "state", "take", "uuid", ":4"},
		"remove ":                        {":4"},
	} {
		var out bytes.Buffer
		p := &program{out: &out, err: io.Discard, connect: func(context.Context, starts) (control.API, error) {
			return nil, &control.Error{Code: control.Unavailable, Message: "no daemon runs"}
		}}
		p.run(context.Background(), append([]string{"ublk-blksnap", cobra.ShellCompRequestCmd}, strings.Split(line, " ")...))
		if got := strings.Split(strings.TrimSpace(out.String()), "\n"); !slices.Equal(got, want) {
			t.Errorf("without a daemon %q completes %q, want %q", line, got, want)
		}
	}
	root := (&program{name: "ublk-blksnap"}).root()
	for path := range completedArgs {
		if c, _, err := root.Find(strings.Fields(path)); err != nil || !strings.HasSuffix(c.CommandPath(), " "+path) {
			t.Errorf("there is no command %q", path)
		}
	}
}
