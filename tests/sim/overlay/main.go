// Command overlay writes copies of the engine's files that have the deliberate bugs of tests/sim/bugs. The go command then
// builds the copies in place of the files. In the module's root:
//
//	go run ./tests/sim/overlay
//	go test -overlay .cache/bugs/overlay.json ./tests/sim
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/ublk-blksnap/ublk-blksnap/tests/sim/bugs"
)

func main() {
	if err := write(".cache/bugs"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(dir string) error {
	copies, err := bugs.Overlay(os.DirFS("."))
	if err != nil {
		return err
	}
	replace := make(map[string]string)
	for name, text := range copies {
		as := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(as), 0o777); err != nil {
			return err
		}
		if err := os.WriteFile(as, []byte(text), 0o666); err != nil {
			return err
		}
		replace[name] = as
	}
	list, err := json.MarshalIndent(map[string]any{"Replace": replace}, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "overlay.json"), append(list, '\n'), 0o666)
}
