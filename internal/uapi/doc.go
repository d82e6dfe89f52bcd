// Package uapi holds the structs and numbers of the kernel's user interface
// that golang.org/x/sys/unix lacks. There is one file for each kernel header. The
// constants have the kernel's spelling, and the structs cite their C names, so that
// a file can be read beside its header line by line.
//
//	linux/ublk_cmd.h ── ublk_cmd.go ─┐
//	linux/fs.h ──────── fs.go ───────┼─> packages that talk to the kernel
//	linux/blkpg.h ───── blkpg.go ────┤
//	                                 │
//	the host's headers, through a    │
//	C program ── uapi_test.go ───────┘ every size, offset and number
//
// The encodings are those of the kernel's generic ioctl numbers (amd64, arm64,
// riscv64, s390x, loong64), and the structs have the same layout on every
// 64-bit machine.
//
// A test compiles a C program against the headers of the host, and compares every
// size, offset and number that those headers have. It also compares all of them
// with values that are written down in the test.
//
// The package has only constants, structs without pointers, and pure functions. It
// makes no system call and returns no error, and any number of goroutines may use
// it. The memory that the kernel is given belongs to the caller.
package uapi

// asm-generic/ioctl.h: the direction, size, type and number of a command.
const (
	iocWrite = 1
	iocRead  = 2
)
