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

// notes are what a boot tells the next one: each is durable when note returns, and is there whole. They have a disk of
// their own, so that no other disk is flushed for them.
const notes = "/srv/notes"

func note(name, text string) {
	path := filepath.Join(notes, name)
	f := must(os.Create(path + ".new"))
	must(f.WriteString(text))
	try(f.Sync())
	try(f.Close())
	try(os.Rename(path+".new", path))
	d := must(os.Open(notes))
	defer d.Close()
	try(d.Sync())
}

func readNote(name string) string { return string(must(os.ReadFile(filepath.Join(notes, name)))) }

// noteTake notes what the map says after a take.
func (m *machine) noteTake(s control.Snapshot) {
	var b bytes.Buffer
	must(m.CBTMap(context.Background(), "data", &b))
	note("take", s.Images[0].Take.String()+"\n"+b.String())
}

// compareMaps compares the map after a power failure with what was kept, and with that of the last take that was noted.
func (m *machine) compareMaps(i control.CBTInfo, k *keptLog) {
	token, before, _ := strings.Cut(readNote("take"), "\n")
	last := must(control.ParseTake(token))
	if i.Take.Generation != last.Generation || i.Take.Number != last.Number && i.Take.Number != last.Number+1 {
		fail("the last take that was noted is %v, and after the power failure it is %v", last, i.Take)
	}
	var b bytes.Buffer
	must(m.CBTMap(context.Background(), "data", &b))
	now := b.Bytes()
	if len(now) != len(before) || len(now) != len(k.marks) || i.Take.Number != uint64(k.number) || i.PowerFailure.ZoneSize != k.zone {
		fail("%d blocks were noted, %d kept, and there are %d; take %d was kept; %+v", len(before), len(k.marks), len(now), k.number, i)
	}
	logged, more, zones := 0, 0, map[int64]bool{}
	for n := range now {
		_, inLog := k.logged(n)
		since := k.marks[n] // not cut down to the last take
		switch {
		case now[n] < before[n]:
			fail("block %d changed since take %d, and after the power failure since take %d", n, before[n], now[n])
		case now[n] != k.shows(n):
			fail("block %d changed since take %d after the power failure, and by base and log since %d (in the log: %v)", n, now[n], k.shows(n), inLog)
		case inLog:
			logged++
			zones[int64(n)*k.blockSize/k.zone] = true
			if now[n] > before[n] {
				more++
			}
		case uint64(since) <= last.Number && since != before[n] && !marked(int64(n)*k.blockSize):
			fail("block %d lies in no zone of the log, changed since take %d, and after the power failure since take %d", n, before[n], since)
		}
	}
	if all := (len(now)-1)*int(k.blockSize)/int(k.zone) + 1; len(zones) > all*3/4 {
		fail("the log has %d of %d zones: the load does not write to so many", len(zones), all)
	}
	m.compareMark(last, now, k.blockSize)
	fmt.Printf("# take %d, then %d: of %d blocks %d lie in the %d zones of the log, and %d of these count as changed since later than they were\n",
		last.Number, i.Take.Number, len(now), logged, len(zones), more)
}

// noteMark notes that a mark was acknowledged, after take t.
func noteMark(t control.Take, r control.Range) { note("mark", fmt.Sprintf("%v %d", t, r.Sector)) }

// compareMark: what somebody has marked is still marked.
func (m *machine) compareMark(last control.Take, now []byte, blockSize int64) {
	text, err := os.ReadFile(filepath.Join(notes, "mark"))
	if err != nil {
		return // nobody has marked yet
	}
	var token string
	var at int64
	must(fmt.Sscan(string(text), &token, &at))
	since := must(control.ParseTake(token))
	if n := at * 512 / blockSize; since.Generation == last.Generation && uint64(now[n]) < since.Number {
		fail("block %d was marked after take %d, and after the power failure changed since take %d", n, since.Number, now[n])
	}
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
		Devices: []string{"data"}, Storage: []control.Storage{{Path: storage}}, Take: true, NoFreeze: !m.frozen,
	}))
}
