package disk

import (
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// MachineID is another one on each machine, and stays over restarts; empty if nothing
// is known of the machine. It is a hash of its machine-id(5), unless that is one for
// this boot only, and of what the firmware says: a copy of a virtual machine has the
// same machine-id, but is told another by its firmware.
func MachineID() string { return machineID("/etc/machine-id", "/sys/class/dmi/id/product_uuid") }

func machineID(file, firmware string) string {
	id, of := "", readText(firmware)
	var fs unix.Statfs_t
	if err := unix.Statfs(file, &fs); err == nil && fs.Type != unix.TMPFS_MAGIC {
		id = readText(file)
	}
	if id == "" && of == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(filepath.Base(file) + "\n" + id + "\n" + of + "\n"))
	return hex.EncodeToString(sum[:16])
}
