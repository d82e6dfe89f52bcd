package control

import "fmt"

// Mode is how payloads travel between the kernel and the disk.
type Mode string

// The modes.
const (
	ModeAuto     Mode = "auto"     // zero copy where the kernel has it
	ModeCopy     Mode = "copy"     // through buffers of the daemon
	ModeZeroCopy Mode = "zerocopy" // by the kernel's own pages
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case ModeAuto, ModeCopy, ModeZeroCopy:
		return m, nil
	}
	return "", fmt.Errorf("%q is not a mode: write auto, copy or zerocopy", s)
}
