package blockdev

// This file has the ways to discard and to write zeroes. No file can do all of them,
// and a file says what it cannot do only when it is asked.

// method is how an operation is done. If a file cannot do it in one way, the queue
// tries the next.
type method uint8

const (
	methodPlain       method = iota // read, write, fsync, fallocate
	methodDiscard                   // the block layer's discard
	methodPunch                     // fallocate: deallocate, reads as zeroes
	methodZero                      // fallocate: zero, keep the space
	methodWriteZeroes               // plain writes of zeroes
)

func firstMethod(op *Op) method {
	file := op.File.(*OSFile)
	switch op.Kind {
	case Discard:
		if file.block {
			return methodDiscard
		}
		return methodPunch
	case WriteZeroes:
		// A hole does not make a regular file grow, but zeroes must.
		if op.NoUnmap || !file.block && !file.holds(op.Off+op.Len) {
			return methodZero
		}
		return methodPunch
	case Read, Write, Flush, Allocate:
	}
	return methodPlain
}

// nextMethod is the method to try if the file cannot do m (EOPNOTSUPP). It is false if
// op cannot be done at all.
//
//	discard, block device: discard -> punch
//	discard, file:         punch
//	write-zeroes:          punch -> zero -> write zeroes
//	write-zeroes, NoUnmap: zero -> write zeroes
func nextMethod(op *Op, m method) (method, bool) {
	switch {
	case m == methodDiscard:
		return methodPunch, true
	case op.Kind == WriteZeroes && m == methodPunch:
		return methodZero, true
	case op.Kind == WriteZeroes && m == methodZero:
		return methodWriteZeroes, true
	}
	return m, false
}

// blockDiscard is BLOCK_URING_CMD_DISCARD of <linux/blkdev.h>, Linux 6.12: on
// a block device, sqe.addr is the start and sqe.addr3 the length in bytes.
const blockDiscard = 0x12 << 8
