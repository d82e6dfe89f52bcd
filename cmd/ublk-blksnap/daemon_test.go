package main

import (
	"bytes"
	"testing"
)

// TestPrefixed: the journal takes each line for a message of its own.
func TestPrefixed(t *testing.T) {
	var b bytes.Buffer
	if n, err := (prefixed{&b, "<3>"}).Write([]byte("one\ntwo\n")); n != 8 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if got := b.String(); got != "<3>one\n<3>two\n" {
		t.Errorf("%q", got)
	}
}
