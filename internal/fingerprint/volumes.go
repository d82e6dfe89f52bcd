package fingerprint

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

const (
	// head is the edge of what has no table of its own around it. Every superblock
	// lies in it.
	head = 128 << 10
	// encryptedHead is how much is looked at of what is encrypted: the superblock of
	// a filesystem, or the metadata of a volume group and the head of its first
	// volume.
	encryptedHead = 8 * mib
)

func (s *scan) headSize() int64 {
	if s.running {
		return runningHead
	}
	return head
}

// partitions adds a partition table and what the partitions hold.
func (s *scan) partitions(e extent, depth int) {
	b := s.read(e, 0, 512)
	if b == nil || b[510] != 0x55 || b[511] != 0xaa {
		return
	}
	s.add(e, "MBR", 0, 512)
	for _, block := range []int64{s.block, 512, 4096} {
		if s.gpt(e, block, depth) {
			return
		}
	}
	s.mbr(e, b, depth)
}

func (s *scan) gpt(e extent, block int64, depth int) bool {
	const maxEntries = 512
	header := func(name string, lba int64) []byte {
		if lba <= 0 || lba >= e.size/block {
			return nil
		}
		b := s.read(e, lba*block, 512)
		if b == nil || string(b[:8]) != "EFI PART" {
			return nil
		}
		count, size := int64(le.Uint32(b[80:])), int64(le.Uint32(b[84:]))
		if size < 128 || size > 4096 || size%8 != 0 {
			return nil
		}
		s.add(e, name, lba*block, 512)
		from := int64(le.Uint64(b[72:]))
		if from <= 0 || from >= e.size/block {
			return nil
		}
		length := min(count, maxEntries) * size
		s.add(e, name+" entries", from*block, length)
		return s.read(e, from*block, length)
	}
	b := s.read(e, block, 512)
	entries := header("GPT", 1)
	if b != nil {
		header("backup GPT", int64(le.Uint64(b[32:])))
	}
	if entries == nil {
		return false
	}
	size := int(le.Uint32(b[84:]))
	for n := 0; (n+1)*size <= len(entries); n++ {
		p := entries[n*size:]
		first, last := int64(le.Uint64(p[32:])), int64(le.Uint64(p[40:]))
		if bytes.Equal(p[:16], make([]byte, 16)) || first <= 0 || last < first || last >= e.size/block {
			continue
		}
		s.content(e.part(fmt.Sprintf("partition %d: ", n+1), first*block, (last-first+1)*block), mib, depth+1)
	}
	return true
}

func (s *scan) mbr(e extent, table []byte, depth int) {
	type entry struct {
		kind        byte
		start, size int64
	}
	read := func(b []byte, n int) entry {
		p := b[446+16*n:]
		return entry{p[4], int64(le.Uint32(p[8:])) * s.block, int64(le.Uint32(p[12:])) * s.block}
	}
	// The boot sectors of some filesystems end as a table does.
	for n := range 4 {
		if p := read(table, n); table[446+16*n]&^0x80 != 0 || p.kind != 0 && p.start+p.size > e.size {
			return
		}
	}
	extended := func(kind byte) bool { return kind == 0x05 || kind == 0x0f || kind == 0x85 }
	for n := range 4 {
		p := read(table, n)
		if p.kind == 0 || p.start == 0 || p.size == 0 || p.start >= e.size {
			continue
		}
		if !extended(p.kind) {
			s.content(e.part(fmt.Sprintf("partition %d: ", n+1), p.start, p.size), mib, depth+1)
			continue
		}
		// A chain of tables, each with a partition and the next table.
		at := p.start
		for logical := 5; logical < 133; logical++ {
			b := s.read(e, at, 512)
			if b == nil || b[510] != 0x55 || b[511] != 0xaa {
				break
			}
			s.add(e, fmt.Sprintf("table of partition %d", logical), at, 512)
			if q := read(b, 0); q.kind != 0 && q.size > 0 {
				s.content(e.part(fmt.Sprintf("partition %d: ", logical), at+q.start, q.size), mib, depth+1)
			}
			next := read(b, 1)
			if !extended(next.kind) || next.start <= 0 || p.start+next.start <= at {
				break
			}
			at = p.start + next.start
		}
	}
}

// md: struct mdp_superblock_1 and mdp_superblock_s in include/uapi/linux/raid/md_p.h.
// An array that is started for writing counts that in its superblock.
func (s *scan) md(e extent, depth int) {
	const magic = 0xa92b4efc
	old := e.size&^(64<<10-1) - 64<<10
	if b := s.read(e, old, 4096); b != nil && (le.Uint32(b) == magic || be.Uint32(b) == magic) {
		s.add(e, "md superblock", old, 4096)
	}
	for _, at := range []int64{0, 4096, (e.size/512 - 16) &^ 7 * 512} {
		b := s.read(e, at, 512)
		if b == nil || le.Uint32(b) != magic || le.Uint32(b[4:]) != 1 {
			continue
		}
		s.add(e, "md superblock", at, 4096)
		const linear, mirror = -1, 1
		data, size := le.Uint64(b[128:]), le.Uint64(b[136:])
		if data > uint64(e.size/512) || size > uint64(e.size/512) {
			continue
		}
		if data == 0 && at == 0 {
			continue
		}
		in := e.part("md: ", int64(data)*512, int64(size)*512)
		if level := int32(le.Uint32(b[72:])); (level == linear || level == mirror) && data > 0 {
			s.content(in, head, depth+1)
		} else if data > 0 {
			s.add(in, "head", 0, s.headSize())
		}
	}
}

// luks: a mount of what is encrypted changes its superblocks, which cannot be read,
// but compared.
func (s *scan) luks(e extent) {
	b := s.read(e, 0, 512)
	if b == nil || string(b[:6]) != "LUKS\xba\xbe" {
		return
	}
	data := int64(0)
	switch be.Uint16(b[6:]) {
	case 1:
		s.add(e, "LUKS header", 0, 4096)
		data = int64(be.Uint32(b[104:])) * 512
	case 2:
		size := be.Uint64(b[8:])
		if size < 16<<10 || size > 4*mib {
			return
		}
		s.add(e, "LUKS header", 0, int64(size))
		s.add(e, "second LUKS header", int64(size), int64(size))
		var meta struct {
			Segments map[string]struct {
				Offset string `json:"offset"`
			} `json:"segments"`
		}
		text, _, _ := bytes.Cut(s.read(e, 4096, int64(size)-4096), []byte{0})
		if json.Unmarshal(text, &meta) != nil {
			return
		}
		data, _ = strconv.ParseInt(meta.Segments["0"].Offset, 10, 64)
	}
	switch {
	case data > 0 && s.running:
		// The superblocks of most filesystems, of btrfs, and of what is on the first
		// volume of a volume group.
		for _, at := range []int64{0, 64 << 10, mib} {
			s.add(e, fmt.Sprintf("encrypted data at %d KiB", at>>10), data+at, runningHead)
		}
	case data > 0:
		s.add(e, "head of the encrypted data", data, encryptedHead)
	}
}

// lvm: the label, the metadata, and what the volumes hold that lie here. The
// formats are those of lib/format_text of LVM2.
func (s *scan) lvm(e extent, depth int) {
	const (
		maxText     = 4 * mib
		maxSegments = 512
	)
	for sector := int64(0); sector < 4; sector++ {
		b := s.read(e, sector*512, 512)
		if b == nil || string(b[:8]) != "LABELONE" || string(b[24:32]) != "LVM2 001" {
			continue
		}
		s.add(e, "LVM label", sector*512, 512)
		at := le.Uint32(b[20:])
		if at > 512-40 {
			return
		}
		uuid := string(b[at : at+32])
		// Two lists of areas, each ended by one of nothing: of data, and of metadata.
		var text string
		list := 0
		for p := b[at+40:]; len(p) >= 16 && list < 2; p = p[16:] {
			offset, size := le.Uint64(p), le.Uint64(p[8:])
			switch {
			case offset == 0:
				list++
			case list == 1 && offset < uint64(e.size):
				area := e.part("", int64(offset), int64(min(size, uint64(e.size))))
				s.add(area, "head of LVM metadata", 0, 4096)
				text = s.lvmText(area, maxText)
			}
		}
		for n, seg := range lvmSegments(text, uuid) {
			if n == maxSegments {
				s.err = ErrTooMany
				return
			}
			if !seg.linear {
				s.add(e, fmt.Sprintf("volume %s: head", seg.volume), seg.offset, s.headSize())
				continue
			}
			s.content(e.part("volume "+seg.volume+": ", seg.offset, seg.size), head, depth+1)
		}
		return
	}
}

// lvmText is the text that a metadata area holds now.
func (s *scan) lvmText(area extent, limit int64) string {
	h := s.read(area, 0, 512)
	if h == nil || string(h[4:20]) != " LVM2 x[5A%r0N*>" {
		return ""
	}
	offset, size := int64(le.Uint64(h[40:])), int64(le.Uint64(h[48:]))
	if offset < 512 || offset >= area.size || size <= 0 || size > min(limit, area.size-512) {
		return ""
	}
	// It is a ring behind the header.
	first := min(size, area.size-offset)
	text := s.read(area, offset, first)
	if first < size {
		text = append(text, s.read(area, 512, size-first)...)
	}
	return string(text)
}

// lvmSegment is a piece of a volume on one disk.
type lvmSegment struct {
	volume       string
	offset, size int64 // bytes
	linear       bool
}

var (
	lvmPV     = regexp.MustCompile(`(\w+) \{\s*id = "([\w-]+)"[^{}]*?pe_start = (\d+)`)
	lvmExtent = regexp.MustCompile(`(?m)^\s*extent_size = (\d+)`)
	lvmStripe = regexp.MustCompile(`^"(\w+)", (\d+)`)
)

// lvmSegments are the segments of volumes on the disk with the given UUID.
func lvmSegments(text, uuid string) []lvmSegment {
	m := lvmExtent.FindStringSubmatch(text)
	if m == nil {
		return nil
	}
	extentSize, _ := strconv.ParseInt(m[1], 10, 32)
	pv, start := "", int64(0)
	for _, m := range lvmPV.FindAllStringSubmatch(text, -1) {
		if strings.ReplaceAll(m[2], "-", "") == uuid {
			pv = m[1]
			start, _ = strconv.ParseInt(m[3], 10, 40)
		}
	}
	_, volumes, ok := strings.Cut(text, "logical_volumes {")
	if pv == "" || !ok || extentSize <= 0 {
		return nil
	}
	var out []lvmSegment
	volume, count, stripes := "", int64(0), 0
	for _, line := range strings.Split(volumes, "\n") {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutSuffix(line, " {"); ok && !strings.HasPrefix(name, "segment") {
			volume = name
		} else if n, ok := strings.CutPrefix(line, "extent_count = "); ok {
			n, _, _ = strings.Cut(n, "\t")
			count, _ = strconv.ParseInt(n, 10, 40)
		} else if n, ok := strings.CutPrefix(line, "stripe_count = "); ok {
			n, _, _ = strings.Cut(n, "\t")
			stripes, _ = strconv.Atoi(n)
		} else if m := lvmStripe.FindStringSubmatch(line); m != nil && m[1] == pv {
			at, err := strconv.ParseInt(m[2], 10, 40)
			if err != nil || at > 1<<50/extentSize || count > 1<<50/extentSize {
				continue
			}
			out = append(out, lvmSegment{volume, (start + at*extentSize) * 512, count * extentSize * 512, stripes == 1})
		}
	}
	return out
}
