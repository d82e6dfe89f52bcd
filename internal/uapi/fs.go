package uapi

// linux/fs.h

const (
	// BLKGETDISKSEQ is _IOR(0x12, 128, __u64): a disk's number, which no other disk has in
	// this boot.
	BLKGETDISKSEQ = iocRead<<30 | 8<<16 | 0x12<<8 | 128
	// FIFREEZE is _IOWR('X', 119, int): a filesystem stops writing.
	FIFREEZE = (iocRead|iocWrite)<<30 | 4<<16 | 'X'<<8 | 119
	// FITHAW is _IOWR('X', 120, int): it may write again.
	FITHAW = (iocRead|iocWrite)<<30 | 4<<16 | 'X'<<8 | 120
)
