package daemon

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/cbtstate"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// The results of a check.
const (
	OK      = "ok"
	Note    = "note"    // not there, not needed
	Missing = "missing" // needed
)

// Check is one thing that was looked at.
type Check struct {
	Name   string `json:"name"`
	Result string `json:"result"` // ok, note or missing
	Text   string `json:"text"`
	Fix    string `json:"fix,omitempty"`
}

// neededFeatures are the UBLK_F flags that the daemon cannot work without.
var neededFeatures = map[string]bool{"CMD_IOCTL_ENCODE": true}

// wantedFeatures are the flags that make something better, and what is missing
// without them.
var wantedFeatures = map[string]string{
	"USER_RECOVERY":         "devices cannot outlive their daemon: none can be added",
	"USER_RECOVERY_REISSUE": "devices cannot outlive their daemon: none can be added",
	"AUTO_BUF_REG":          "payloads are copied: mode zerocopy does not work",
	"SUPPORT_ZERO_COPY":     "payloads are copied: mode zerocopy does not work",
	"SAFE_STOP_DEV":         "remove looks for users of a device itself",
	"NO_AUTO_PART_SCAN":     "the kernel does not read the partition tables of filters and images: it is told of changes by partprobe, or partx -d and partx -a",
	"QUIESCE":               "a daemon can be replaced only after its end",
	"UPDATE_SIZE":           "a grown disk has to be removed and added again",
}

// Examine looks at everything that a daemon of this configuration needs of this
// machine.
func Examine(c Config) []Check {
	var out []Check
	add := func(name, result, text, fix string) { out = append(out, Check{name, result, text, fix}) }

	if release := ublk.KernelRelease(); ublk.OlderThan(release, ublk.MinKernel) {
		add("kernel", Missing, release+" is older than "+ublk.MinKernel, "boot Linux "+ublk.MinKernel+" or newer")
	} else {
		add("kernel", OK, release, "")
	}
	if os.Geteuid() == 0 {
		add("root", OK, "root", "")
	} else {
		add("root", Missing, "not root", "run this as root")
	}
	out = append(out, examineRing())
	out = append(out, examineUblk()...)
	out = append(out, examineMemory()...)
	switch runs, rules := udev(host(0)); {
	case runs && rules:
		add("udev", OK, "runs, with our rules", "")
	case runs:
		add("udev", Note, "runs without our rules: fstab cannot name a filter, and nothing keeps other programs away from images", "install the package, or make install")
	default:
		add("udev", Note, "does not run: no by-uuid links, and nothing keeps other programs away from images", "")
	}
	if host(0).CanProbe() {
		add("blkid", OK, "installed", "")
	} else {
		add("blkid", Note, "not installed: a block device is storage only with --overwrite", "install util-linux")
	}
	if host(0).ReadsMounts() {
		add("mounts", OK, "the mounts of all processes can be read", "")
	} else {
		add("mounts", Note, "the mounts of process 1 cannot be read: messages may not name the user of a disk", "mount /proc without hidepid")
	}
	out = append(out, examineState(c.StateDir))
	out = append(out, examineAttached(host(0))...)
	return append(out, examineLost(c)...)
}

// examineAttached looks at the volumes that a filter was attached to, by whatever daemon.
func examineAttached(h *disk.Host) (out []Check) {
	const name, fix = "attached volume", "the daemon attaches it anew, or removes what is left of it: start it if none runs"
	for _, a := range h.Attached() {
		switch {
		case a.Public == nil:
			out = append(out, Check{name, Note, "the private device " + a.Private.DMName + " is left of one that is gone", fix})
		case a.Suspended:
			out = append(out, Check{name, Note, a.Public.DMName + " is suspended: whoever uses it waits", "if nobody is changing its table: dmsetup resume " + a.Public.DMName})
		case a.Filter == nil:
			out = append(out, Check{name, Note, a.Public.DMName + ": its requests come to no filter: another program may have given it another table", fix})
		default:
			out = append(out, Check{name, OK, a.Public.DMName + ": its requests come to the filter " + a.Filter.Node, ""})
		}
	}
	return out
}

// examineRing makes a ring, as every queue does.
func examineRing() Check {
	q, err := blockdev.NewRingQueue(blockdev.RingConfig{Name: "doctor", Depth: 4})
	if err == nil {
		q.Stop()
		return Check{"io_uring", OK, "allowed", ""}
	}
	// The message says what to do.
	return Check{"io_uring", Missing, err.Error(), ""}
}

func examineUblk() []Check {
	probes, err := ublk.ProbeFeatures()
	if err != nil {
		// The message says what to do.
		return []Check{{Name: "ublk_drv", Result: Missing, Text: err.Error()}}
	}
	out := []Check{{Name: "ublk_drv", Result: OK, Text: "loaded"}}
	for _, p := range probes {
		c := Check{Name: p.Name, Result: OK, Text: p.Means}
		consequence, wanted := wantedFeatures[p.Name]
		switch {
		case p.Answer == ublk.Yes:
		case neededFeatures[p.Name]:
			c.Result, c.Fix = Missing, "boot Linux "+p.Since+" or newer"
		default:
			c.Result, c.Text = Note, fmt.Sprintf("%s: not there (Linux %s has it)", p.Means, p.Since)
			if p.Answer == ublk.Unknown {
				c.Text = fmt.Sprintf("%s: could not tell: %v", p.Means, p.Err)
			}
			if wanted {
				c.Text += ": " + consequence
			}
		}
		out = append(out, c)
	}
	return out
}

// enoughMemory is what a daemon with a few devices and one snapshot takes.
const enoughMemory = 256 << 20

func examineMemory() []Check {
	var out []Check
	var r unix.Rlimit
	switch err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r); {
	case err != nil:
		out = append(out, Check{"locked memory", Note, err.Error(), ""})
	case os.Geteuid() == 0 || r.Cur == unix.RLIM_INFINITY || r.Cur >= enoughMemory:
		// root may lock what it likes.
		out = append(out, Check{"locked memory", OK, "may be locked", ""})
	default:
		out = append(out, Check{"locked memory", Note, "at most " + control.FormatSize(int64(r.Cur)), "raise it: ulimit -l unlimited"})
	}
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil {
		return append(out, Check{"memory", Note, err.Error(), ""})
	}
	free := availableMemory()
	text := fmt.Sprintf("%d MiB available of %d MiB", free>>20, int64(s.Totalram)*int64(s.Unit)>>20)
	if free < enoughMemory {
		return append(out, Check{"memory", Note, text, "give the daemon at least " + control.HumanSize(enoughMemory)})
	}
	return append(out, Check{"memory", OK, text, ""})
}

func availableMemory() int64 {
	b, _ := os.ReadFile("/proc/meminfo")
	for _, line := range strings.Split(string(b), "\n") {
		var kib int64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}

// examineState looks at the directory in which change maps are kept.
func examineState(dir string) Check {
	const consequence = ": after a restart of the machine the next backup copies everything"
	d := &Daemon{host: host(0), opts: Options{Config: Config{StateDir: dir}}}
	if dir == "" {
		return Check{"state directory", Note, "none is configured" + consequence, ""}
	}
	if point := d.missingMount(dir); point != "" {
		return Check{"state directory", Note, dir + " is not there, because " + point + " is not mounted" + consequence, "choose another state_dir, which is there before the filters"}
	}
	store, err := cbtstate.Open(d.host.Root, dir, false)
	var no *cbtstate.Refusal
	switch {
	case err == nil:
		store.Close()
		return Check{"state directory", OK, dir, ""}
	case errors.As(err, &no) && no.Reason == cbtstate.NoState:
		return Check{"state directory", OK, dir + " will be made", ""}
	}
	return Check{"state directory", Note, err.Error() + consequence, "make it root's alone, or choose another state_dir"}
}
