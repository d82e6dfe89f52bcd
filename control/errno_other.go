//go:build !unix

package control

// Errno is the name of an error number of the daemon's system, such as "EBUSY".
type Errno string

func (n Errno) Error() string { return string(n) }

func errnoName(n Errno) string { return string(n) }

func errnoNamed(name string) Errno { return Errno(name) }
