package machine

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed root.sh
var rootScript string

// MakeRoot makes file the image of a disk with a Debian of the host's release, for Config.Root. It is a copy of one in the
// cache, which is made from the mirrors of the system's own apt sources the first time.
func MakeRoot(ctx context.Context, cache, file string) error {
	dir := filepath.Join(cache, "root")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("create root cache: %w", err)
	}
	unlock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	image := filepath.Join(dir, "root.ext4")
	if !exists(image) {
		script := aptScript + rootScript + "set -e -o pipefail\nmake_root \"$@\"\n"
		if _, err := output(exec.CommandContext(ctx, "bash", "-c", script, "root", dir)); err != nil {
			return fmt.Errorf("make a Debian root: %w", err)
		}
	}
	if _, err := output(exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=auto", image, file)); err != nil {
		return fmt.Errorf("copy the Debian root: %w", err)
	}
	return nil
}
