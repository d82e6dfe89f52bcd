package blockdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Num is a block device's number.
type Num struct{ Major, Minor uint32 }

// NumOf decodes the kernel's encoding of a number, as a file's status has it: Rdev of
// unix.Stat_t for a device node, Dev for the filesystem that a file is on.
func NumOf(dev uint64) Num { return Num{unix.Major(dev), unix.Minor(dev)} }

func (n Num) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }
