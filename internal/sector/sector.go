// Package sector is the unit in which the kernel counts block devices: a
// sector of 512 bytes, whatever the logical block size of the disk. Sizes,
// offsets and ranges in ublk, sysfs, device-mapper and blksnap's commands are
// in sectors.
package sector

const (
	// Size of a sector, in bytes.
	Size = 1 << Shift
	// Shift makes sectors of bytes and bytes of sectors.
	Shift = 9
)
