package uapi

// linux/fs.h

const (
	// FIFREEZE is _IOWR('X', 119, int): a filesystem stops writing.
	FIFREEZE = (iocRead|iocWrite)<<30 | 4<<16 | 'X'<<8 | 119
	// FITHAW is _IOWR('X', 120, int): it may write again.
	FITHAW = (iocRead|iocWrite)<<30 | 4<<16 | 'X'<<8 | 120
)
