// Command powercut is what a machine does between two power failures: run.sh boots it again and again on disks that
// stay, and kills it when it says so. It proves that the change map goes on: that what it says after a power failure is
// never less than the truth, is no more than the truth outside of the zones that its log had, and restores a backup.
//
//	boot ─> nothing left on the storage ─> add: history goes on ─> map as it was, but for the log's zones
//	     ─> replay, what was synced is there, fsck ─> take ─> increment since the last backup's token: the backup is the
//	     image ─> load ─> cut
//
// What differs from boot to boot is the filesystem, the number of queues (one, or up to four if there are as many
// processors), whether takes freeze the filesystem, and which disks lose what they were not told to flush.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

const (
	original = "/dev/disk/by-vm/data"
	backup   = "/dev/disk/by-vm/backup"
	filter   = "/dev/ublk-blksnap/data"
	kept     = "/var/lib/ublk-blksnap" // the daemon's state directory
	storage  = "/srv/storage"
	mounted  = "/srv/data"

	// settle is more than the daemon takes to look at the superblock again that a mount has changed.
	settle = 5 * time.Second
)

type machine struct {
	*control.Client
	variant
	rnd     *rand.Rand
	program string
	caches  string       // which disks have caches that are lost
	last    bool         // the power does not fail any more
	working sync.RWMutex // read-held for each piece of the load's work
	taking  sync.Mutex   // held for each take of the load
}

// variant is what differs from boot to boot. Eight boots have all of it.
type variant struct {
	fs      string // under the load
	queues  int
	frozen  bool // takes freeze the filesystem
	mayLose bool // the power may fail within seconds of a freeze: that may cost the history
}

func variantOf(boot int) variant {
	return variant{
		fs:      []string{"ext4", "xfs"}[(boot+1)/2%2],
		queues:  min([]int{1, 4}[boot%2], runtime.NumCPU()),
		frozen:  (boot%2 == 1) != (boot/4%2 == 1),
		mayLose: (boot%2 == 1) != (boot/4%2 == 1) && boot/8%2 == 1,
	}
}

// cut asks for the power failure after a time.
func (m *machine) cut(after time.Duration) {
	time.Sleep(after)
	fmt.Printf("the power fails now, after %v: %s, %d queues, takes freeze: %v, may lose: %v, write caches: %s\n",
		after, readNote("fs"), m.queues, m.frozen, m.mayLose, m.caches)
	select {}
}

func main() {
	boot := flag.Int("boot", 0, "how many power failures there were")
	cuts := flag.Int("cuts", 1, "how many there will be")
	seed := flag.Int64("seed", 1, "of what is chosen")
	caches := flag.String("caches", "", "which disks lose their write caches, for the output")
	flag.Parse()
	dir, err := os.Getwd()
	if err != nil {
		fail("%v", err)
	}
	m := &machine{
		Client: control.NewClient(control.DefaultSocket), variant: variantOf(*boot), rnd: rand.New(rand.NewSource(*seed*1000 + int64(*boot))),
		program: dir + "/bin/ublk-blksnap", caches: *caches, last: *boot == *cuts,
	}
	m.disks(*boot == 0)
	if *boot == 0 {
		m.begin()
	} else {
		m.goesOn()
	}
	if *boot == *cuts {
		m.end()
		return
	}
	m.load(context.Background())
}

func fail(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "powercut: "+format+"\n", args...)
	if out, err := exec.Command("tail", "-n", "40", "/run/ublk-blksnap/daemon.log").Output(); err == nil {
		os.Stderr.Write(out)
	}
	os.Exit(1)
}

// run runs a command that must not fail.
func run(name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		fail("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// must is for what the daemon must not refuse.
func must[T any](v T, err error) T {
	if err != nil {
		fail("%v", err)
	}
	return v
}

func try(err error) {
	if err != nil {
		fail("%v", err)
	}
}

// disks mounts what the machine has beside the original.
func (m *machine) disks(fresh bool) {
	for _, dir := range []string{kept, notes, storage, mounted} {
		try(os.MkdirAll(dir, 0o700))
	}
	for name, dir := range map[string]string{"state": kept, "notes": notes, "storage": storage} {
		if fresh {
			run("mkfs.ext4", "-q", "-F", "/dev/disk/by-vm/"+name)
		}
		run("mount", "/dev/disk/by-vm/"+name, dir)
		try(os.Chmod(dir, 0o700))
	}
	if fresh {
		note("free", fmt.Sprint(free()))
		return
	}
	// The snapshots that were held are gone, with all that they had stored. At most there is a
	// file that was being made when the power failed: nothing is stored there yet.
	for _, name := range left() {
		info := must(os.Stat(storage + "/" + name))
		if blocks := info.Sys().(*syscall.Stat_t).Blocks; info.Size() > 0 || blocks > 0 {
			fail("the power failure has left %s on the storage, with %d bytes in %d blocks", name, info.Size(), blocks)
		}
		fmt.Printf("# the power failed while %s was made\n", name)
	}
	if was, is := readNote("free"), fmt.Sprint(free()); was != is {
		fail("the storage had %s free blocks, and has %s after the power failure", was, is)
	}
}

// left is what is on the storage.
func left() (names []string) {
	for _, e := range must(os.ReadDir(storage)) {
		if e.Name() != "lost+found" {
			names = append(names, e.Name())
		}
	}
	return names
}

// clears waits until the daemon has cleared what the power failure has left.
func clears() {
	for range 60 {
		if len(left()) == 0 {
			return
		}
		time.Sleep(time.Second)
	}
	fail("the daemon leaves %v on the storage", left())
}

func free() uint64 {
	var st unix.Statfs_t
	try(unix.Statfs(storage, &st))
	return st.Bfree
}

// begin is the first boot: a filter, a filesystem on it, and a full backup.
func (m *machine) begin() {
	m.add()
	m.makeFilesystem()
	run("umount", mounted)
	m.backUp(m.take())
	m.mount()
}

func (m *machine) add() (said string) {
	return run(m.program, "add", original, "--name", "data", "--queues", fmt.Sprint(m.queues))
}

// makeFilesystem makes the filesystem of this boot, and mounts it.
func (m *machine) makeFilesystem() {
	// Without a discard, which would count as a change of all of the disk.
	mkfs := []string{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", filter}
	if m.fs == "xfs" {
		mkfs = []string{"mkfs.xfs", "--unsupported", "-q", "-f", "-K", filter} // of so few MiB
	}
	run(mkfs[0], mkfs[1:]...)
	note("fs", m.fs)
	m.mount()
	m.prepare()
}

func (m *machine) mount() { run("mount", "-t", readNote("fs"), "-o", "discard", filter, mounted) }

// backUp is a full backup, of a snapshot that it destroys.
func (m *machine) backUp(s control.Snapshot) {
	copyAll(s.Images[0].Path)
	m.noteTake(s)
	note("backup", s.Images[0].Take.String())
	try(m.destroy(context.Background(), s.ID))
}

// goesOn is any other boot.
func (m *machine) goesOn() {
	ctx := context.Background()
	k := readKept()
	said := m.add()
	clears()
	i := must(m.CBTInfo(ctx, "data"))
	lost := !i.History.Continued
	switch {
	case !lost:
		fmt.Printf("# %s\n", i.History.Text)
		m.compareMaps(i, k)
	case readNote("lose") == "true" && i.History.Reason == control.HistoryWritten && strings.Contains(i.History.Text, "superblock"):
		fmt.Printf("# the power failed within seconds of a freeze, and the history is lost: %s\n", i.History.Text)
	default:
		fail("the history does not go on: %s: %s; add said: %s", i.History.Reason, i.History.Text, said)
	}
	if left := must(m.Snapshots(ctx)); len(left) != 0 {
		fail("a snapshot is there after the power failure: %+v", left)
	}
	note("lose", "false")
	if m.rnd.Intn(4) == 0 && !m.last && !lost {
		// Again, while the map is still all that the log made of it.
		m.cut(time.Duration(m.rnd.Intn(300)) * time.Millisecond)
	}
	m.mount() // replays the journal
	compareNumbers()
	run("umount", mounted)
	if readNote("fs") == "xfs" {
		run("xfs_repair", "-n", filter)
	} else {
		run("fsck.ext4", "-f", "-n", filter)
	}
	s := m.take()
	if lost {
		m.backUp(s)
	} else {
		m.restores(i, s)
	}
	if readNote("fs") != m.fs && !m.last {
		m.makeFilesystem()
	} else {
		m.mount()
	}
}

// restores makes sure that the increment of the first take after a power failure restores the disk.
func (m *machine) restores(i control.CBTInfo, s control.Snapshot) {
	if t := s.Images[0].Take; t.Generation.String() != i.GenerationID || t.Number != uint64(i.ChangesNumber)+1 {
		fail("the take after the power failure is %v, after %v", t, i.Take)
	}
	bytes := m.increment(s)
	if at := firstDifference(s.Images[0].Path, backup); at >= 0 {
		fail("the increment does not restore the disk: it differs at byte %d", at)
	}
	fmt.Printf("# the increment of %d KiB of %d restores the disk\n", bytes>>10, i.DeviceCapacity>>10)
	m.noteTake(s)
	try(m.destroy(context.Background(), s.ID))
}

// end ends it all as it should.
func (m *machine) end() {
	run("umount", mounted)
	run(m.program, "daemon", "stop")
	for _, dir := range []string{kept, notes, storage} {
		run("umount", dir)
	}
}
