package main

import (
	"bytes"
	"io"
)

// watcher passes its input on and tells once when a line with text has gone by.
type watcher struct {
	to   io.Writer
	text string
	seen chan<- struct{}
	line []byte
}

func (w *watcher) Write(p []byte) (int, error) {
	w.line = append(w.line, p...)
	for {
		end := bytes.IndexByte(w.line, '\n')
		if end < 0 {
			break
		}
		if w.seen != nil && bytes.Contains(w.line[:end], []byte(w.text)) {
			w.seen <- struct{}{}
			w.seen = nil
		}
		w.line = w.line[end+1:]
	}
	return w.to.Write(p)
}
