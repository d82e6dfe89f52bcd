package cbtstate

import (
	"os"
	"path/filepath"
	"testing"
)

// TestNotesRemove: nothing is left of a note, nor of one that was being replaced when its
// daemon died.
func TestNotesRemove(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "notes")
	n, err := OpenNotes("/", dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.Put("a.note", []byte("text")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.note"+newSuffix), []byte("te"), 0o600); err != nil {
		t.Fatal(err)
	}
	if names, err := n.Names(); err != nil || len(names) != 1 || names[0] != "a.note" {
		t.Errorf("notes %v, %v", names, err)
	}
	for range 2 { // again, when it is not there
		if err := n.Remove("a.note"); err != nil {
			t.Fatal(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Fatalf("left: %v, %v", left, err)
		}
	}
}
