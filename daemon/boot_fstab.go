package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// fstabNotes are the lines of fstab and crypttab that would wait in vain for one of these disks at
// the boot.
func fstabNotes(all []BootDevice) (out []string) {
	for column, file := range []string{"/etc/fstab", "/etc/crypttab"} {
		if text, err := os.ReadFile(file); err == nil {
			out = append(out, namedItself(file, string(text), column, all, disk.Machine().Lookup)...)
		}
	}
	return out
}

// namedItself says which lines of a table, whose devices are in a column, name one of these disks
// by what is not its filter's too. No unit of systemd's has such a name: see boot.rules.
func namedItself(file, text string, column int, all []BootDevice, lookup func(path string) (*disk.Disk, error)) (out []string) {
	for n, line := range strings.Split(text, "\n") {
		fields := strings.Fields(line)
		// The initramfs mounts the root filesystem.
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") || column == 0 && fields[1] == "/" {
			continue
		}
		path := fstabPath(fields[column])
		switch filepath.Dir(path) {
		case ".", "/", "/dev/disk/by-uuid", "/dev/disk/by-label", linkDir:
			continue // no disk, or the filter
		}
		named, err := lookup(path)
		for _, b := range all {
			d, lost := lookup(b.Path)
			known := err == nil && lost == nil
			whole := path == b.Path || known && named.Num == d.Num
			// The filter's partitions have this name.
			part := known && named.Parent == d.Name && filepath.Dir(path) != "/dev/disk/by-partuuid"
			switch {
			case whole:
				out = append(out, fmt.Sprintf("%s:%d names %s, which is kept from systemd at the boot: name the UUID there, or %s", file, n+1, fields[column], filepath.Join(linkDir, b.Name)))
			case part:
				out = append(out, fmt.Sprintf("%s:%d names %s, which is kept from systemd at the boot: name the UUID there", file, n+1, fields[column]))
			}
		}
	}
	return out
}

// fstabPath is the link of udev's that fstab(5) means by the first word of a line.
func fstabPath(name string) string {
	key, value, ok := strings.Cut(name, "=")
	if !ok || strings.HasPrefix(name, "/") {
		return name
	}
	value = strings.Trim(value, `"`)
	switch key {
	case "PARTUUID":
		return "/dev/disk/by-partuuid/" + strings.ToLower(value)
	case "PARTLABEL":
		return "/dev/disk/by-partlabel/" + value
	case "ID":
		return "/dev/disk/by-id/" + value
	}
	return "" // by what is on the disk, and so on the filter
}
