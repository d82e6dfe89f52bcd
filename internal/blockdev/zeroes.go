package blockdev

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// zeroesLen is how many zeroes there are, in bytes.
const zeroesLen = 1 << 20

// Zeroes is memory to write zeroes from. Like every buffer it lies off the Go heap.
// All queues share it. Nobody can write to it, so it takes no memory, not even if the
// process locks its memory.
func Zeroes() []byte { return zeroes() }

var zeroes = sync.OnceValue(func() []byte {
	mem, err := unix.Mmap(-1, 0, zeroesLen, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("map zeroes: %v", err))
	}
	return mem
})
