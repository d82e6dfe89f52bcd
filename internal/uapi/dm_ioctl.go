package uapi

// linux/dm-ioctl.h

// Commands, for /dev/mapper/control.
const (
	dmWR = (iocRead|iocWrite)<<30 | 312<<16 | 0xfd<<8 // _IOWR(DM_IOCTL, nr, struct dm_ioctl)

	DM_VERSION      = dmWR
	DM_LIST_DEVICES = dmWR | 2
	DM_DEV_CREATE   = dmWR | 3
	DM_DEV_REMOVE   = dmWR | 4
	DM_DEV_SUSPEND  = dmWR | 6 // and, without DM_SUSPEND_FLAG, to resume
	DM_DEV_STATUS   = dmWR | 7
	DM_TABLE_LOAD   = dmWR | 9
	DM_TABLE_CLEAR  = dmWR | 10
	DM_TABLE_DEPS   = dmWR | 11
	DM_TABLE_STATUS = dmWR | 12
)

// The version of the interface that a caller was written for: a kernel with another first
// number refuses it.
const (
	DM_VERSION_MAJOR = 4
)

// Flags, in and out.
const (
	DM_READONLY_FLAG             = 1 << 0
	DM_SUSPEND_FLAG              = 1 << 1
	DM_STATUS_TABLE_FLAG         = 1 << 4
	DM_ACTIVE_PRESENT_FLAG       = 1 << 5
	DM_INACTIVE_PRESENT_FLAG     = 1 << 6
	DM_BUFFER_FULL_FLAG          = 1 << 8
	DM_SKIP_LOCKFS_FLAG          = 1 << 10
	DM_NOFLUSH_FLAG              = 1 << 11
	DM_QUERY_INACTIVE_TABLE_FLAG = 1 << 12
	DM_SECURE_DATA_FLAG          = 1 << 15
)

// Lengths of texts, with the byte of value 0 that ends each.
const (
	DM_NAME_LEN      = 128
	DM_UUID_LEN      = 129
	DM_MAX_TYPE_NAME = 16
)

// DMIoctl is struct dm_ioctl, which precedes what a command takes and gives.
type DMIoctl struct {
	Version     [3]uint32
	DataSize    uint32 // of all, this struct included
	DataStart   uint32
	TargetCount uint32
	OpenCount   int32
	Flags       uint32
	EventNr     uint32
	_           uint32
	Dev         uint64
	Name        [DM_NAME_LEN]byte
	UUID        [DM_UUID_LEN]byte
	Data        [7]byte
}

// DMTargetSpec is struct dm_target_spec. After it come the target's parameters, as text.
type DMTargetSpec struct {
	SectorStart uint64
	Length      uint64
	Status      int32
	// Next is where the next one is: counted from this one when a table is loaded, from
	// DMIoctl.DataStart when it is read.
	Next       uint32
	TargetType [DM_MAX_TYPE_NAME]byte
}

// DMTargetDeps is struct dm_target_deps. After it come Count numbers of devices.
type DMTargetDeps struct {
	Count uint32
	_     uint32
}

// DMNameList is struct dm_name_list, without the name that follows it.
type DMNameList struct {
	Dev  uint64
	Next uint32 // from here to the next one, 0: this is the last
}
