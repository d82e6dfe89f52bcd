package snapshots

import (
	"encoding/binary"
	"hash/crc32"
	"sync/atomic"
	"unsafe"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
)

// TakePage is the record of a take: a mapped file, made before the take, in which
// one store says that the snapshot was taken.
//
//	 0 magic                          8 number of devices
//	16 CRC-32C of the numbers before  24 CRC-32C of the numbers of the take
//	32 TAKEN, or 0                    40 TOLD, or 0
//	48 for each device, 48 bytes: what its change map said before the take
//	   for each device, 48 bytes: what its change map says of the take
//
// All numbers are 64 bits wide, in little endian; what is stored at once is stored
// in the machine's order. A change map's 48 bytes are device size, block size, block
// count, generation (16 bytes), number.
//
//	made, before is complete ──> the take's numbers ──> TAKEN ──> TOLD
//
// TOLD means: the owner has put on record, where it outlives the daemon, that the
// snapshot is broken.
type TakePage struct{ mem []byte }

// NewTakePage is the page in mem, of TakeSize bytes.
func NewTakePage(mem []byte) TakePage { return TakePage{mem} }

const (
	takeMagic = 0x3145474150454b54 // "TKEPAGE1"
	takeTaken = 0x4e454b4154534157 // "WASTAKEN"
	takeTold  = 0x444c4f5453415757 // "WWASTOLD"

	takeCount   = 8
	takeSum     = 16
	takeSum2    = 24
	takeState   = 32
	takeToldAt  = 40
	takeHead    = 48
	takeMapSize = 48

	takeName = "take"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// TakeSize is that of the page of a snapshot with so many devices.
func TakeSize(devices int) int64 { return takeHead + 2*takeMapSize*int64(devices) }

func (p TakePage) word(off int) *uint64 { return (*uint64)(unsafe.Pointer(&p.mem[off])) }

// part is the numbers before the take (0) or of it (1).
func (p TakePage) part(i, devices int) []byte {
	n := takeMapSize * devices
	return p.mem[takeHead+i*n : takeHead+(i+1)*n]
}

// sum covers the number of devices too.
func (p TakePage) sum(i, devices int) uint64 {
	return uint64(crc32.Update(crc32.Checksum(p.mem[:takeSum], castagnoli), castagnoli, p.part(i, devices)))
}

func putInfo(b []byte, i cbtmap.Info) {
	binary.LittleEndian.PutUint64(b, uint64(i.DeviceCapacity))
	binary.LittleEndian.PutUint64(b[8:], uint64(i.BlockSize))
	binary.LittleEndian.PutUint64(b[16:], uint64(i.BlockCount))
	copy(b[24:40], i.GenerationID[:])
	binary.LittleEndian.PutUint64(b[40:], uint64(i.ChangesNumber))
}

func getInfo(b []byte) (i cbtmap.Info) {
	i.DeviceCapacity = int64(binary.LittleEndian.Uint64(b))
	i.BlockSize = int64(binary.LittleEndian.Uint64(b[8:]))
	i.BlockCount = int64(binary.LittleEndian.Uint64(b[16:]))
	copy(i.GenerationID[:], b[24:40])
	i.ChangesNumber = uint8(binary.LittleEndian.Uint64(b[40:]))
	return i
}

// Format makes the page of a take that has not happened.
func (p TakePage) Format(before []cbtmap.Info) {
	binary.LittleEndian.PutUint64(p.mem, takeMagic)
	binary.LittleEndian.PutUint64(p.mem[takeCount:], uint64(len(before)))
	for i, info := range before {
		putInfo(p.part(0, len(before))[i*takeMapSize:], info)
	}
	binary.LittleEndian.PutUint64(p.mem[takeSum:], p.sum(0, len(before)))
}

// Taken puts on record that the take was made. It neither blocks nor allocates.
func (p TakePage) Taken(devices int, take func(i int) cbtmap.Info) {
	of := p.part(1, devices)
	for i := range devices {
		putInfo(of[i*takeMapSize:], take(i))
	}
	binary.LittleEndian.PutUint64(p.mem[takeSum2:], p.sum(1, devices))
	atomic.StoreUint64(p.word(takeState), takeTaken)
}

// SetBreakReported puts on record that the owner knows of the break.
func (p TakePage) SetBreakReported() { atomic.StoreUint64(p.word(takeToldAt), takeTold) }

// BreakReported says whether the owner knows of the break.
func (p TakePage) BreakReported() bool { return atomic.LoadUint64(p.word(takeToldAt)) == takeTold }

// read returns the numbers of a page, or in words what is wrong with it.
func (p TakePage) read(devices int) (before, take []cbtmap.Info, wrong string) {
	if int64(len(p.mem)) != TakeSize(devices) {
		return nil, nil, "its size is wrong"
	}
	if binary.LittleEndian.Uint64(p.mem) != takeMagic || binary.LittleEndian.Uint64(p.mem[takeCount:]) != uint64(devices) ||
		binary.LittleEndian.Uint64(p.mem[takeSum:]) != p.sum(0, devices) {
		return nil, nil, "its heading or checksum is wrong"
	}
	infos := func(part int) (out []cbtmap.Info) {
		for i := range devices {
			out = append(out, getInfo(p.part(part, devices)[i*takeMapSize:]))
		}
		return out
	}
	before = infos(0)
	switch atomic.LoadUint64(p.word(takeState)) {
	case 0:
		return before, nil, ""
	case takeTaken:
	default:
		return nil, nil, "it says neither that the take was made nor that it was not"
	}
	if told := atomic.LoadUint64(p.word(takeToldAt)); told != 0 && told != takeTold ||
		binary.LittleEndian.Uint64(p.mem[takeSum2:]) != p.sum(1, devices) {
		return nil, nil, "the checksum of the take is wrong"
	}
	return before, infos(1), ""
}
