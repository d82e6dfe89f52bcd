package daemon

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/filter"
)

// The counters of a filter lie in a file that is mapped, so that they go on when
// another daemon takes the filter over.
//
//	bytes 0..7    countersMagic
//	      8..15   number of queues
//	    128..     filter.Counters of each queue
//
// They are for people: a file that is not what it should be is replaced by zeroes.

const (
	countersMagic  = uint64(0x326e75436b6c6275) // "ublkCun2"
	countersHeader = 128
)

type counters struct {
	path   string
	memory []byte
	queues []filter.Counters
}

// openCounters takes the counters at path over, or makes them.
func openCounters(path string, queues int) (*counters, error) {
	c := &counters{path: path}
	size := int64(countersHeader) + int64(queues)*int64(unsafe.Sizeof(filter.Counters{}))
	f, err := openLeft(path, os.O_RDWR)
	if err == nil {
		err = c.mapFile(f, size)
		f.Close()
		if err == nil && *c.word(0) == countersMagic && *c.word(1) == uint64(queues) {
			c.count(queues)
			for i := range c.queues {
				// What was under way is repeated, and counted again.
				c.queues[i].InFlight.Store(0)
			}
			return c, nil
		}
		c.unmap()
	}
	fresh := path + " new" // no device is called so
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make counters: %w", err)
	}
	if f, err = os.OpenFile(fresh, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, fmt.Errorf("make counters: %w", err)
	}
	defer f.Close()
	// A store into a hole of a full tmpfs would kill the process.
	if err = allocate(f, size); err == nil {
		if err = c.mapFile(f, size); err == nil {
			*c.word(0), *c.word(1) = countersMagic, uint64(queues)
			err = os.Rename(fresh, path)
		}
	}
	if err != nil {
		c.unmap()
		return nil, errors.Join(fmt.Errorf("make counters: %w", err), os.Remove(fresh))
	}
	c.count(queues)
	return c, nil
}

func allocate(f *os.File, size int64) error {
	for {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != unix.EINTR {
			return err
		}
	}
}

func (c *counters) mapFile(f *os.File, size int64) error {
	st, err := f.Stat()
	if err == nil && st.Size() != size {
		err = fmt.Errorf("%s has %d bytes, not %d", f.Name(), st.Size(), size)
	}
	if err == nil {
		c.memory, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	return err
}

func (c *counters) word(i int) *uint64 {
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(c.memory[8*i : 8*i+8])))
}

// count makes the memory the queues' counters: words that are changed atomically, of
// which every value is valid.
func (c *counters) count(queues int) {
	c.queues = unsafe.Slice((*filter.Counters)(unsafe.Pointer(unsafe.SliceData(c.memory[countersHeader:]))), queues)
}

func (c *counters) unmap() {
	if c.memory != nil {
		_ = unix.Munmap(c.memory)
	}
	c.memory, c.queues = nil, nil
}

// remove is for a filter that is gone. nil counters are none.
func (c *counters) remove() {
	if c != nil {
		c.unmap()
		_ = os.Remove(c.path)
	}
}
