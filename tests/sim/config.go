package sim

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev/blockdevtest"
)

// maxDevices is how many original disks a world has at most.
const maxDevices = 3

// Config is the world that a workload runs in.
type Config struct {
	Devices  int
	Size0    int // sectors of each original disk
	Size1    int
	Size2    int
	Queues   int // of each filter device
	IQueues  int // of each image device
	Depth    int // requests of a queue at a time
	MaxIO    int // sectors of a request
	Block    int // log2 of the change tracking block, bytes
	Discards int // blockdev.DiscardEffect of the originals
	Sector   int // sectors in a logical block of the disks, 1 or 8
	NoMemory int // the so many-th wish for a chunk table is refused; 0: none
	Earlier  int // takes of each original before the run, in its change map

	Slots    int // snapshots at a time
	Storages int // to be appended to each
	Fixed    int // bits: which storages are block devices
	Limit    int // sectors of each storage
	Portion  int // sectors by which storage grows
	Encrypt  int // bits: which snapshots encrypt what they store

	// One fault: see blockdevtest.Fault. FaultOn is 0 for none, 1 for anything but
	// the originals, 2 for the originals, 3 for anything.
	FaultOn     int
	FaultKinds  int // bits by blockdev.Kind, 0: any
	FaultAfter  int
	FaultCount  int
	FaultErr    int
	FaultEffect int

	// Deaths of the process: after so many steps of the scheduler since it
	// started, and at the so many-th place to die since then. 0: none.
	KillStep  int
	KillPoint int
	// Kills is how many times that happens.
	Kills int
	// KillAgain: so many steps after it started, the process that follows the first dies
	// too. 0: not for that.
	KillAgain int

	// Zone is log2 of a zone of the write-intent logs, bytes; 0: there are none, and a
	// power failure ends every history.
	Zone int

	// Records: each step of the daemon's records is one of the scheduler's, so that the
	// process can die between any two. 0: they all happen at once.
	Records int

	// PowerStep is the scheduler's step at which the power fails; 0: never.
	PowerStep int
}

func (c *Config) size(dev int) int64 {
	return int64([]int{c.Size0, c.Size1, c.Size2}[dev]) * sectorSize
}

// String is the configuration as seeds/ has it.
func (c Config) String() string {
	var b strings.Builder
	b.WriteString("config")
	v := reflect.ValueOf(c)
	for i := 0; i < v.NumField(); i++ {
		if n := v.Field(i).Int(); n != 0 {
			fmt.Fprintf(&b, " %s=%d", v.Type().Field(i).Name, n)
		}
	}
	return b.String()
}

func parseConfig(line string) (c Config, err error) {
	v := reflect.ValueOf(&c).Elem()
	for _, f := range strings.Fields(line)[1:] {
		name, value, _ := strings.Cut(f, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return c, fmt.Errorf("config: %w", err)
		}
		field := v.FieldByName(name)
		if !field.IsValid() {
			return c, fmt.Errorf("config: no field %s", name)
		}
		field.SetInt(n)
	}
	return c, nil
}

// Case is a whole run: a world, what happens in it, and the order of things.
type Case struct {
	Config
	Order uint64 // the scheduler's seed
	Steps []Step
}

// String is the case as seeds/ has it.
func (c Case) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v\norder %d\n", c.Config, c.Order)
	for _, s := range c.Steps {
		fmt.Fprintln(&b, s)
	}
	return b.String()
}

// ParseCase reads what String wrote; empty lines and those beginning with # do
// not count.
func ParseCase(text string) (c Case, err error) {
	for _, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case strings.HasPrefix(line, "config"):
			if c.Config, err = parseConfig(line); err != nil {
				return c, err
			}
		case strings.HasPrefix(line, "order "):
			if c.Order, err = strconv.ParseUint(line[6:], 10, 64); err != nil {
				return c, fmt.Errorf("order: %w", err)
			}
		default:
			s, err := parseStep(line)
			if err != nil {
				return c, err
			}
			c.Steps = append(c.Steps, s)
		}
	}
	if c.Devices < 1 || c.Devices > maxDevices {
		return c, fmt.Errorf("case of %d devices", c.Devices)
	}
	return c, nil
}

// Profile is a kind of world.
type Profile int

// The profiles.
const (
	Plain     Profile = iota // nothing goes wrong
	Faulty                   // an operation fails
	Tight                    // storage is short
	Deadly                   // the process is killed
	Mixed                    // all of it
	Powerless                // the power fails
	profiles
)

var profileNames = [profiles]string{"plain", "faulty", "tight", "deadly", "mixed", "powerless"}

func (p Profile) String() string { return profileNames[p] }

// Generate makes the case of a seed.
func Generate(seed uint64, n int) Case {
	c := generateBare(seed, n)
	generateLog(&c, Profile(seed%uint64(profiles)), seed)
	generateRecords(&c, seed)
	return c
}

// generateRecords has the steps of the records come one by one, with a generator of its own:
// then now and then a snapshot is taken as it is created, and filters come and go.
func generateRecords(c *Case, seed uint64) {
	r := blockdevtest.NewRandom(seed + 1<<63)
	if !r.OneIn(3) {
		return
	}
	c.Records = 1
	if c.Kills > 0 && r.OneIn(2) {
		c.KillAgain = 1 + r.Intn(60)
	}
	for i := range c.Steps {
		switch s := &c.Steps[i]; {
		case s.Verb == Create:
			s.FUA = r.OneIn(4)
		case s.Verb == Read && r.OneIn(12):
			s.Verb = Replace
		}
	}
}

// generateBare makes the case of a seed without write-intent logs.
func generateBare(seed uint64, n int) Case {
	r := blockdevtest.NewRandom(seed)
	profile := Profile(seed % uint64(profiles))
	c := Case{Config: generateConfig(&r, profile), Order: r.Uint64() | 1}
	g := generator{r: &r, c: &c.Config, profile: profile}
	for i := range g.slots {
		g.slots[i] = Destroy
	}
	for i := 0; i < n; i++ {
		c.Steps = append(c.Steps, g.step())
	}
	return c
}

// generateLog gives a case write-intent logs. It chooses with a generator of its own, so
// that all else of a seed is the same with them and without.
func generateLog(c *Case, p Profile, seed uint64) {
	r := blockdevtest.NewRandom(^seed)
	if p != Powerless && !r.OneIn(3) {
		return
	}
	c.Zone = []int{12, 12, 13, 16, 20}[r.Intn(5)]
	for i := range c.Steps {
		if s := &c.Steps[i]; s.Verb == Read && r.OneIn(4) {
			s.Verb = Checkpoint
		}
	}
}

func generateConfig(r *blockdevtest.Random, p Profile) Config {
	pick := func(of ...int) int { return of[r.Intn(len(of))] }
	c := Config{
		Devices:  pick(1, 1, 2, 3),
		Queues:   pick(1, 2, 2, 3),
		IQueues:  pick(1, 2),
		Depth:    pick(1, 2, 4, 8),
		MaxIO:    pick(16, 64, 64, 64, 256, 256, 2200),
		Block:    pick(9, 12, 13, 16),
		Discards: r.Intn(3),
		Sector:   pick(1, 1, 1, 8),
		Earlier:  pick(0, 0, 0, 252, 253, 254, 255, 508),
		Storages: pick(1, 2, 3),
		Slots:    pick(1, 2, 3, 3, 8),
		Limit:    1 << 20,
		Portion:  pick(8, 64, 200, 1024),
	}
	size := func() int { return 8*pick(2, 8, 32, 64, 128) + pick(0, 0, 1, 3, 7) }
	c.Size0, c.Size1, c.Size2 = size(), size(), size()
	if c.MaxIO > 256 {
		c.Size0 = 8*pick(300, 600) + pick(0, 5) // more chunks than one request has copied at a time
	}
	if r.OneIn(3) {
		c.Fixed = r.Intn(8)
	}
	if p == Tight || p == Mixed {
		c.Limit = pick(8, 16, 40, 100, 400)
	}
	if c.Sector > 1 {
		for _, n := range []*int{&c.Size0, &c.Size1, &c.Size2} {
			*n = *n / c.Sector * c.Sector
		}
		c.MaxIO = c.MaxIO / c.Sector * c.Sector
	}
	if p == Faulty || p == Mixed {
		if r.OneIn(3) {
			c.NoMemory = 1 + r.Intn(6)
		}
		c.FaultOn = pick(1, 1, 1, 2, 3)
		c.FaultKinds = pick(0, 0, 1, 2, 3, 32)
		c.FaultAfter = r.Intn(pick(4, 40, 400))
		c.FaultCount = pick(1, 1, 2, 0)
		c.FaultErr = pick(5, 28, 12)
		c.FaultEffect = r.Intn(3)
	}
	if p == Powerless {
		c.PowerStep = 1 + r.Intn(pick(50, 500, 1000))
		switch r.Intn(3) {
		case 0:
			c.Kills, c.KillStep = 1, 1+r.Intn(300)
		case 1:
			c.FaultOn, c.FaultKinds = 2, pick(0, 1<<blockdev.Flush, 1<<blockdev.Write)
			c.FaultAfter, c.FaultCount, c.FaultErr, c.FaultEffect = r.Intn(pick(4, 40)), pick(1, 3), 5, r.Intn(3)
		}
	}
	if p == Deadly || p == Mixed {
		c.Kills = pick(1, 1, 2, 4)
		if r.OneIn(2) {
			c.KillStep = 1 + r.Intn(pick(50, 500, 3000))
		} else {
			c.KillPoint = 1 + r.Intn(pick(20, 200, 1000))
		}
	}
	if r.OneIn(2) {
		c.Encrypt = 1 + r.Intn(255)
	}
	return c
}

// generator makes steps.
type generator struct {
	r       *blockdevtest.Random
	c       *Config
	profile Profile
	hot     uint32  // where writers crowd
	taken   bool    // by the last step
	ended   bool    // a snapshot, by the last step
	slots   [8]Verb // Create, Take or Destroy: the last of these, as far as is known
}

// slot chooses a snapshot for which v makes sense, most of the time.
func (g *generator) slot(v Verb) uint8 {
	r := g.r
	want := Take
	switch v {
	case Create:
		want = Destroy
	case Take, Add, Append, Cancel:
		want = Create
	}
	n := uint8(r.Intn(g.c.Slots))
	for i := 0; i < g.c.Slots && g.slots[n] != want && !r.OneIn(20); i++ {
		n = (n + 1) % uint8(g.c.Slots)
	}
	if v == Create || v == Take || v == Destroy {
		g.slots[n] = v
	}
	return n
}

func (g *generator) step() Step {
	r := g.r
	if g.taken = g.taken && r.OneIn(5); g.taken {
		g.taken = false
		return Step{Verb: Cancel, Gap: uint8(r.Intn(6))}
	}
	if g.ended = g.ended && (g.profile == Deadly || g.profile == Mixed) && r.OneIn(3); g.ended {
		g.ended = false
		return Step{Verb: Kill, Gap: uint8(r.Intn(8))}
	}
	s := Step{
		Dev:   uint8(r.Intn(g.c.Devices)),
		Queue: uint8(r.Intn(g.c.Queues)),
	}
	switch n := r.Intn(100); {
	case n < 3:
		s.Gap = settled
	case n < 50:
		s.Gap = uint8(r.Intn(4))
	default:
		s.Gap = uint8(r.Intn(10))
	}
	n := r.Intn(1000)
	for _, v := range verbChances {
		if n -= v.of1000; n < 0 {
			s.Verb = v.verb
			break
		}
	}
	if s.Verb == Truncate && g.profile != Faulty && g.profile != Mixed {
		s.Verb = Write
	}
	s.Snap = g.slot(s.Verb)
	g.taken, g.ended = s.Verb == Take, s.Verb == Destroy
	switch s.Verb {
	case Read, Write, Discard, WriteZeroes, ImageRead, ImageWrite, ImageDiscard, ImageWriteZeroes, Mark:
		g.span(&s)
		s.FUA = (s.Verb == Write || s.Verb == ImageWrite) && r.OneIn(6)
	case Create:
		s.Arg = 1 + uint32(r.Intn(1<<g.c.Devices-1))
		if r.OneIn(2) {
			s.Arg = 1<<g.c.Devices - 1
		}
		s.Off = uint32(r.Intn(3)) // chunk size: 4 KiB and up
		if r.OneIn(8) {
			s.Off = uint32(r.Intn(9))
		}
		s.Len = uint32(1 + r.Intn(4)) // pool slots
		s.Queue = uint8(r.Intn(16))   // first storage
		if r.OneIn(4) {
			s.Len += uint32(r.Intn(28))
		}
	case Append:
		s.Arg = uint32(r.Intn(8))
	case Replace:
		s.Arg = uint32(max(0, r.Intn(40)-20))
	case Truncate:
		s.Arg = uint32(r.Intn(8))
		s.Off = uint32(r.Intn(256)) * uint32(r.Intn(2))
	case Stick, Slow, Pause:
		s.Arg = uint32(r.Intn(8))
		s.Len = uint32(r.Intn(8))
	}
	if s.Verb == Kill && g.profile != Deadly && g.profile != Mixed {
		s.Verb = Read
		g.span(&s)
	}
	if (s.Verb == Fill || s.Verb == Room) && g.profile != Tight && g.profile != Mixed {
		s.Verb = Write
		g.span(&s)
	}
	return s
}

var verbChances = []struct {
	verb   Verb
	of1000 int
}{
	{Write, 315}, {Truncate, 3}, {Read, 80}, {Discard, 40}, {WriteZeroes, 40}, {Flush, 15},
	{ImageRead, 190}, {ImageWrite, 80}, {ImageDiscard, 10}, {ImageWriteZeroes, 20}, {ImageFlush, 8},
	{Create, 35}, {Add, 8}, {Append, 15}, {Take, 60}, {Cancel, 6}, {Destroy, 15}, {Mark, 8}, {Replace, 4},
	{Stick, 6}, {Unstick, 12}, {Slow, 6}, {Pause, 10}, {Fill, 3}, {Room, 7}, {Kill, 4},
}

// span chooses the sectors of a request: small and large, at the borders of
// pages and anywhere, often where others are.
func (g *generator) span(s *Step) {
	r := g.r
	size := uint32(g.c.size(int(s.Dev)) / sectorSize)
	switch r.Intn(8) {
	case 0:
		s.Len = 1
	case 1, 2:
		s.Len = 8
	case 3:
		s.Len = uint32(1 + r.Intn(g.c.MaxIO))
		if g.c.MaxIO > 256 && s.Dev == 0 && r.OneIn(2) {
			// More chunks than are copied at a time: it goes in pieces.
			s.Off, s.Len = uint32(r.Intn(8)), uint32(min(g.c.MaxIO, int(size)-8))
			return
		}
	default:
		s.Len = uint32(1 + r.Intn(16))
	}
	if (s.Verb == Discard || s.Verb == WriteZeroes || s.Verb == ImageDiscard || s.Verb == ImageWriteZeroes) && r.OneIn(3) {
		s.Len = uint32(1 + r.Intn(int(size)))
	}
	switch r.Intn(4) {
	case 0:
		s.Off = uint32(r.Intn(int(size)))
	case 1:
		s.Off = g.hot + uint32(r.Intn(8))
	case 2:
		s.Off = uint32(r.Intn(int(size))) &^ 7
	default:
		g.hot = uint32(r.Intn(int(size)))
		s.Off = g.hot
	}
	s.Off = min(s.Off, size-1)
	s.Len = min(s.Len, size-s.Off)
}
