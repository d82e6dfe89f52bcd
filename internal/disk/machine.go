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
// machine-id, but is told another by its firmware. One that was reverted to a snapshot of
// itself is the same.
func (h *Host) MachineID() string {
	return h.machineID("/etc/machine-id", "/sys/class/dmi/id/product_uuid")
}

func (h *Host) machineID(file, firmware string) string {
	id := ""
	if f, err := h.Open(file, unix.O_PATH, 0); err == nil {
		defer f.Close()
		var fs unix.Statfs_t
		if unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type != unix.TMPFS_MAGIC {
			text, _ := h.ReadFile(file)
			id = strings.TrimSpace(text)
		}
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
