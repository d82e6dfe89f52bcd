// Package uapi holds the structs and numbers of the kernel's user interface
// that golang.org/x/sys/unix lacks. One file per kernel header; constants have
// the kernel's spelling, structs cite their C name and can be read beside the
// header line by line.
//
// The encodings are those of the kernel's generic ioctl numbers (amd64, arm64,
// riscv64, s390x, loong64), and the structs have the same layout on every
// 64-bit machine.
//
// A test compiles a C program against the headers of the host and compares
// every size, offset and number that those headers have, and everything
// against values written down in the test.
package uapi

// asm-generic/ioctl.h: the direction, size, type and number of a command.
const (
	iocWrite = 1
	iocRead  = 2
)
