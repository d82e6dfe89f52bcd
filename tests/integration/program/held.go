package program

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// Held is what a process and the driver hold.
type Held struct{ FDs, Threads, Mappings, Devices, Loops int }

// Held is what the daemon holds now, and what the driver and the loop driver do.
func (d *Daemon) Held() Held {
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", d.PID))
	loops, _ := filepath.Glob("/sys/block/loop*/loop")
	return Held{
		FDs:      guest.Entries(fmt.Sprintf("/proc/%d/fd", d.PID)),
		Threads:  guest.Entries(fmt.Sprintf("/proc/%d/task", d.PID)),
		Mappings: bytes.Count(maps, []byte("\n")),
		Devices:  len(guest.UblkDevices()),
		Loops:    len(loops),
	}
}

// Settled waits until the daemon holds no more than before. The Go runtime keeps
// threads once it has needed them, and mappings for them: slack many.
func (d *Daemon) Settled(before Held, slack int) {
	d.t.Helper()
	var now Held
	for end := time.Now().Add(guest.Patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		now = d.Held()
		if now.FDs <= before.FDs && now.Devices <= before.Devices && now.Loops <= before.Loops &&
			now.Threads <= before.Threads+slack && now.Mappings <= before.Mappings+4*slack+4 {
			return
		}
	}
	d.t.Errorf("left behind: now %+v, before %+v", now, before)
}

// LeakTest makes the daemons of a test keep hardly any garbage, so that what
// grows is what is held.
func LeakTest(t *testing.T) { t.Setenv("GOGC", "10") }

// Memory is the daemon's resident memory in bytes.
func (d *Daemon) Memory() int64 {
	d.t.Helper()
	// Counted page by page: what status says may be off by pages for each
	// processor.
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", d.PID))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	d.t.Fatal("no Rss")
	return 0
}
