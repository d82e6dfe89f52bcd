package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/cbtmap"
	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/intentlog"
	"github.com/ublk-blksnap/ublk-blksnap/internal/sector"
)

// DefaultConfigPath is where a daemon looks for its configuration. There need
// be none.
const DefaultConfigPath = "/etc/ublk-blksnap.conf"

// Config is the daemon's configuration. The names of the first nine are
// blksnap's module parameters, or their counterparts.
type Config struct {
	TrackingBlockMinimumShift int64
	TrackingBlockMaximumShift int64
	TrackingBlockMaximumCount int64
	ChunkMinimumShift         int64
	ChunkMaximumShift         int64
	ChunkMaximumCount         int64
	ChunkMaximumInQueue       int64
	DiffBufferPoolSize        int64 // bytes
	DiffStorageMinimum        int64 // sectors of 512 bytes

	Queues     int64
	QueueDepth int64
	Mode       control.Mode
	StateSize  int64 // bytes
	// StateDir is where change maps are kept while their disks have no filter; empty:
	// nowhere.
	StateDir string
	// Encrypt: what snapshots store is encrypted, unless their maker says otherwise.
	Encrypt bool
	// AutoAppend is a directory in which a snapshot gets more storage when it runs low;
	// empty: none does, unless its maker says so. AutoAppendReserve is how many percent of
	// its filesystem stay free then.
	AutoAppend        string
	AutoAppendReserve int64
	// IntentLog is whether change maps go on after a power failure, IntentLogZone the
	// size of a zone of their logs in bytes; 0: chosen by the size of the disk.
	IntentLog     bool
	IntentLogZone int64
	FreezeTimeout time.Duration
	// StorageTimeout is how long difference storage is waited for: by writes, and by
	// callers that append storage or destroy a snapshot.
	StorageTimeout time.Duration
	// DiskTimeout bounds the waiting for an original disk, the driver, or what a path
	// leads to.
	DiskTimeout time.Duration
	// Guard: a process waits for the death of the daemon, to start the next.
	Guard bool
	// Resident: the program and its configuration are in memory, so that the volume which they
	// lie on may have a filter while it is in use.
	Resident bool
	// HookDir holds programs that are run around each take; empty: none. Each has HookTimeout.
	// HooksRequired: one that fails before a take cancels it.
	HookDir       string
	HookTimeout   time.Duration
	HooksRequired bool
	// Group, if any, is one whose members may ask what there is, and change nothing.
	Group string
	// Metrics is a loopback address and port where what is measured is served; empty: on
	// the socket alone.
	Metrics  string
	LogLevel string
}

// DefaultConfig is the configuration without a file.
func DefaultConfig() Config {
	cbt := cbtmap.DefaultParams()
	return Config{
		TrackingBlockMinimumShift: int64(cbt.MinimumShift),
		TrackingBlockMaximumShift: int64(cbt.MaximumShift),
		TrackingBlockMaximumCount: cbt.MaximumCount,
		ChunkMinimumShift:         16,
		ChunkMaximumShift:         26,
		ChunkMaximumCount:         16 << 20,
		ChunkMaximumInQueue:       0,
		DiffBufferPoolSize:        64 << 20,
		DiffStorageMinimum:        2097152,
		Queues:                    1,
		QueueDepth:                128,
		Mode:                      control.ModeAuto,
		StateSize:                 1 << 30,
		StateDir:                  "/var/lib/ublk-blksnap",
		AutoAppendReserve:         10,
		IntentLog:                 true,
		FreezeTimeout:             10 * time.Second,
		StorageTimeout:            30 * time.Second,
		DiskTimeout:               30 * time.Second,
		Guard:                     true,
		HookDir:                   "/etc/ublk-blksnap.hooks",
		HookTimeout:               30 * time.Second,
		HooksRequired:             true,
		LogLevel:                  "info",
	}
}

// Param is one parameter: a key of the configuration file, and with dashes a
// flag of the daemon.
type Param struct {
	Key, Doc string
	Value    ParamValue
}

// Flag is the parameter's name as a flag.
func (p Param) Flag() string { return strings.ReplaceAll(p.Key, "_", "-") }

// ParamValue reads and writes one field of a Config as text.
type ParamValue interface {
	String() string
	Set(string) error
	Type() string
}

// Params are the parameters of c, each bound to its field.
func (c *Config) Params() []Param {
	return []Param{
		{"tracking_block_minimum_shift", "smallest block of change tracking, as a power of two of bytes", number{&c.TrackingBlockMinimumShift}},
		{"tracking_block_maximum_shift", "largest block of change tracking, as a power of two of bytes", number{&c.TrackingBlockMaximumShift}},
		{"tracking_block_maximum_count", "blocks of change tracking per device above which blocks get larger", number{&c.TrackingBlockMaximumCount}},
		{"chunk_minimum_shift", "smallest chunk of a snapshot, as a power of two of bytes (12 to 26), unless --chunk-size says otherwise", number{&c.ChunkMinimumShift}},
		{"chunk_maximum_shift", "largest chunk of a snapshot, as a power of two of bytes (12 to 26)", number{&c.ChunkMaximumShift}},
		{"chunk_maximum_count", "chunks per device above which chunks get larger; each takes 8 bytes of memory per snapshot", number{&c.ChunkMaximumCount}},
		{"chunk_maximum_in_queue", "chunks of a snapshot that wait in memory to be stored, at most; 0: as many as the pool holds", number{&c.ChunkMaximumInQueue}},
		{"diff_buffer_pool_size", "memory of a snapshot for chunks not yet stored (blksnap's free_diff_buffer_pool_size counts buffers instead)", byteSize{&c.DiffBufferPoolSize}},
		{"diff_storage_minimum", "largest portion in which difference storage grows, in sectors of 512 bytes; low_free_space asks for no more", number{&c.DiffStorageMinimum}},
		{"queues", "queues of a filter device, each with a thread of its own", number{&c.Queues}},
		{"queue_depth", "requests in flight per queue (1 to 4096)", number{&c.QueueDepth}},
		{"mode", "auto, copy or zerocopy", mode{&c.Mode}},
		{"state_size", "limit of the memory for change maps, chunk tables and pools", byteSize{&c.StateSize}},
		{"state_dir", "directory in which change maps are kept while their disks have no filter, over a restart of the machine too, and notes of what a loss of power would leave of snapshots; it must not lie on a disk with a filter; empty: neither is kept", path{&c.StateDir}},
		{"encrypt", "whether what a snapshot stores is encrypted, unless --encrypt says otherwise; the key is in memory only, and gone with the snapshot or the power", boolean{&c.Encrypt}},
		{"auto_append", "directory in which a snapshot that runs low gets more storage by itself, unless --auto-append says otherwise; empty: none does", path{&c.AutoAppend}},
		{"auto_append_reserve", "how much of the filesystem of that directory stays free", percentage{&c.AutoAppendReserve}},
		{"intent_log", "whether change tracking goes on after a power failure: the first write to a zone of a disk after a take waits until state_dir has that on stable storage", boolean{&c.IntentLog}},
		{"intent_log_zone", "size of such a zone, a power of two; 0: 1M, or as much as leaves 16384 zones of a disk", byteSize{&c.IntentLogZone}},
		{"freeze_timeout", "longest time a filesystem is frozen for a take", duration{&c.FreezeTimeout}},
		{"storage_timeout", "longest time that writes wait for difference storage that does not answer, then the snapshot is given up; and that appending and destroying wait for it", duration{&c.StorageTimeout}},
		{"disk_timeout", "longest time that adding and removing a device wait for a disk that does not answer, and any command for a path", duration{&c.DiskTimeout}},
		{"guard", "a process of its own starts the next daemon if this one dies; not under systemd, which does that, unless it is resident", boolean{&c.Guard}},
		{"resident", "whether the daemon, what starts the next one, and the configuration are in memory only (some 30 MiB that are never swapped), so that a volume with the root filesystem, the program or its configuration may have a filter; it counts from the next start or reload on", boolean{&c.Resident}},
		{"hook_dir", "directory of programs that are run before and after each take, as \"snapshot take --help\" tells; empty: none", path{&c.HookDir}},
		{"hook_timeout", "longest time that one of them may take", duration{&c.HookTimeout}},
		{"hooks_required", "whether one that fails or takes too long before a take cancels it", boolean{&c.HooksRequired}},
		{"group", "a group whose members may look at everything (list, status, info, changes, watch) and change nothing; empty: root alone may", groupName{&c.Group}},
		{"metrics", "loopback address and port, as 127.0.0.1:9469, where GET /metrics answers Prometheus, and anybody on this machine; empty: only the daemon's socket does", loopback{&c.Metrics}},
		{"log_level", "debug, info, warn or error", level{&c.LogLevel}},
	}
}

type number struct{ v *int64 }

func (n number) String() string { return strconv.FormatInt(*n.v, 10) }
func (n number) Type() string   { return "number" }
func (n number) Set(s string) error {
	v, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", s)
	}
	*n.v = int64(v)
	return nil
}

type byteSize struct{ v *int64 }

func (b byteSize) String() string { return control.FormatSize(*b.v) }
func (b byteSize) Type() string   { return "size" }
func (b byteSize) Set(s string) (err error) {
	v, err := control.ParseSize(s)
	if err == nil {
		*b.v = v
	}
	return err
}

type duration struct{ v *time.Duration }

func (d duration) String() string { return d.v.String() }
func (d duration) Type() string   { return "duration" }
func (d duration) Set(s string) error {
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration: write 500ms or 10s", s)
	}
	*d.v = v
	return nil
}

type boolean struct{ v *bool }

func (b boolean) String() string { return strconv.FormatBool(*b.v) }
func (b boolean) Type() string   { return "bool" }

// IsBoolFlag lets the flag stand without a value.
func (b boolean) IsBoolFlag() bool { return true }
func (b boolean) Set(s string) error {
	if s != "true" && s != "false" {
		return fmt.Errorf("%q is neither true nor false", s)
	}
	*b.v = s == "true"
	return nil
}

type mode struct{ v *control.Mode }

func (m mode) String() string { return string(*m.v) }
func (m mode) Type() string   { return "mode" }
func (m mode) Set(s string) error {
	v, err := control.ParseMode(s)
	if err == nil {
		*m.v = v
	}
	return err
}

type path struct{ v *string }

func (p path) String() string { return *p.v }
func (p path) Type() string   { return "path" }
func (p path) Set(s string) error {
	if s != "" && (!filepath.IsAbs(s) || filepath.Clean(s) != s || s == "/") {
		return fmt.Errorf("%q is not the absolute path of a directory", s)
	}
	*p.v = s
	return nil
}

type groupName struct{ v *string }

func (g groupName) String() string { return *g.v }
func (g groupName) Type() string   { return "group" }
func (g groupName) Set(s string) error {
	if strings.ContainsAny(s, ":/\"\n ") {
		return fmt.Errorf("%q is not the name of a group", s)
	}
	*g.v = s
	return nil
}

type level struct{ v *string }

func (l level) String() string { return *l.v }
func (l level) Type() string   { return "level" }
func (l level) Set(s string) error {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, s) {
		return fmt.Errorf("%q is not a level: write debug, info, warn or error", s)
	}
	*l.v = s
	return nil
}

// CBTParams are the parameters of change maps.
func (c *Config) CBTParams() cbtmap.Params {
	return cbtmap.Params{
		MinimumShift: uint8(c.TrackingBlockMinimumShift),
		MaximumShift: uint8(c.TrackingBlockMaximumShift),
		MaximumCount: c.TrackingBlockMaximumCount,
	}
}

// Limits of devices. The kernel takes queues of up to 4096 requests; its limit
// on queues is the number of processors.
const (
	MaxQueueDepth = 4096
	MaxQueues     = 256
)

// Validate refuses impossible values and combinations.
func (c *Config) Validate() error {
	for _, r := range []struct {
		key         string
		v, min, max int64
	}{
		{"tracking_block_minimum_shift", c.TrackingBlockMinimumShift, 9, 31},
		{"tracking_block_maximum_shift", c.TrackingBlockMaximumShift, 9, 31},
		{"tracking_block_maximum_count", c.TrackingBlockMaximumCount, 1, 1 << 32},
		{"chunk_minimum_shift", c.ChunkMinimumShift, 12, 26},
		{"chunk_maximum_shift", c.ChunkMaximumShift, 12, 26},
		{"chunk_maximum_count", c.ChunkMaximumCount, 1, 1 << 32},
		{"diff_buffer_pool_size", c.DiffBufferPoolSize, 1 << 20, 1 << 40},
		{"diff_storage_minimum", c.DiffStorageMinimum, 8, 1 << 40},
		{"queues", c.Queues, 1, MaxQueues},
		{"queue_depth", c.QueueDepth, 1, MaxQueueDepth},
		{"state_size", c.StateSize, 1 << 20, 1 << 45},
		{"freeze_timeout", int64(c.FreezeTimeout), int64(100 * time.Millisecond), int64(time.Hour)},
		{"storage_timeout", int64(c.StorageTimeout), int64(time.Second), int64(24 * time.Hour)},
		{"disk_timeout", int64(c.DiskTimeout), int64(time.Second), int64(24 * time.Hour)},
		{"hook_timeout", int64(c.HookTimeout), int64(time.Second), int64(time.Hour)},
	} {
		if r.v < r.min || r.v > r.max {
			show := func(v int64) string { return strconv.FormatInt(v, 10) }
			switch r.key {
			case "freeze_timeout", "storage_timeout", "disk_timeout", "hook_timeout":
				show = func(v int64) string { return time.Duration(v).String() }
			case "diff_buffer_pool_size", "state_size":
				show = control.FormatSize
			}
			return &paramError{r.key, fmt.Sprintf("%s is not within %s to %s", show(r.v), show(r.min), show(r.max))}
		}
	}
	switch {
	case c.IntentLogZone != 0 && !validZone(c.IntentLogZone):
		return &paramError{"intent_log_zone", fmt.Sprintf("%s is not 0 and not a power of two from 1M to 1T", control.FormatSize(c.IntentLogZone))}
	case c.TrackingBlockMaximumShift < c.TrackingBlockMinimumShift:
		return &paramError{"tracking_block_maximum_shift", fmt.Sprintf("%d is below tracking_block_minimum_shift %d", c.TrackingBlockMaximumShift, c.TrackingBlockMinimumShift)}
	case c.ChunkMaximumShift < c.ChunkMinimumShift:
		return &paramError{"chunk_maximum_shift", fmt.Sprintf("%d is below chunk_minimum_shift %d", c.ChunkMaximumShift, c.ChunkMinimumShift)}
	case c.DiffBufferPoolSize < 1<<c.ChunkMinimumShift:
		return &paramError{"diff_buffer_pool_size", fmt.Sprintf("%s holds no chunk of chunk_minimum_shift %d", control.FormatSize(c.DiffBufferPoolSize), c.ChunkMinimumShift)}
	case c.StateSize < 2*c.DiffBufferPoolSize:
		return &paramError{"state_size", fmt.Sprintf("%s is less than twice diff_buffer_pool_size %s: no snapshot would fit beside the change maps", control.FormatSize(c.StateSize), control.FormatSize(c.DiffBufferPoolSize))}
	case c.DiffStorageMinimum*sector.Size < 1<<c.ChunkMinimumShift:
		return &paramError{"diff_storage_minimum", fmt.Sprintf("%d sectors hold no chunk of chunk_minimum_shift %d", c.DiffStorageMinimum, c.ChunkMinimumShift)}
	}
	return nil
}

// validZone says whether zones of an intent log can have n bytes.
func validZone(n int64) bool {
	return n&(n-1) == 0 && n >= 1<<intentlog.MinZoneShift && n <= 1<<intentlog.MaxZoneShift
}

// paramError is what is wrong with one parameter.
type paramError struct{ key, what string }

func (e *paramError) Error() string { return e.key + ": " + e.what }

// ReadConfig reads the configuration file over c. A file that is not there is
// no error if it is the default one. Errors name the file and the line. The disks
// that file and drop-in directory name are only checked: see ReadBootDevices.
func (c *Config) ReadConfig(path string) error {
	h := host(0)
	text, err := readConfigFile(h, path)
	switch {
	case errors.Is(err, os.ErrNotExist) && path == DefaultConfigPath:
	case err != nil:
		return fail(err, "read configuration")
	default:
		if err := c.parse(path, text); err != nil {
			return err
		}
	}
	_, err = readBootDevices(h, path)
	return err
}

func (c *Config) parse(path, content string) error {
	file, err := decodeConfig(path, content)
	if err != nil {
		return err
	}
	wrong := func(key, what string) error {
		return &control.Error{Code: control.Invalid, Message: fmt.Sprintf("%s:%d: %s: %s", path, lineOf(content, key), key, what)}
	}
	params := map[string]Param{}
	for _, p := range c.Params() {
		params[p.Key] = p
	}
	keys := make([]string, 0, len(file))
	for key := range file {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b string) int { return lineOf(content, a) - lineOf(content, b) })
	for _, key := range keys {
		if key == bootKey {
			continue
		}
		p, ok := params[key]
		if key == "recovery" {
			return wrong(key, "is gone, as every device outlives its daemon now: remove the line")
		}
		if !ok {
			return wrong(key, "no such parameter")
		}
		switch v := file[key].(type) {
		case string, int64, bool:
			if err := p.Value.Set(fmt.Sprint(v)); err != nil {
				return wrong(key, err.Error())
			}
		default:
			return wrong(key, "not a "+p.Value.Type())
		}
	}
	if err := c.Validate(); err != nil {
		var pe *paramError
		if errors.As(err, &pe) {
			return wrong(pe.key, pe.what)
		}
		return err
	}
	return nil
}

// lineOf is the line that gives key a value, or line 1 if none does.
func lineOf(content, key string) int {
	for i, line := range strings.Split(content, "\n") {
		line = strings.TrimLeft(line, " \t[\"'")
		if rest, ok := strings.CutPrefix(line, key); ok && !isKeyChar(rest) {
			return i + 1
		}
	}
	return 1
}

func isKeyChar(s string) bool {
	if s == "" {
		return false
	}
	c := s[0]
	return c == '_' || c == '-' || '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
}
