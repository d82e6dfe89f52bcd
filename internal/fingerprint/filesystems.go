package fingerprint

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian
)

// ext: ext2, ext3 and ext4 (Documentation/filesystems/ext4 of the kernel). A mount
// for writing changes the superblock, a repair its copies, the replay of the journal
// the head of that.
func (s *scan) ext(e extent) {
	b := s.read(e, 1024, 1024)
	if b == nil || le.Uint16(b[0x38:]) != 0xef53 {
		return
	}
	const (
		sparseSuper  = 0x1   // s_feature_ro_compat
		sparseSuper2 = 0x200 // s_feature_compat
	)
	if s.running {
		for _, at := range extRunning {
			clear(b[at[0]:at[1]])
		}
		s.addRead(e, "ext superblock", 1024, b)
		return
	}
	s.add(e, "ext superblock", 1024, 1024)
	shift := le.Uint32(b[0x18:])
	perGroup := int64(le.Uint32(b[0x20:]))
	if shift > 6 || perGroup == 0 {
		return
	}
	blockSize := int64(1024) << shift
	first := int64(le.Uint32(b[0x14:]))
	blocks := e.size / blockSize
	groups := (blocks-first-1)/perGroup + 1
	backup := func(g int64) {
		if g > 0 && g < groups {
			s.add(e, fmt.Sprintf("ext superblock copy in group %d", g), (first+g*perGroup)*blockSize, 1024)
		}
	}
	switch {
	case le.Uint32(b[0x5c:])&sparseSuper2 != 0:
		backup(int64(le.Uint32(b[0x24c:])))
		backup(int64(le.Uint32(b[0x250:])))
	case le.Uint32(b[0x64:])&sparseSuper != 0:
		backup(1)
		for _, n := range []int64{3, 5, 7} {
			for g := n; g < groups; g *= n {
				backup(g)
			}
		}
	default:
		for g := int64(1); g < min(groups, 64); g++ {
			backup(g)
		}
	}
	if b[0xfd] != 1 { // no copy of the journal's inode
		return
	}
	// s_jnl_blocks: an extent tree, or the blocks themselves.
	jnl := b[0x10c:]
	at := int64(le.Uint32(jnl))
	if le.Uint16(jnl) == 0xf30a {
		if le.Uint16(jnl[6:]) != 0 || le.Uint16(jnl[2:]) == 0 { // not a leaf with an extent
			return
		}
		at = int64(le.Uint16(jnl[12+6:]))<<32 | int64(le.Uint32(jnl[12+8:]))
	}
	if at > 0 && at < blocks {
		s.add(e, "ext journal head", at*blockSize, 1024)
	}
}

// extRunning are the fields of the superblock that ext4 changes while it is mounted,
// from byte to byte: s_last_orphan, s_kbytes_written, and s_checksum of them all. What
// else is written with them, as when the filesystem is frozen, has s_wtime changed.
var extRunning = [][2]int{{0xe8, 0xec}, {0x178, 0x180}, {0x3fc, 0x400}}

// xfs: struct xfs_dsb in fs/xfs/libxfs/xfs_format.h. A mount for writing stamps the
// superblock at its end at the latest; before that its log goes on.
func (s *scan) xfs(e extent) {
	const maxGroups = 64
	b := s.read(e, 0, 512)
	if b == nil || string(b[:4]) != "XFSB" {
		return
	}
	blockSize, groupBlocks, groups := int64(be.Uint32(b[4:])), int64(be.Uint32(b[84:])), int64(be.Uint32(b[88:]))
	sectorSize, groupLog := int64(be.Uint16(b[102:])), b[124]
	s.add(e, "xfs superblock", 0, max(sectorSize, 512))
	if s.running {
		return
	}
	if blockSize < 512 || blockSize > 64<<10 || sectorSize < 512 || sectorSize > 32<<10 || groupLog > 32 || groupBlocks == 0 {
		return
	}
	step := (groups-1)/maxGroups + 1
	for g := int64(0); g < groups; g += step {
		s.add(e, fmt.Sprintf("xfs headers of allocation group %d", g), g*groupBlocks*blockSize, 4*sectorSize)
	}
	start := be.Uint64(b[48:])
	if start == 0 { // the log is on another device
		return
	}
	at := int64(start>>groupLog)*groupBlocks + int64(start&(1<<groupLog-1))
	if at < 0 || at > e.size/blockSize {
		return
	}
	s.xfsLog(e.part("", at*blockSize, int64(be.Uint32(b[96:]))*blockSize))
}

// xfsLog adds the place in the log where the next entry goes. Every block of the log
// begins with the number of the cycle that wrote it: where that falls is the head
// (xlog_find_head in fs/xfs/xfs_log_recover.c).
func (s *scan) xfsLog(log extent) {
	const around = 128 << 10
	cycle := func(block int64) uint32 {
		b := s.read(log, block*512, 512)
		if b == nil {
			return 0
		}
		if c := be.Uint32(b); c != 0xfeedbabe { // XLOG_HEADER_MAGIC_NUM
			return c
		}
		return be.Uint32(b[4:])
	}
	first := cycle(0)
	low, high := int64(0), log.size/512 // low: of the first cycle, high: not
	for high-low > 1 {
		if mid := (low + high) / 2; cycle(mid) == first {
			low = mid
		} else {
			high = mid
		}
	}
	from := max(0, high*512-around)
	s.add(log, "xfs log head", from, 2*around)
	s.add(log, "xfs log start", 0, around)
}

// btrfs: every commit writes all superblocks.
func (s *scan) btrfs(e extent) {
	b := s.read(e, 64<<10, 4096)
	if b == nil || string(b[0x40:0x48]) != "_BHRfS_M" {
		return
	}
	for n, at := range []int64{64 << 10, 64 << 20, 256 << 30} {
		if at+4096 <= e.size {
			s.add(e, fmt.Sprintf("btrfs superblock %d", n), at, 4096)
		}
	}
}

// f2fs: struct f2fs_super_block in include/linux/f2fs_fs.h. A mount for writing
// makes a checkpoint in one of two places.
func (s *scan) f2fs(e extent) {
	b := s.read(e, 1024, 1024)
	if b == nil || le.Uint32(b) != 0xf2f52010 {
		return
	}
	s.add(e, "f2fs superblock 0", 1024, 3072)
	s.add(e, "f2fs superblock 1", 4096+1024, 3072)
	blockLog, segmentLog, at := le.Uint32(b[16:]), le.Uint32(b[20:]), int64(le.Uint32(b[76:]))
	if blockLog < 12 || blockLog > 16 || segmentLog > 16 {
		return
	}
	s.add(e, "f2fs checkpoint 0", at<<blockLog, 1<<blockLog)
	s.add(e, "f2fs checkpoint 1", (at+(1<<segmentLog))<<blockLog, 1<<blockLog)
}

// swap: mkswap and swaplabel write its header.
func (s *scan) swap(e extent) {
	for _, page := range []int64{4 << 10, 16 << 10, 64 << 10} {
		if b := s.read(e, page-10, 10); bytes.Equal(b, []byte("SWAPSPACE2")) || bytes.Equal(b, []byte("SWAP-SPACE")) {
			s.add(e, "swap header", 0, page)
		}
	}
}
