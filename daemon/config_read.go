package daemon

import (
	"os"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// Whoever is started by a person reads the configuration as that person would: from where he
// is, and from a pipe too. A daemon has left that behind, and reads it where everybody sees it.

func asCaller(h *disk.Host) bool { return h.Root == "/" && h.Walker == nil }

// readConfigFile is the content of a file of the configuration.
func readConfigFile(h *disk.Host, path string) (string, error) {
	if asCaller(h) {
		text, err := os.ReadFile(path)
		return string(text), err
	}
	return h.ReadFile(path)
}

// readConfigDir are the names in a directory of the configuration, in their order.
func readConfigDir(h *disk.Host, path string) (names []string, err error) {
	if !asCaller(h) {
		return h.ReadNames(path)
	}
	entries, err := os.ReadDir(path)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}
