package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// notes are what a boot tells the next one: each is durable when note returns, and is there whole.
const notes = kept + "/notes"

func note(name, text string) {
	try(os.MkdirAll(notes, 0o700))
	path := filepath.Join(notes, name)
	f := must(os.Create(path + ".new"))
	must(f.WriteString(text))
	try(f.Sync())
	try(f.Close())
	try(os.Rename(path+".new", path))
	for _, dir := range []string{notes, kept} {
		d := must(os.Open(dir))
		try(d.Sync())
		d.Close()
	}
}

func readNote(name string) string { return string(must(os.ReadFile(filepath.Join(notes, name)))) }

// noteTake notes what the map says after a take.
func (m *machine) noteTake(s control.Snapshot) {
	var b bytes.Buffer
	must(m.CBTMap(context.Background(), "data", &b))
	note("take", s.Images[0].Take.String()+"\n"+b.String())
}

// compareMaps compares the map after a power failure with that of the last take that was noted.
func (m *machine) compareMaps(i control.CBTInfo) {
	token, before, _ := strings.Cut(readNote("take"), "\n")
	last := must(control.ParseTake(token))
	if i.Take.Generation != last.Generation || i.Take.Number != last.Number && i.Take.Number != last.Number+1 {
		fail("the last take that was noted is %v, and after the power failure it is %v", last, i.Take)
	}
	var now bytes.Buffer
	must(m.CBTMap(context.Background(), "data", &now))
	if now.Len() != len(before) {
		fail("the map had %d blocks, and has %d", len(before), now.Len())
	}
	perZone := int(i.PowerFailure.ZoneSize / i.BlockSize)
	if perZone < 1 {
		fail("cbt info says nothing of zones: %+v", i.PowerFailure)
	}
	var more, zones int
	for at := 0; at < now.Len(); at += perZone {
		was, is := before[at:min(at+perZone, now.Len())], now.Bytes()[at:min(at+perZone, now.Len())]
		least, grown := byte(255), false
		for _, b := range is {
			least = min(least, b)
		}
		for n := range is {
			switch {
			case is[n] < was[n]:
				fail("block %d changed since take %d, and after the power failure since take %d", at+n, was[n], is[n])
			case is[n] == was[n]:
			case uint64(is[n]) > last.Number: // by the take that nobody noted
			case uint64(is[n]) == last.Number && least < is[n]: // written after the take, and the new base has it
				more++
				grown = true
			case marked(int64(at+n) * i.BlockSize): // since the take was noted
			case least < is[n]:
				fail("block %d counts as changed since take %d, after the power failure since take %d, and not all of its zone does", at+n, was[n], is[n])
			default:
				more++
				grown = true
			}
		}
		if grown {
			zones++
		}
	}
	all := (now.Len()-1)/perZone + 1
	if zones > all/2 {
		fail("%d of %d zones count as changed: the load does not write to so many", zones, all)
	}
	fmt.Printf("# take %d, then %d: %d blocks in %d of %d zones count as changed since later than they were\n", last.Number, i.Take.Number, more, zones, all)
}

// The last quarter of the disk is where images are written to and blocks are marked: that changes the readable map.
func marked(offset int64) bool { return offset >= diskSize*3/4 }

const diskSize = 192 << 20

// copyAll is a full backup.
func copyAll(image string) {
	from, to := openDirect(image, unix.O_RDONLY), openDirect(backup, unix.O_WRONLY)
	defer from.Close()
	defer to.Close()
	copyRange(from, to, 0, diskSize)
	try(to.Sync())
}

// increment brings the backup up to the image of a snapshot, by what changed since the last backup.
func (m *machine) increment(s control.Snapshot) (total int64) {
	since := must(control.ParseTake(readNote("backup")))
	from, to := openDirect(s.Images[0].Path, unix.O_RDONLY), openDirect(backup, unix.O_WRONLY)
	defer from.Close()
	defer to.Close()
	must(m.CBTChanges(context.Background(), control.ChangesRequest{Device: "data", Since: since}, func(r control.Range) error {
		copyRange(from, to, int64(r.Sector)*512, int64(r.Count)*512)
		total += int64(r.Count) * 512
		return nil
	}))
	try(to.Sync())
	note("backup", s.Images[0].Take.String())
	return total
}

func openDirect(path string, flags int) *os.File {
	return must(os.OpenFile(path, flags|unix.O_DIRECT, 0))
}

func copyRange(from, to *os.File, at, n int64) {
	buf := page(1 << 20)
	defer func() { _ = unix.Munmap(buf) }()
	for end := at + n; at < end; {
		part := buf[:min(end-at, int64(len(buf)))]
		must(from.ReadAt(part, at))
		must(to.WriteAt(part, at))
		at += int64(len(part))
	}
}

func page(n int) []byte {
	return must(unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE))
}

// firstDifference is the first byte in which two disks differ, or -1.
func firstDifference(a, b string) int64 {
	fa, fb := openDirect(a, unix.O_RDONLY), openDirect(b, unix.O_RDONLY)
	defer fa.Close()
	defer fb.Close()
	pa, pb := page(1<<20), page(1<<20)
	defer func() { _, _ = unix.Munmap(pa), unix.Munmap(pb) }()
	for at := int64(0); at < diskSize; at += int64(len(pa)) {
		must(fa.ReadAt(pa, at))
		must(fb.ReadAt(pb, at))
		if !bytes.Equal(pa, pb) {
			for n := range pa {
				if pa[n] != pb[n] {
					return at + int64(n)
				}
			}
		}
	}
	return -1
}

func (m *machine) take() control.Snapshot {
	return must(m.CreateSnapshot(context.Background(), control.CreateRequest{
		Devices: []string{"data"}, Storage: []control.Storage{{Path: storage}}, Take: true, NoFreeze: true,
	}))
}
