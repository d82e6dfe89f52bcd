package main

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
)

// keptLog is what the state directory holds of the disk after a power failure, read as the doc of package intentlog
// says, and not by that package: a base, which is an older change map, and the zones that were written to since.
type keptLog struct {
	epoch     uint64
	number    byte // of the last take
	blockSize int64
	zone      int64  // bytes
	marks     []byte // of the base
	entries   []uint64
}

func readKept() *keptLog {
	const sector, perSector = 512, 60
	record := only("*.running")
	_, text, _ := strings.Cut(string(must(os.ReadFile(record))), "\n")
	var r struct {
		ID string `json:"id"`
	}
	try(json.Unmarshal([]byte(text), &r))
	trunk := strings.TrimSuffix(record, "running") + r.ID
	base, log := must(os.ReadFile(trunk+".base")), must(os.ReadFile(trunk+".log"))
	number := func(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }

	k := &keptLog{epoch: number(base, 8), number: byte(number(base, 32)), blockSize: int64(number(base, 48)), zone: 1 << number(log, 16), marks: base[sector:]}
	if string(base[16:32]) == string(log[24:40]) { // one generation
		k.number = max(k.number, byte(number(log, 40)))
	}
	for z := range (diskSize-1)/k.zone + 1 {
		k.entries = append(k.entries, number(log, sector*int(1+z/perSector)+8*int(z%perSector)))
	}
	return k
}

func only(pattern string) string {
	all := must(filepath.Glob(filepath.Join(kept, pattern)))
	if len(all) != 1 {
		fail("%d files %s in the state directory", len(all), pattern)
	}
	return all[0]
}

// logged says whether the log has the zone of a block, and since which take that counts as changed.
func (k *keptLog) logged(block int) (mark byte, is bool) {
	switch entry := k.entries[int64(block)*k.blockSize/k.zone]; {
	case entry>>8 < k.epoch:
		return 0, false
	case entry>>8 == k.epoch:
		return byte(entry), true
	}
	return k.number + 1, true
}

// shows is what the map has to show of a block after the power failure, no less and no more.
func (k *keptLog) shows(block int) byte {
	mark, _ := k.logged(block)
	return min(max(k.marks[block], mark), k.number)
}
