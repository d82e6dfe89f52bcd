package blockdev

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// zeroesLen is how many zeroes there are, in bytes.
const zeroesLen = 1 << 20

// Zeroes is memory to write zeroes from, off the Go heap as every buffer. All
// queues share it, and it cannot be written to, so it takes no memory, locked
// or not.
func Zeroes() []byte { return zeroes() }

var zeroes = sync.OnceValue(func() []byte {
	mem, err := unix.Mmap(-1, 0, zeroesLen, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("map zeroes: %v", err))
	}
	return mem
})
