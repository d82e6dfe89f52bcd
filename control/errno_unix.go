//go:build unix

package control

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// Errno is an error number of the system that the client runs on. A name that it
// does not know is 0.
type Errno = syscall.Errno

// errnoName is the name of an errno, empty for none.
func errnoName(n Errno) string {
	if n == 0 {
		return ""
	}
	return unix.ErrnoName(n)
}

func errnoNamed(name string) Errno {
	for n := Errno(1); name != "" && n < 200; n++ {
		if unix.ErrnoName(n) == name {
			return n
		}
	}
	return 0
}
