// Command picture records a session of the program and draws it as a terminal's window, in SVG. The README shows that
// picture, docs/session.svg, which "make picture" makes anew in the machine. Nothing in it is written by hand but the
// commands, in the file session. The tests of package docs say that it holds these, and run them again.
package main

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

//go:embed session
var session string

// before makes what the commands find: a disk with an empty filesystem, and a directory on another disk.
const before = `
	[[ $(</sys/block/vdb/serial) == docs1 ]]
	wipefs -qa /dev/vdb
	mkfs.ext4 -q /dev/vdb
	mount -t tmpfs tmp /var/tmp`

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "picture:", err)
		os.Exit(1)
	}
}

func run() error {
	if os.Getenv("UBLK_BLKSNAP_VM") != "1" {
		return fmt.Errorf("this needs a machine of its own, because it formats /dev/vdb: make picture")
	}
	steps, err := record(before, strings.Split(strings.TrimSpace(session), "\n"))
	if err != nil {
		return err
	}
	picture, err := draw(steps)
	if err != nil {
		return err
	}
	_, err = os.Stdout.WriteString(picture)
	return err
}

// A step is a command with what it printed.
type step struct{ command, output string }

// record runs commands in one shell, so that a variable is known later on. A command that fails is no picture.
func record(before string, commands []string) (steps []step, err error) {
	var script strings.Builder
	script.WriteString(before)
	for _, c := range commands {
		fmt.Fprintf(&script, "\nprintf '\\0'\n{\n%s\n} 2>&1 </dev/null", c)
	}
	bash := exec.Command("bash", "-e", "-o", "pipefail", "-c", script.String())
	bash.Stderr = os.Stderr
	out, err := bash.Output()
	said := strings.Split(string(out), "\x00")[1:]
	if err != nil && len(said) > 0 {
		err = fmt.Errorf("%s: %w: %s", commands[len(said)-1], err, said[len(said)-1])
	}
	if err != nil {
		return nil, err
	}
	for i, c := range commands {
		steps = append(steps, step{c, said[i]})
	}
	return steps, nil
}
