package blockdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Num is a block device's number.
type Num struct{ Major, Minor uint32 }

// NumOf is the number in the kernel's encoding: that of a device node's status
// (unix.Stat_t.Rdev), or of the filesystem that a file is on (Dev).
func NumOf(dev uint64) Num { return Num{unix.Major(dev), unix.Minor(dev)} }

func (n Num) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }
