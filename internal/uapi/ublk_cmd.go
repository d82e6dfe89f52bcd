package uapi

// linux/ublk_cmd.h

// UBLK_FEATURES_LEN is the length of the buffer of GET_FEATURES.
const UBLK_FEATURES_LEN = 8

// Control commands, for /dev/ublk-control. The ioctl encoding is the only one
// that newer kernels take; it needs Linux 6.4.
const (
	ctrlR  = iocRead<<30 | 32<<16 | 'u'<<8            // _IOR('u', nr, struct ublksrv_ctrl_cmd)
	ctrlWR = (iocRead|iocWrite)<<30 | 32<<16 | 'u'<<8 // _IOWR('u', nr, struct ublksrv_ctrl_cmd)

	UBLK_U_CMD_GET_QUEUE_AFFINITY  = ctrlR | 0x01
	UBLK_U_CMD_GET_DEV_INFO        = ctrlR | 0x02
	UBLK_U_CMD_ADD_DEV             = ctrlWR | 0x04
	UBLK_U_CMD_DEL_DEV             = ctrlWR | 0x05
	UBLK_U_CMD_START_DEV           = ctrlWR | 0x06
	UBLK_U_CMD_STOP_DEV            = ctrlWR | 0x07
	UBLK_U_CMD_SET_PARAMS          = ctrlWR | 0x08
	UBLK_U_CMD_GET_PARAMS          = ctrlR | 0x09
	UBLK_U_CMD_START_USER_RECOVERY = ctrlWR | 0x10
	UBLK_U_CMD_END_USER_RECOVERY   = ctrlWR | 0x11
	UBLK_U_CMD_GET_DEV_INFO2       = ctrlR | 0x12  // 6.3
	UBLK_U_CMD_GET_FEATURES        = ctrlR | 0x13  // 6.5
	UBLK_U_CMD_DEL_DEV_ASYNC       = ctrlR | 0x14  // 6.9
	UBLK_U_CMD_UPDATE_SIZE         = ctrlWR | 0x15 // 6.16
	UBLK_U_CMD_QUIESCE_DEV         = ctrlWR | 0x16 // 6.16
	UBLK_U_CMD_TRY_STOP_DEV        = ctrlWR | 0x17 // 7.0
)

// I/O commands, for /dev/ublkcN.
const (
	ioWR = (iocRead|iocWrite)<<30 | 16<<16 | 'u'<<8 // _IOWR('u', nr, struct ublksrv_io_cmd)

	UBLK_U_IO_FETCH_REQ            = ioWR | 0x20
	UBLK_U_IO_COMMIT_AND_FETCH_REQ = ioWR | 0x21
	UBLK_U_IO_NEED_GET_DATA        = ioWR | 0x22
	UBLK_U_IO_REGISTER_IO_BUF      = ioWR | 0x23 // 6.15
	UBLK_U_IO_UNREGISTER_IO_BUF    = ioWR | 0x24 // 6.15
)

// Results of an I/O command.
const (
	UBLK_IO_RES_OK            = 0
	UBLK_IO_RES_NEED_GET_DATA = 1
	UBLK_IO_RES_ABORT         = -19 // -ENODEV: this tag is fetched no more
)

// Limits and offsets.
const (
	UBLKSRV_CMD_BUF_OFFSET = 0
	UBLKSRV_IO_BUF_OFFSET  = 0x80000000
	UBLK_MAX_QUEUE_DEPTH   = 4096
	UBLK_MAX_NR_QUEUES     = 4096
	UBLK_IO_BUF_BITS       = 25 // a payload is at most 32 MiB
)

// Feature flags, in GET_FEATURES and in dev_info.flags.
const (
	UBLK_F_SUPPORT_ZERO_COPY      = 1 << 0
	UBLK_F_URING_CMD_COMP_IN_TASK = 1 << 1
	UBLK_F_NEED_GET_DATA          = 1 << 2
	UBLK_F_USER_RECOVERY          = 1 << 3
	UBLK_F_USER_RECOVERY_REISSUE  = 1 << 4
	UBLK_F_UNPRIVILEGED_DEV       = 1 << 5
	UBLK_F_CMD_IOCTL_ENCODE       = 1 << 6
	UBLK_F_USER_COPY              = 1 << 7
	UBLK_F_ZONED                  = 1 << 8
	UBLK_F_USER_RECOVERY_FAIL_IO  = 1 << 9
	UBLK_F_UPDATE_SIZE            = 1 << 10
	UBLK_F_AUTO_BUF_REG           = 1 << 11
	UBLK_F_QUIESCE                = 1 << 12
	UBLK_F_PER_IO_DAEMON          = 1 << 13
	UBLK_F_BUF_REG_OFF_DAEMON     = 1 << 14
	UBLK_F_BATCH_IO               = 1 << 15
	UBLK_F_INTEGRITY              = 1 << 16
	UBLK_F_SAFE_STOP_DEV          = 1 << 17
	UBLK_F_NO_AUTO_PART_SCAN      = 1 << 18
	UBLK_F_SHMEM_ZC               = 1 << 19
)

// Device states, in dev_info.state.
const (
	UBLK_S_DEV_DEAD     = 0
	UBLK_S_DEV_LIVE     = 1
	UBLK_S_DEV_QUIESCED = 2
	UBLK_S_DEV_FAIL_IO  = 3
)

// UblksrvCtrlCmd is struct ublksrv_ctrl_cmd: the command area of the 128-byte
// entry of a control command.
type UblksrvCtrlCmd struct {
	DevID      uint32
	QueueID    uint16 // 0xffff if the command is not for a queue
	Len        uint16 // of the buffer at Addr
	Addr       uint64 // buffer, in or out
	Data       [1]uint64
	DevPathLen uint16 // path in front of the buffer; GET_DEV_INFO2 and unprivileged devices
	Pad        uint16
	Reserved   uint32
}

// UblksrvCtrlDevInfo is struct ublksrv_ctrl_dev_info.
type UblksrvCtrlDevInfo struct {
	NrHwQueues    uint16
	QueueDepth    uint16
	State         uint16
	Pad0          uint16
	MaxIOBufBytes uint32
	DevID         uint32
	UblksrvPid    int32
	Pad1          uint32
	Flags         uint64
	UblksrvFlags  uint64 // the server's own, opaque to the driver
	OwnerUID      uint32
	OwnerGID      uint32
	Reserved1     uint64
	Reserved2     uint64
}

// Operations, in bits 0 to 7 of io_desc.op_flags.
const (
	UBLK_IO_OP_READ           = 0
	UBLK_IO_OP_WRITE          = 1
	UBLK_IO_OP_FLUSH          = 2
	UBLK_IO_OP_DISCARD        = 3
	UBLK_IO_OP_WRITE_SAME     = 4
	UBLK_IO_OP_WRITE_ZEROES   = 5
	UBLK_IO_OP_ZONE_OPEN      = 10
	UBLK_IO_OP_ZONE_CLOSE     = 11
	UBLK_IO_OP_ZONE_FINISH    = 12
	UBLK_IO_OP_ZONE_APPEND    = 13
	UBLK_IO_OP_ZONE_RESET_ALL = 14
	UBLK_IO_OP_ZONE_RESET     = 15
	UBLK_IO_OP_REPORT_ZONES   = 18
)

// Flags, in bits 8 to 31 of io_desc.op_flags.
const (
	UBLK_IO_F_FAILFAST_DEV       = 1 << 8
	UBLK_IO_F_FAILFAST_TRANSPORT = 1 << 9
	UBLK_IO_F_FAILFAST_DRIVER    = 1 << 10
	UBLK_IO_F_META               = 1 << 11
	UBLK_IO_F_FUA                = 1 << 13
	UBLK_IO_F_NOUNMAP            = 1 << 15
	UBLK_IO_F_SWAP               = 1 << 16
	UBLK_IO_F_NEED_REG_BUF       = 1 << 17
)

// UblksrvIODesc is struct ublksrv_io_desc: one request, in the mapping of
// /dev/ublkcN at the place of its tag.
type UblksrvIODesc struct {
	OpFlags     uint32
	NrSectors   uint32
	StartSector uint64
	Addr        uint64
}

// UblksrvIOCmd is struct ublksrv_io_cmd: the command area of an I/O command.
type UblksrvIOCmd struct {
	QID    uint16
	Tag    uint16
	Result int32  // COMMIT_AND_FETCH_REQ only
	Addr   uint64 // the tag's buffer; 0 without copying
}

// UBLK_AUTO_BUF_REG_FALLBACK asks for UBLK_IO_F_NEED_REG_BUF instead of a
// failed request when a payload cannot be registered.
const UBLK_AUTO_BUF_REG_FALLBACK = 1 << 0

// UblkAutoBufReg is struct ublk_auto_buf_reg.
type UblkAutoBufReg struct {
	Index     uint16
	Flags     uint8
	Reserved0 uint8
	Reserved1 uint32
}

// SqeAddr is ublk_auto_buf_reg_to_sqe_addr.
func (r UblkAutoBufReg) SqeAddr() uint64 {
	return uint64(r.Index) | uint64(r.Flags)<<16 | uint64(r.Reserved0)<<24 | uint64(r.Reserved1)<<32
}

// Bits of ublk_param_basic.attrs.
const (
	UBLK_ATTR_READ_ONLY      = 1 << 0
	UBLK_ATTR_ROTATIONAL     = 1 << 1
	UBLK_ATTR_VOLATILE_CACHE = 1 << 2
	UBLK_ATTR_FUA            = 1 << 3
)

// Bits of ublk_params.types.
const (
	UBLK_PARAM_TYPE_BASIC     = 1 << 0
	UBLK_PARAM_TYPE_DISCARD   = 1 << 1
	UBLK_PARAM_TYPE_DEVT      = 1 << 2
	UBLK_PARAM_TYPE_ZONED     = 1 << 3
	UBLK_PARAM_TYPE_DMA_ALIGN = 1 << 4
	UBLK_PARAM_TYPE_SEGMENT   = 1 << 5
	UBLK_PARAM_TYPE_INTEGRITY = 1 << 6
)

// UblkParamBasic is struct ublk_param_basic.
type UblkParamBasic struct {
	Attrs            uint32
	LogicalBsShift   uint8
	PhysicalBsShift  uint8
	IOOptShift       uint8
	IOMinShift       uint8
	MaxSectors       uint32
	ChunkSectors     uint32
	DevSectors       uint64
	VirtBoundaryMask uint64
}

// UblkParamDiscard is struct ublk_param_discard.
type UblkParamDiscard struct {
	DiscardAlignment      uint32
	DiscardGranularity    uint32
	MaxDiscardSectors     uint32
	MaxWriteZeroesSectors uint32
	MaxDiscardSegments    uint16
	Reserved0             uint16
}

// UblkParamDevt is struct ublk_param_devt.
type UblkParamDevt struct {
	CharMajor uint32
	CharMinor uint32
	DiskMajor uint32
	DiskMinor uint32
}

// UblkParamZoned is struct ublk_param_zoned.
type UblkParamZoned struct {
	MaxOpenZones         uint32
	MaxActiveZones       uint32
	MaxZoneAppendSectors uint32
	Reserved             [20]uint8
}

// UblkParamDMAAlign is struct ublk_param_dma_align.
type UblkParamDMAAlign struct {
	Alignment uint32
	Pad       [4]uint8
}

// UblkParamSegment is struct ublk_param_segment.
type UblkParamSegment struct {
	SegBoundaryMask uint64
	MaxSegmentSize  uint32
	MaxSegments     uint16
	Pad             [2]uint8
}

// UblkParamIntegrity is struct ublk_param_integrity.
type UblkParamIntegrity struct {
	Flags                uint32
	MaxIntegritySegments uint16
	IntervalExp          uint8
	MetadataSize         uint8
	PIOffset             uint8
	CsumType             uint8
	TagSize              uint8
	Pad                  [5]uint8
}

// UblkParams is struct ublk_params.
type UblkParams struct {
	Len       uint32 // of this struct as the caller knows it
	Types     uint32
	Basic     UblkParamBasic
	Discard   UblkParamDiscard
	Devt      UblkParamDevt // filled by the driver
	Zoned     UblkParamZoned
	DMA       UblkParamDMAAlign
	Seg       UblkParamSegment
	Integrity UblkParamIntegrity
}
