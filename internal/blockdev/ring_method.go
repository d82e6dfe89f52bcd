package blockdev

// The ways to discard and to zero. A file cannot do all of them, and says so only
// when it is asked.

// method is how an operation is done. A file that cannot do it one way is
// asked the next.
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
		// A hole does not make a regular file grow, as zeroes do.
		if op.NoUnmap || !file.block && !file.holds(op.Off+op.Len) {
			return methodZero
		}
		return methodPunch
	case Read, Write, Flush, Allocate:
	}
	return methodPlain
}

// nextMethod is what to try when the file cannot do m (EOPNOTSUPP); false when
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
