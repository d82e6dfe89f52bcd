package machine

import (
	"context"
	"crypto/sha256"
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
	// What is in it decides about its name.
	image := filepath.Join(dir, fmt.Sprintf("root-%.6x.ext4", sha256.Sum256([]byte(rootScript))))
	if !exists(image) {
		script := aptScript + rootScript + "set -e -o pipefail\nmake_root \"$@\"\n"
		if _, err := output(exec.CommandContext(ctx, "bash", "-c", script, "root", dir, image)); err != nil {
			return fmt.Errorf("make a Debian root: %w", err)
		}
	}
	if _, err := output(exec.CommandContext(ctx, "cp", "--sparse=always", "--reflink=auto", image, file)); err != nil {
		return fmt.Errorf("copy the Debian root: %w", err)
	}
	return nil
}
