package uring

// Constants of <linux/io_uring.h>, kernel spelling. abi_test.go proves them
// against the header of the C library's kernel package, and where that header
// is too old against fixed numbers.

// Opcodes of entries, enum io_uring_op.
const (
	IORING_OP_NOP          = 0
	IORING_OP_FSYNC        = 3
	IORING_OP_READ_FIXED   = 4
	IORING_OP_WRITE_FIXED  = 5
	IORING_OP_POLL_ADD     = 6
	IORING_OP_TIMEOUT      = 11
	IORING_OP_ASYNC_CANCEL = 14
	IORING_OP_FALLOCATE    = 17
	IORING_OP_READ         = 22
	IORING_OP_WRITE        = 23
	IORING_OP_URING_CMD    = 46
)

// Flags of entries.
const (
	IOSQE_FIXED_FILE = 1 << 0
	IOSQE_ASYNC      = 1 << 4
)

// Flags of one opcode.
const (
	IORING_FSYNC_DATASYNC = 1 << 0
)

const (
	ioringOffSQRing = 0
	ioringOffSQEs   = 0x10000000

	ioringSetupClamp        = 1 << 4
	ioringSetupSubmitAll    = 1 << 7
	ioringSetupCoopTaskrun  = 1 << 8
	ioringSetupTaskrunFlag  = 1 << 9
	ioringSetupSQE128       = 1 << 10
	ioringSetupSingleIssuer = 1 << 12
	ioringSetupDeferTaskrun = 1 << 13
	ioringSetupNoSQArray    = 1 << 16

	ioringFeatSingleMmap = 1 << 0
	ioringFeatNodrop     = 1 << 1
	ioringFeatExtArg     = 1 << 8

	ioringSQCQOverflow = 1 << 1
	ioringSQTaskrun    = 1 << 2

	ioringEnterGetevents      = 1 << 0
	ioringEnterRegisteredRing = 1 << 4

	ioringUnregisterBuffers     = 1
	ioringUnregisterFiles       = 3
	ioringRegisterFilesUpdate   = 6
	ioringRegisterFiles2        = 13
	ioringRegisterBuffers2      = 15
	ioringRegisterBuffersUpdate = 16
	ioringRegisterRingFds       = 20
	ioringUnregisterRingFds     = 21

	ioringRsrcRegisterSparse = 1 << 0
)

// params is struct io_uring_params.
type params struct {
	sqEntries    uint32
	cqEntries    uint32
	flags        uint32
	sqThreadCPU  uint32
	sqThreadIdle uint32
	features     uint32
	wqFd         uint32
	resv         [3]uint32
	sqOff        sqOffsets
	cqOff        cqOffsets
}

// sqOffsets is struct io_sqring_offsets.
type sqOffsets struct {
	head        uint32
	tail        uint32
	ringMask    uint32
	ringEntries uint32
	flags       uint32
	dropped     uint32
	array       uint32
	resv1       uint32
	resv2       uint64
}

// cqOffsets is struct io_cqring_offsets.
type cqOffsets struct {
	head        uint32
	tail        uint32
	ringMask    uint32
	ringEntries uint32
	overflow    uint32
	cqes        uint32
	flags       uint32
	resv1       uint32
	resv2       uint64
}

// filesUpdate is struct io_uring_files_update.
type filesUpdate struct {
	offset uint32
	resv   uint32
	fds    uint64
}

// rsrcRegister is struct io_uring_rsrc_register.
type rsrcRegister struct {
	nr    uint32
	flags uint32
	resv2 uint64
	data  uint64
	tags  uint64
}

// rsrcUpdate is struct io_uring_rsrc_update.
type rsrcUpdate struct {
	offset uint32
	resv   uint32
	data   uint64
}

// rsrcUpdate2 is struct io_uring_rsrc_update2.
type rsrcUpdate2 struct {
	offset uint32
	resv   uint32
	data   uint64
	tags   uint64
	nr     uint32
	resv2  uint32
}
