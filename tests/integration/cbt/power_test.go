package cbt

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// failing is a disk whose machine can lose its power, as far as one machine can play that:
// the state directory becomes what it was at that instant, with another boot on record, and
// the disk is plugged in anew. tests/powercut does it to whole machines.
type failing struct {
	*plugged
	d     *program.Daemon
	state string
	saved map[string][]byte
	boot  string // that is on record
}

func newFailing(t *testing.T, size int64, params ...string) *failing {
	t.Helper()
	p := &failing{plugged: plug(t, size), state: filepath.Join(t.TempDir(), "state")}
	p.d = program.Start(t, append(params, "state_dir="+p.state)...)
	return p
}

// fails is the power failure, of a filter that is not in use.
func (p *failing) fails(dev control.Device) {
	p.t.Helper()
	p.saved = p.files()
	p.boot = uuid.NewString()
	p.rewrite(bootID(p.t), p.boot)
	if err := p.d.RemoveDevice(guest.Context(p.t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
		p.t.Fatal(err)
	}
	p.again()
	p.restore()
}

func bootID(t *testing.T) string {
	t.Helper()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(boot))
}

// named is the file with that suffix.
func (p *failing) named(suffix string) string {
	p.t.Helper()
	for n := range p.saved {
		if strings.HasSuffix(n, suffix) {
			return n
		}
	}
	p.t.Fatalf("no %s among %d files", suffix, len(p.saved))
	return ""
}

func (p *failing) files() map[string][]byte {
	p.t.Helper()
	names, err := filepath.Glob(p.state + "/*.*") // of this disk
	if err != nil {
		p.t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			p.t.Fatal(err)
		}
		out[n] = b
	}
	return out
}

// restore brings back what was in the state directory when the power failed.
func (p *failing) restore() {
	p.t.Helper()
	for n := range p.files() {
		if err := os.Remove(n); err != nil {
			p.t.Fatal(err)
		}
	}
	for n, b := range p.saved {
		if err := os.WriteFile(n, b, 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
}

// in plugs the disk in where no disk was before, because the kernel goes on counting the
// writes to a loop device that gets another file.
func (p *failing) in() {
	p.t.Helper()
	loops++
	p.disk = fmt.Sprintf("/dev/loop%d", loops)
	guest.Run(p.t, "losetup", p.disk, p.file)
}

var loops = 100

func (p *failing) again() { p.t.Helper(); p.out(); p.in() }

// rewrite changes the record, which stays whole.
func (p *failing) rewrite(old, fresh string) {
	p.t.Helper()
	name := p.named(".running")
	line, body, ok := strings.Cut(string(p.saved[name]), "\n")
	if !ok || !strings.Contains(body, old) {
		p.t.Fatalf("%s has no %q: %s", name, old, body)
	}
	body = strings.Replace(body, old, fresh, 1)
	sum := sha256.Sum256([]byte("1\n" + body))
	words := strings.Fields(line)
	words[len(words)-1] = hex.EncodeToString(sum[:])
	p.saved[name] = []byte(strings.Join(words, " ") + "\n" + body)
}

func (p *failing) add(change ...func(*control.AddRequest)) control.Device {
	p.t.Helper()
	return p.d.Add(p.disk, append(change, named("data"))...)
}

// awaitCovered waits until a power failure would, or would not, cost the history.
func awaitCovered(t *testing.T, d *program.Daemon, dev control.Device, want bool, text string) control.PowerFailure {
	t.Helper()
	var f control.PowerFailure
	guest.WaitFor(t, "the write-intent log", func() bool {
		f = d.CBT(dev).PowerFailure
		return f.Covered == want && strings.Contains(f.Reason, text)
	})
	return f
}

func wantCovered(t *testing.T, d *program.Daemon, dev control.Device, zones, logged int64) {
	t.Helper()
	f := d.CBT(dev).PowerFailure
	if !f.Covered || f.ZoneCount != zones || f.Logged != logged {
		t.Errorf("%+v, want %d zones of which the log has %d", f, zones, logged)
	}
}

// TestPowerFailure: after a power failure the zones that were written since the last base
// count as changed, and nothing else does that did not.
func TestPowerFailure(t *testing.T) {
	p := newFailing(t, 40<<20)
	dev := p.add()
	blocks := p.d.CBT(dev).BlockSize
	perZone := int64(1<<20) / blocks
	zone := func(n int64) (all []int64) {
		for b := n * perZone; b < (n+1)*perZone; b++ {
			all = append(all, b)
		}
		return all
	}
	wantCovered(t, p.d, dev, 40, 0)
	s := p.d.Take(0, dev)
	since := *s.Images[0].Take
	writeBlock(t, dev.Path, 1*blocks)
	writeBlock(t, dev.Path, 3<<20)
	p.d.Destroy(s.ID)
	s = p.d.Take(0, dev)
	second := *s.Images[0].Take
	// The base after the take has the two blocks. What comes now the log alone has.
	guest.WaitFor(t, "a new base", func() bool { return p.d.CBT(dev).PowerFailure.Logged == 0 })
	time.Sleep(time.Second) // it is being written
	writeBlock(t, dev.Path, 10<<20+5*blocks)
	writeBlock(t, s.Images[0].Path, 20<<20)
	if err := p.d.MarkDirty(guest.Context(t), control.MarkRequest{Device: dev.Name, Ranges: []control.Range{{Sector: 30 << 11, Count: 1}}}); err != nil {
		t.Fatal(err)
	}
	wantCovered(t, p.d, dev, 40, 3)
	p.d.Destroy(s.ID)
	p.fails(dev)

	dev = p.add()
	wants(t, "after a power failure", dev, "", "goes on after a power failure")
	if take := p.d.CBT(dev).Take; take != second {
		t.Errorf("the last take is %v, and was %v", take, second)
	}
	lost := slices.Concat(zone(10), zone(20), zone(30))
	s = p.d.Take(0, dev)
	if got, err := p.d.Changed(dev, second); err != nil || !slices.Equal(got, lost) {
		t.Errorf("changed since the last take %v, want %v: %v", got, lost, err)
	}
	if got, err := p.d.Changed(dev, since); err != nil || !slices.Equal(got, slices.Concat([]int64{1, 3 * perZone}, lost)) {
		t.Errorf("changed since the take before %v: %v", got, err)
	}
	p.d.Destroy(s.ID)
	// And again, with nothing written.
	p.fails(dev)
	dev = p.add()
	wants(t, "after another power failure", dev, "", "goes on after a power failure")
	p.d.Remove(dev)
	dev = p.add()
	if wants(t, "after a clean end", dev, "", "goes on from"); dev.History.AfterPowerFailure {
		t.Errorf("after a clean end: %+v", dev.History)
	}
}

// TestPowerFailureDoubts: whatever is not as it was is not believed.
func TestPowerFailureDoubts(t *testing.T) {
	p := newFailing(t, guest.Ext4.Minimum)
	dev := p.add()
	guest.Ext4.Make(t, dev.Path)
	dir := guest.Mount(t, dev.Path)
	guest.Unmount(t, dir)
	p.d.Destroy(p.d.Take(0, dev).ID)
	// The superblock that the mount has left is on record.
	time.Sleep(5 * time.Second)
	p.fails(dev)
	whole := p.saved
	disk, err := os.ReadFile(p.file)
	if err != nil {
		t.Fatal(err)
	}
	tries, turn := 0, shortTurn(t)
	try := func(what, reason, text string, spoil func()) {
		t.Helper()
		if tries++; !guest.Long() && tries > 1 && tries%2 != turn {
			return
		}
		p.out()
		if err := os.WriteFile(p.file, disk, 0o600); err != nil {
			t.Fatal(err)
		}
		p.in()
		p.saved = map[string][]byte{}
		for n, b := range whole {
			p.saved[n] = bytes.Clone(b)
		}
		spoil()
		p.restore()
		dev := p.add()
		wants(t, what, dev, reason, text)
		if !dev.History.AfterPowerFailure {
			t.Errorf("%s: nobody is told that the last filter had no clean end: %+v", what, dev.History)
		}
		if err := p.d.RemoveDevice(guest.Context(t), control.RemoveRequest{Device: dev.Name, Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	onDisk := func(offset int64) func() {
		return func() { p.out(); flip(t, p.file, offset); p.in() }
	}
	inFile := func(suffix string, at int) func() {
		return func() { p.saved[p.named(suffix)][at] ^= 1 }
	}
	try("untouched", "", "goes on after a power failure", func() {})
	try("log: header", control.HistoryDamaged, "damaged", inFile(".log", 30))
	try("log: entry", control.HistoryDamaged, "damaged", inFile(".log", 512+8))
	try("log: the last sector", control.HistoryDamaged, "damaged", inFile(".log", 4096-5))
	try("base: head", control.HistoryDamaged, "damaged", inFile(".base", 9))
	try("base: marks", control.HistoryDamaged, "damaged", inFile(".base", 512+7))
	try("record", control.HistoryDamaged, "checksum", inFile(".running", 200))
	try("log cut off", control.HistoryDamaged, "damaged", func() { n := p.named(".log"); p.saved[n] = p.saved[n][:1024] })
	try("no log", control.HistoryDamaged, "no such file", func() { delete(p.saved, p.named(".log")) })
	try("no base", control.HistoryDamaged, "no such file", func() { delete(p.saved, p.named(".base")) })
	try("another base", control.HistoryDamaged, "another base", func() {
		// Whole, but of another log.
		b := p.saved[p.named(".base")]
		copy(b[480:], make([]byte, 16))
		binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], crc32.MakeTable(crc32.Castagnoli)))
	})
	try("a record of the future", control.HistoryVersion, "version", func() {
		n := p.named(".running")
		p.saved[n] = bytes.Replace(p.saved[n], []byte("state 1 "), []byte("state 2 "), 1)
	})
	try("mounted past the filter", control.HistoryWritten, "ext superblock", func() {
		dir := guest.Mount(t, p.disk)
		guest.Unmount(t, dir)
		p.again()
	})
	try("one sector of the superblock", control.HistoryWritten, "ext superblock", onDisk(1024+0x78))
	try("written in this boot", control.HistoryWritten, "the kernel has counted", func() { writeBlock(t, p.disk, 8<<20) })
	try("the same boot", control.HistoryUnclean, "not been started anew", func() {
		p.rewrite(p.boot, bootID(t))
	})
}

// TestIntentLogOff: what is said of a device without a log, and what its end costs.
func TestIntentLogOff(t *testing.T) {
	guest.NeedEither(t)
	p := newFailing(t, 16<<20)
	off := false
	dev := p.add(func(r *control.AddRequest) { r.IntentLog = &off })
	awaitCovered(t, p.d, dev, false, "intent_log is off")
	if kept := p.files(); len(kept) != 0 {
		t.Errorf("kept without a log: %v", kept)
	}
}

// TestIntentLogFails: whatever happens to the state directory, the disk's I/O goes on, and it
// is said that a power failure would cost the history.
func TestIntentLogFails(t *testing.T) {
	guest.NeedEither(t)
	t.Run("errors", func(t *testing.T) { intentLogFails(t, "errors") })
	t.Run("hung", func(t *testing.T) { intentLogFails(t, "hung") })
}

func intentLogFails(t *testing.T, how string) {
	below := guest.LoopDisk(t, 64<<20, 512)
	linear := guest.LinearTable(t, below)
	state := guest.DMDisk(t, "state", linear)
	guest.Run(t, "mkfs.ext4", "-q", "-F", state)
	dir := guest.Mount(t, state)
	p := plug(t, 40<<20)
	d := program.Start(t, "disk_timeout=8s", "state_dir="+filepath.Join(dir, "state"))
	events := make(chan control.Event, 100)
	watching, stop := context.WithCancel(context.Background())
	defer stop()
	go d.Watch(watching, control.WatchRequest{}, func(e control.Event) error { events <- e; return nil })
	dev := d.Add(p.disk, named("data"))
	awaitCovered(t, d, dev, true, "") // a machine that is busy may take longer than disk_timeout allows
	for len(events) > 0 {
		<-events
	}
	if how == "hung" {
		guest.Run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "state")
		t.Cleanup(func() { _, _ = guest.Try("dmsetup", "resume", "state") })
	} else {
		guest.ReloadDM(t, "state", strings.Replace(linear, "linear", "error", 1))
	}
	began := time.Now()
	for n := range int64(40) {
		writeBlock(t, dev.Path, n<<20)
	}
	t.Logf("forty zones were written in %v", time.Since(began))
	awaitCovered(t, d, dev, false, "")
	if e := guest.Await(t, "the event", events); e.Kind != control.EventUncovered || e.Device != dev.OriginalNumber || e.Text == "" {
		t.Errorf("event %+v", e)
	}
	// A take is answered too.
	d.Destroy(d.Take(0, dev).ID)
	if how == "errors" {
		d.Remove(dev)
		guest.Unmount(t, dir)
		guest.ReloadDM(t, "state", linear)
		return
	}
	guest.Run(t, "dmsetup", "resume", "state")
	awaitCovered(t, d, dev, true, "")
	guest.WaitFor(t, "the event of its end", func() bool { return guest.Await(t, "an event", events).Kind == control.EventCovered })
	d.Remove(dev)
}

// TestIntentLogNoSpace: there is no log while the state directory is full, and there is one
// as soon as it is not.
func TestIntentLogNoSpace(t *testing.T) {
	guest.NeedEither(t)
	dir := guest.SmallFS(t, 16<<20)
	fill := filepath.Join(dir, "fill")
	full := func() {
		f, err := os.Create(fill)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for n := 1 << 20; n >= 1; n /= 2 {
			for {
				if _, err := f.Write(make([]byte, n)); err != nil {
					break
				}
			}
		}
	}
	full()
	p := plug(t, 40<<20)
	d := program.Start(t, "state_dir="+filepath.Join(dir, "state"))
	dev := d.Add(p.disk, named("data"))
	awaitCovered(t, d, dev, false, "no space")
	writeBlock(t, dev.Path, 0)
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	awaitCovered(t, d, dev, true, "")
	// Full again: what is there already needs no more space.
	full()
	for n := range int64(40) {
		writeBlock(t, dev.Path, n<<20)
	}
	s := d.Take(0, dev)
	writeBlock(t, dev.Path, 0)
	d.Destroy(s.ID)
	awaitCovered(t, d, dev, true, "")
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	d.Remove(dev)
}

// TestIntentLogTakenOver: the log outlives its daemon.
func TestIntentLogTakenOver(t *testing.T) {
	p := newFailing(t, 40<<20)
	dev := p.add()
	s := p.d.Take(0, dev)
	since := *s.Images[0].Take
	writing := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(writing)
		f, err := direct.Open(dev.Path, unix.O_RDWR)
		if err != nil {
			return
		}
		defer f.Close()
		page := direct.Pages(t, 4096)
		for n := int64(0); ; n++ {
			select {
			case <-stop:
				return
			default:
				_ = f.WriteAt(page, n*7%20<<20)
			}
		}
	}()
	p.d.Kill()
	p.d.Restart()
	awaitCovered(t, p.d, dev, true, "")
	close(stop)
	<-writing
	writeBlock(t, dev.Path, 35<<20)
	p.d.Destroy(s.ID)
	want, err := p.d.Changed(dev, since)
	if err != nil {
		t.Fatal(err)
	}
	p.fails(dev)
	dev = p.add()
	wants(t, "after death and power failure", dev, "", "goes on after a power failure")
	s = p.d.Take(0, dev)
	got, err := p.d.Changed(dev, since)
	for _, b := range append(want, 35<<20/p.d.CBT(dev).BlockSize) {
		if !slices.Contains(got, b) {
			t.Errorf("block %d is not known to have changed: %v", b, err)
		}
	}
	p.d.Destroy(s.ID)
}

// TestIntentLogMoved: if the next daemon has another state_dir, nothing is believed any
// more of what the one before kept.
func TestIntentLogMoved(t *testing.T) {
	guest.NeedEither(t)
	p := newFailing(t, 40<<20)
	dev := p.add()
	awaitCovered(t, p.d, dev, true, "")
	running := func(dir string) int {
		t.Helper()
		found, err := filepath.Glob(dir + "/*.running")
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	if n := running(p.state); n != 1 {
		t.Fatalf("%d running records", n)
	}
	p.d.Kill()
	other := filepath.Join(t.TempDir(), "other")
	p.d.With("--state-dir", other)
	p.d.Restart()
	awaitCovered(t, p.d, dev, true, "")
	if old, now := running(p.state), running(other); old != 0 || now != 1 {
		t.Errorf("%d running records where they were, %d where they are", old, now)
	}
}
