package cbtstate

import (
	"errors"
	"fmt"
	"strings"
)

// Notes are small files in a directory of their own, in the state directory, each of
// which is there whole or not at all, over a loss of power too. Its calls may hang as
// long as the filesystem does.
type Notes struct{ folder folder }

// OpenNotes opens the directory at path: see Open.
func OpenNotes(root, path string, create bool) (*Notes, error) {
	f, err := openFolder(root, path, create)
	if err != nil {
		return nil, err
	}
	return &Notes{f}, nil
}

// Close closes it.
func (n *Notes) Close() { n.folder.close() }

// Put replaces the note of that name. It is durable when Put returns nil; after an
// error it is there as it was, or as it shall be.
func (n *Notes) Put(name string, text []byte) error {
	if err := replace(n.folder, name, text); err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	return nil
}

// Remove removes a note, durably, if there is one, and what a Put that was cut short has
// left of it.
func (n *Notes) Remove(name string) error {
	err := errors.Join(n.folder.remove(name), n.folder.remove(name+newSuffix))
	if err == nil {
		err = n.folder.sync()
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// Get reads a note. The error is fs.ErrNotExist or a *Refusal.
func (n *Notes) Get(name string) ([]byte, error) { return n.folder.read(name, maxRecord) }

// Names are the names of the notes.
func (n *Notes) Names() (out []string, err error) {
	all, err := n.folder.names()
	for _, name := range all {
		if !strings.HasSuffix(name, newSuffix) {
			out = append(out, name)
		}
	}
	return out, err
}
