//go:build !linux

package control

import "context"

// process is none here: the daemon runs on another machine.
type process struct{}

func openProcess(int) (p process, ok bool) { return p, false }

func (process) close() {}

func (process) wait(context.Context) error { return nil }
