package sim

import (
	"fmt"
	"strconv"
	"strings"
)

// Verb is what a step of a workload does.
type Verb uint8

// The verbs. Off and Len are in sectors, of device or image Dev; Dev, Snap and
// Queue are taken modulo what there is.
const (
	Read Verb = iota
	Write
	Discard
	WriteZeroes
	Flush

	ImageRead // of snapshot Snap's image of device Dev
	ImageWrite
	ImageDiscard
	ImageWriteZeroes
	ImageFlush

	Create  // snapshot Snap of the devices in the bits of Arg
	Add     // device Dev to snapshot Snap
	Append  // storage to snapshot Snap
	Take    // snapshot Snap
	Cancel  // the take of snapshot Snap that is under way
	Destroy // snapshot Snap
	Mark    // blocks of device Dev dirty by hand
	Replace // device Dev is removed and added again, larger by Arg sectors

	Stick   // the file number Arg stops answering
	Unstick // all files answer again
	Slow    // the file number Arg becomes slow by Len
	Pause   // the thread of queue number Arg stands still for a while
	Fill    // storage cannot grow any more until Room
	Room
	Truncate // the storage file number Arg, at Off
	Kill     // the process

	Checkpoint // a new base for the write-intent log of device Dev
	verbs
)

var verbNames = [verbs]string{
	"read", "write", "discard", "zeroes", "flush",
	"iread", "iwrite", "idiscard", "izeroes", "iflush",
	"create", "add", "append", "take", "cancel", "destroy", "mark", "replace",
	"stick", "unstick", "slow", "pause", "fill", "room", "truncate", "kill",
	"checkpoint",
}

func (v Verb) String() string {
	if v < verbs {
		return verbNames[v]
	}
	return "verb" + strconv.Itoa(int(v))
}

// Step is one step of a workload.
type Step struct {
	Verb  Verb
	FUA   bool
	Dev   uint8
	Snap  uint8
	Queue uint8
	Off   uint32 // sectors
	Len   uint32 // sectors
	Arg   uint32
	// Gap is how long the client waits before the step: up to 2^Gap of the
	// scheduler's time. 255: until everything before has completed.
	Gap uint8
}

// settled is the Gap that waits for everything before.
const settled = 255

// String is the step as seeds/ has it.
func (s Step) String() string {
	var b strings.Builder
	b.WriteString(s.Verb.String())
	for _, f := range []struct {
		name string
		v    uint64
	}{
		{"dev", uint64(s.Dev)}, {"snap", uint64(s.Snap)}, {"queue", uint64(s.Queue)},
		{"off", uint64(s.Off)}, {"len", uint64(s.Len)}, {"arg", uint64(s.Arg)}, {"gap", uint64(s.Gap)},
	} {
		if f.v != 0 {
			fmt.Fprintf(&b, " %s=%d", f.name, f.v)
		}
	}
	if s.FUA {
		b.WriteString(" fua=1")
	}
	return b.String()
}

// parseStep reads what String wrote.
func parseStep(line string) (s Step, err error) {
	fields := strings.Fields(line)
	if len(fields) == 0 {
		return s, fmt.Errorf("empty step")
	}
	s.Verb = verbs
	for v, name := range verbNames {
		if name == fields[0] {
			s.Verb = Verb(v)
		}
	}
	if s.Verb == verbs {
		return s, fmt.Errorf("step %q: unknown verb", line)
	}
	for _, f := range fields[1:] {
		name, value, _ := strings.Cut(f, "=")
		v, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return s, fmt.Errorf("step %q: %w", line, err)
		}
		switch name {
		case "dev":
			s.Dev = uint8(v)
		case "snap":
			s.Snap = uint8(v)
		case "queue":
			s.Queue = uint8(v)
		case "off":
			s.Off = uint32(v)
		case "len":
			s.Len = uint32(v)
		case "arg":
			s.Arg = uint32(v)
		case "gap":
			s.Gap = uint8(v)
		case "fua":
			s.FUA = v != 0
		default:
			return s, fmt.Errorf("step %q: unknown field %s", line, name)
		}
	}
	return s, nil
}
