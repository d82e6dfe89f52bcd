package disk

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"golang.org/x/sys/unix"
)

// MachineID is another one on each machine, and stays over restarts. It has two parts,
// each empty if it is not known: a hash of the machine-id(5), unless that is one for this
// boot only, and one of what the firmware says. A copy of a virtual machine has the same
// machine-id, but is told another by its firmware.
func MachineID() string { return machineID("/etc/machine-id", "/sys/class/dmi/id/product_uuid") }

func machineID(file, firmware string) string {
	id := ""
	var fs unix.Statfs_t
	if err := unix.Statfs(file, &fs); err == nil && fs.Type != unix.TMPFS_MAGIC {
		id = readText(file)
	}
	return hashed(id) + "." + hashed(readText(firmware))
}

func hashed(s string) string {
	if s == "" {
		return ""
	}
	sum := sha256.Sum256([]byte("ublk-blksnap\n" + s))
	return hex.EncodeToString(sum[:8])
}

// OtherMachine says whether two machines differ in a part that is known of both.
func OtherMachine(a, b string) bool {
	a1, a2, _ := strings.Cut(a, ".")
	b1, b2, _ := strings.Cut(b, ".")
	differ := func(x, y string) bool { return x != "" && y != "" && x != y }
	return differ(a1, b1) || differ(a2, b2)
}
