package uapi

// linux/blkpg.h

// BLKPG is _IO(0x12, 105): a partition appears, goes or grows.
const BLKPG = 0x12<<8 | 105
