package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// Target is a stretch of a device and what it is mapped by.
type Target struct {
	Start, Length uint64 // in sectors
	Type          string // linear, crypt, thin, …
	Args          []byte // as the type wants them
}

// Table is the targets of a device, in order and without a gap.
type Table []Target

// Linear is the table of a device that is another one, all of it.
func Linear(size int64, to blockdev.Num) Table {
	return Table{{Length: uint64(size / sector.Size), Type: "linear", Args: fmt.Appendf(nil, "%s 0", to)}}
}

// Size is how large a device with this table is, in bytes.
func (t Table) Size() (size int64) {
	for _, x := range t {
		size += int64(x.Length) * sector.Size
	}
	return size
}

// Is says whether both tables are the same.
func (t Table) Is(other Table) bool {
	if len(t) != len(other) {
		return false
	}
	for i, a := range t {
		b := other[i]
		if a.Start != b.Start || a.Length != b.Length || a.Type != b.Type || string(a.Args) != string(b.Args) {
			return false
		}
	}
	return true
}

// Wipe overwrites what may be secret.
func (t Table) Wipe() {
	for _, x := range t {
		clear(x.Args)
	}
}

// specSize is that of what precedes a target's parameters.
const specSize = int(unsafe.Sizeof(uapi.DMTargetSpec{}))

// encode is the table as DM_TABLE_LOAD takes it: each target begins at a multiple of 8.
func (t Table) encode() ([]byte, error) {
	size := 0
	for _, x := range t {
		size += align(specSize + len(x.Args) + 1)
	}
	out := make([]byte, size)
	at := 0
	for _, x := range t {
		if len(x.Type) >= uapi.DM_MAX_TYPE_NAME {
			return nil, fmt.Errorf("a target of type %q", x.Type)
		}
		next := align(specSize + len(x.Args) + 1)
		spec := out[at:]
		binary.NativeEndian.PutUint64(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.SectorStart):], x.Start)
		binary.NativeEndian.PutUint64(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.Length):], x.Length)
		binary.NativeEndian.PutUint32(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.Next):], uint32(next))
		copy(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.TargetType):], x.Type)
		copy(spec[specSize:], x.Args)
		at += next
	}
	return out, nil
}

// decode reads what DM_TABLE_STATUS gives. The table has memory of its own.
func decode(data []byte, n uint32) (Table, error) {
	var t Table
	at := 0
	for range n {
		if at+specSize > len(data) {
			t.Wipe()
			return nil, errors.New("the kernel's table is cut off")
		}
		spec := data[at:]
		args, _, _ := bytes.Cut(spec[specSize:], []byte{0})
		t = append(t, Target{
			Start:  binary.NativeEndian.Uint64(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.SectorStart):]),
			Length: binary.NativeEndian.Uint64(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.Length):]),
			Type:   text(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.TargetType):specSize]),
			Args:   bytes.Clone(args),
		})
		at = int(binary.NativeEndian.Uint32(spec[unsafe.Offsetof(uapi.DMTargetSpec{}.Next):]))
	}
	return t, nil
}

func align(n int) int { return (n + 7) &^ 7 }
