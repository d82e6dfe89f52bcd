package main

import (
	"fmt"
	"strings"
)

// The exit statuses: the kinds of failure that a script does something about.
const (
	statusFailed          = 1
	statusUsage           = 2
	statusNotFound        = 3
	statusNoDaemon        = 4
	statusBusy            = 5
	statusGenerationEnded = 6
	statusCorrupted       = 7
	statusTimeout         = 8
	statusInterrupted     = 128 + 2 // as a shell has it for SIGINT
)

// statuses are what help and manual say of them.
var statuses = []struct {
	status  int
	meaning string
}{
	{0, "done"},
	{statusFailed, "failed"},
	{statusUsage, "wrong usage"},
	{statusNotFound, "no such device, snapshot or file"},
	{statusNoDaemon, "no daemon runs"},
	{statusBusy, "in use"},
	{statusGenerationEnded, "the generation of changes has ended: a full copy is needed"},
	{statusCorrupted, "the snapshot or the change map is corrupted"},
	{statusTimeout, "took too long"},
	{statusInterrupted, "interrupted"},
}

const blksnapStatuses = "blksnap's own commands know 0 and 1, as blksnap does."

// statusHelp is the table as help has it.
var statusHelp = func() string {
	var all []string
	for _, s := range statuses {
		all = append(all, fmt.Sprint(s.status, " ", s.meaning))
	}
	return strings.Join(wrap("Exit status: "+strings.Join(all, ", ")+". "+blksnapStatuses, 81), "\n")
}()
