package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// BootDevice is a disk that gets its filter when the daemon starts: a [[device]] table
// of the configuration file, or of a file in its drop-in directory. Zero values mean
// the configured ones.
type BootDevice struct {
	Name   string       `json:"name"`
	Path   string       `json:"path"` // that leads to the same disk after every boot
	Queues int          `json:"queues,omitempty"`
	Depth  int          `json:"depth,omitempty"`
	Mode   control.Mode `json:"mode,omitempty"`
	// IntentLog and IntentLogZone are as in an AddRequest.
	IntentLog     *bool `json:"intent_log,omitempty"`
	IntentLogZone int64 `json:"intent_log_zone,omitempty"`

	File string `json:"file"` // that has the table
	Line int    `json:"line"` // where it begins
}

// bootKey is the name of the tables.
const bootKey = "device"

func (b BootDevice) where() string { return fmt.Sprintf("%s:%d", b.File, b.Line) }

func (b BootDevice) request() control.AddRequest {
	return control.AddRequest{Path: b.Path, Name: b.Name, Queues: b.Queues, Depth: b.Depth, Mode: b.Mode, IntentLog: b.IntentLog, IntentLogZone: b.IntentLogZone}
}

// DropInDir is the directory whose files add tables to a configuration file. The
// program writes there, and never to the file, which is its owner's.
func DropInDir(config string) string { return strings.TrimSuffix(config, ".conf") + ".d" }

// ReadBootDevices reads the [[device]] tables of a configuration, in the order of
// files and lines. What is not there has none.
func ReadBootDevices(config string) ([]BootDevice, error) { return readBootDevices(host(0), config) }

// readBootDevices is ReadBootDevices of a machine.
func readBootDevices(h *disk.Host, config string) ([]BootDevice, error) {
	files := []string{config}
	dir := DropInDir(config)
	names, err := readConfigDir(h, dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fail(err, "read configuration")
	}
	for _, name := range names {
		if strings.HasSuffix(name, ".conf") && !strings.HasPrefix(name, ".") {
			files = append(files, filepath.Join(dir, name))
		}
	}
	var all []BootDevice
	for _, file := range files {
		text, err := readConfigFile(h, file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fail(err, "read configuration")
		}
		devices, err := parseBootDevices(file, text, file != config)
		if err != nil {
			return nil, err
		}
		all = append(all, devices...)
	}
	return all, checkBootDevices(all)
}

// checkBootDevices refuses what two tables cannot both have.
func checkBootDevices(all []BootDevice) error {
	for i, b := range all {
		for _, other := range all[:i] {
			switch {
			case other.Name == b.Name:
				return invalid("%s: name: %s has the filter of %s too", b.where(), other.where(), b.Name)
			case other.Path == b.Path:
				return invalid("%s: path: %s names %s too", b.where(), other.where(), b.Path)
			}
		}
	}
	return nil
}

// parseBootDevices reads the tables in a file. only: the file may hold nothing else.
func parseBootDevices(path, content string, only bool) ([]BootDevice, error) {
	file, err := decodeConfig(path, content)
	if err != nil {
		return nil, err
	}
	if only {
		for key := range file {
			if key != bootKey {
				return nil, invalid("%s:%d: %s: here may be [[%s]] tables only", path, lineOf(content, key), key, bootKey)
			}
		}
	}
	value, ok := file[bootKey]
	if !ok {
		return nil, nil
	}
	tables, ok := value.([]map[string]any)
	if !ok {
		return nil, invalid("%s:%d: %s: write it as [[%s]]", path, lineOf(content, bootKey), bootKey, bootKey)
	}
	var all []BootDevice
	for i, table := range tables {
		line, text := bootTable(content, i)
		b := BootDevice{File: path, Line: line}
		for key, v := range table {
			if err := b.set(key, v); err != nil {
				return nil, invalid("%s:%d: %s: %v", path, line+lineOf(text, key)-1, key, err)
			}
		}
		for key, v := range map[string]string{"path": b.Path, "name": b.Name} {
			if v == "" {
				return nil, invalid("%s:%d: %s: is missing: each [[%s]] has a path and a name", path, line, key, bootKey)
			}
		}
		all = append(all, b)
	}
	return all, nil
}

// bootTable is the text of the n-th table in a file, and its line.
func bootTable(content string, n int) (line int, text string) {
	lines := strings.Split(content, "\n")
	header := regexp.MustCompile(`^\s*\[\[\s*"?` + bootKey + `"?\s*\]\]`)
	for i, l := range lines {
		if !header.MatchString(l) {
			continue
		}
		if n--; n >= 0 {
			continue
		}
		end := i + 1
		for end < len(lines) && !strings.HasPrefix(strings.TrimSpace(lines[end]), "[") {
			end++
		}
		return i + 1, strings.Join(lines[i:end], "\n")
	}
	return 1, ""
}

// set gives one key of the table its value.
func (b *BootDevice) set(key string, v any) (err error) {
	whole := func(most int) (int, error) {
		n, ok := v.(int64)
		if !ok || n < 1 || n > int64(most) {
			return 0, fmt.Errorf("%v is not a whole number from 1 to %d", v, most)
		}
		return int(n), nil
	}
	text, ok := v.(string)
	if !ok && (key == "path" || key == "name" || key == "mode") {
		return errors.New("not a text")
	}
	switch key {
	case "path":
		b.Path, err = stablePath(text)
	case "name":
		if b.Name = text; checkName(text) != nil {
			err = fmt.Errorf("%q: use up to 64 letters, digits and . _ + -", text)
		}
	case "queues":
		b.Queues, err = whole(MaxQueues)
	case "queue_depth":
		b.Depth, err = whole(MaxQueueDepth)
	case "mode":
		b.Mode, err = control.ParseMode(text)
	case "intent_log":
		logged, isBool := v.(bool)
		if !isBool {
			return errors.New("neither true nor false")
		}
		b.IntentLog = &logged
	case "intent_log_zone":
		if b.IntentLogZone, err = control.ParseSize(fmt.Sprint(v)); err == nil && !validZone(b.IntentLogZone) {
			err = fmt.Errorf("%v is not a power of two from 1M to 1T", v)
		}
	default:
		err = errors.New("no such key of a [[" + bootKey + "]]")
	}
	return err
}

// ruleSafe is what a path may be made of, so that it means in udev's rules what it
// says.
var ruleSafe = regexp.MustCompile(`^/dev/[A-Za-z0-9#+.:=@_/\\~,-]+$`)

// errUnstable is the reason to refuse a path that may lead to another disk later.
var errUnstable = errors.New("may be another disk at the next boot: name it by a link below /dev/disk/by-id, by-path or by-partuuid, or by a volume's name")

// stablePath is a path that leads to the same disk after every boot, as it was given
// or as fstab(5) writes it.
func stablePath(path string) (string, error) {
	if id, ok := strings.CutPrefix(path, "PARTUUID="); ok {
		path = "/dev/disk/by-partuuid/" + strings.ToLower(strings.Trim(id, `"`))
	}
	if !ruleSafe.MatchString(path) || filepath.Clean(path) != path {
		return path, fmt.Errorf("%q is not the path of a disk below /dev", path)
	}
	rest := strings.TrimPrefix(path, "/dev/")
	folder, _, deep := strings.Cut(rest, "/")
	switch {
	case strings.HasPrefix(rest, "disk/by-uuid/"), strings.HasPrefix(rest, "disk/by-label/"), strings.HasPrefix(rest, "ublk-blksnap/"):
		return path, fmt.Errorf("%s leads to the filter once there is one: name the disk by a link below /dev/disk/by-id, by-path or by-partuuid", path)
	case !deep, folder == "block", folder == "char", strings.HasPrefix(rest, "disk/by-diskseq/"):
		return path, fmt.Errorf("%s %w", path, errUnstable)
	}
	return path, nil
}

// text is the table as a file of the drop-in directory.
func (b BootDevice) text() string {
	var s strings.Builder
	fmt.Fprintf(&s, "# Written by \"ublk-blksnap add --boot\", removed by \"ublk-blksnap remove --boot %s\".\n", b.Name)
	b.Write(&s)
	return s.String()
}

// Write writes the table as a configuration file has it.
func (b BootDevice) Write(w io.Writer) {
	fmt.Fprintf(w, "[[%s]]\nname = %q\npath = '%s'\n", bootKey, b.Name, b.Path)
	if b.Queues != 0 {
		fmt.Fprintf(w, "queues = %d\n", b.Queues)
	}
	if b.Depth != 0 {
		fmt.Fprintf(w, "queue_depth = %d\n", b.Depth)
	}
	if b.Mode != "" {
		fmt.Fprintf(w, "mode = %q\n", b.Mode)
	}
	if b.IntentLog != nil {
		fmt.Fprintf(w, "intent_log = %v\n", *b.IntentLog)
	}
	if b.IntentLogZone != 0 {
		fmt.Fprintf(w, "intent_log_zone = %q\n", control.FormatSize(b.IntentLogZone))
	}
}

// decodeConfig reads a file's TOML. The error names file and line.
func decodeConfig(path, content string) (map[string]any, error) {
	var file map[string]any
	_, err := toml.Decode(content, &file)
	if err == nil {
		return file, nil
	}
	var pe toml.ParseError
	if errors.As(err, &pe) {
		return nil, invalid("%s:%d: %s", path, pe.Position.Line, pe.Message)
	}
	return nil, invalid("%s: %v", path, err)
}
