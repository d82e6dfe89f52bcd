package program

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
)

// Processes are the processes of that comm, dead ones excepted.
func Processes(comm string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range all {
		stat, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(stat, []byte("("+comm+") ")) || bytes.Contains(stat, []byte(") Z ")) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		pids = append(pids, pid)
	}
	return pids
}
