// Package statefiletest damages files that outlive the daemon, one kind after the other,
// in all the ways in which a file can be another than the one that was written. Whoever
// reads such a file has a test with [Try]; Kinds has all kinds, and its test sees to it
// that no file is written which is of none of them.
package statefiletest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// Kinds are the kinds of files that outlive the daemon.
var Kinds = []string{
	// of the tmpfs
	"format", "device", "change map", "counters", "events", "recoveries", "removed", "outdated", "frozen", "hooks", "daemon",
	"snapshot", "log", "pool", "words", "take", "key",
	// of the run directory
	"start",
	// of the state directory
	"saved record", "saved map", "used record", "running record", "base", "intent log", "note",
}

// File is a file of one kind.
type File struct {
	Kind string
	Path string
	// Header is how many bytes of it, from its beginning, are damaged bit by bit. Free
	// are parts of that which mean nothing, or may have any value.
	Header int
	Free   [][2]int
	// Future makes the file one of a later version: nil if it has none.
	Future func(whole []byte) []byte
	// Data says that any content of the right length is valid: its file is data.
	Data bool
	// Read reads it. An error says that nothing of it is used, and why.
	Read func() error
}

// Statefile is a file of package statefile. Its heading has a checksum of the rest.
func Statefile(t *testing.T, kind, path string, read func() error) File {
	t.Helper()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return File{Kind: kind, Path: path, Header: bytes.IndexByte(whole, '\n') + 1, Read: read, Future: func(whole []byte) []byte {
		head, body, _ := bytes.Cut(whole, []byte("\n"))
		fields := strings.Fields(string(head)) // see package statefile
		version, err := strconv.Atoi(fields[2])
		if err != nil {
			t.Fatal(err)
		}
		text, err := statefile.Encode(fields[1], version+1, json.RawMessage(bytes.TrimSuffix(body, []byte("\n"))))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}}
}

// Try damages the file in each way, and reads it. It is whole before and after.
func Try(t *testing.T, f File) {
	t.Helper()
	if !slices.Contains(Kinds, f.Kind) {
		t.Fatalf("there is no kind %q", f.Kind)
	}
	whole, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	restore := func() {
		t.Helper()
		_ = os.RemoveAll(f.Path)
		if err := os.WriteFile(f.Path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	restore()
	if err := f.Read(); err != nil {
		t.Fatalf("%s: whole, and refused: %v", f.Kind, err)
	}
	refused := func(what string) {
		t.Helper()
		switch err := f.Read(); {
		case err == nil:
			t.Errorf("%s: %s, and believed", f.Kind, what)
		case err.Error() == "":
			t.Errorf("%s: %s, and refused without a word", f.Kind, what)
		}
		restore()
	}
	with := func(what string, text []byte) {
		t.Helper()
		if err := os.WriteFile(f.Path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(what)
	}
	restore()
	for _, n := range cuts(len(whole), f.Header) {
		with(fmt.Sprintf("cut to %d of %d bytes", n, len(whole)), whole[:n])
	}
	if f.Header == 0 && !f.Data {
		t.Errorf("%s: without a header", f.Kind)
	}
	for n := range min(f.Header, len(whole)) {
		if slices.ContainsFunc(f.Free, func(part [2]int) bool { return n >= part[0] && n < part[1] }) {
			continue
		}
		for bit := range 8 {
			flipped := bytes.Clone(whole)
			flipped[n] ^= 1 << bit
			with(fmt.Sprintf("bit %d of byte %d flipped", bit, n), flipped)
		}
	}
	if !f.Data {
		with("foreign", bytes.Repeat([]byte("what somebody else has written\n"), len(whole)/31+1)[:len(whole)])
		with("zeroes", make([]byte, len(whole)))
	}
	with("foreign and short", []byte("#!/bin/sh\nexit 0\n"))
	with("longer", append(bytes.Clone(whole), "more"...))
	if f.Future != nil {
		with("of a version to come", f.Future(bytes.Clone(whole)))
	}
	for _, mode := range []os.FileMode{0o666, 0o622, 0o602} {
		if err := os.Chmod(f.Path, mode); err != nil {
			t.Fatal(err)
		}
		refused(fmt.Sprintf("with the mode %o", mode))
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(f.Path, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		refused("of another owner")
	}
	link := f.Path + "-link"
	if err := os.Link(f.Path, link); err != nil {
		t.Fatal(err)
	}
	refused("with another name")
	if err := os.Rename(link, f.Path+"-other"); err == nil {
		defer os.Remove(f.Path + "-other")
	}
	if err := os.Remove(f.Path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(f.Path+"-other", f.Path); err != nil {
		t.Fatal(err)
	}
	refused("behind a link")
	if err := f.Read(); err != nil {
		t.Errorf("%s: whole again, and refused: %v", f.Kind, err)
	}
}

// cuts are lengths that are not the whole one: all within the header and some more.
func cuts(length, header int) (out []int) {
	for n := 0; n < length; n++ {
		if n < header && n < 256 || n == length-1 || n == length/2 || n&(n-1) == 0 {
			out = append(out, n)
		}
	}
	return out
}
