package blockdev

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// zeroes is zeroChunk of memory that reads as zeroes, for all queues. Nobody
// writes to it, so it takes no memory, locked or not.
var zeroes = sync.OnceValue(func() []byte {
	mem, err := unix.Mmap(-1, 0, zeroChunk, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(fmt.Sprintf("map zeroes: %v", err))
	}
	return mem
})
