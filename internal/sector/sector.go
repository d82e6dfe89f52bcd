// Package sector is the unit in which the kernel counts block devices. A sector has
// 512 bytes, whatever the logical block size of the disk is. Sizes, offsets and
// ranges are in sectors in ublk, sysfs, device-mapper and blksnap's commands.
package sector

const (
	// Size of a sector, in bytes.
	Size = 1 << Shift
	// Shift makes sectors of bytes and bytes of sectors.
	Shift = 9
)
