package snapshots

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CheckSpace makes sure that the filesystem of dir could hold size bytes more if all
// its sparse files were full. Whoever puts a file on the state's tmpfs asks first,
// because the daemon is killed when it touches a page for which there is no memory.
func CheckSpace(dir string, size int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	total := int64(fs.Blocks) * fs.Bsize
	if total == 0 {
		return nil // a tmpfs without a limit
	}
	top := topOf(dir, fs)
	pages := func(n int64) int64 { return (n + fs.Bsize - 1) / fs.Bsize * fs.Bsize }
	promised := int64(0)
	err := filepath.WalkDir(top, func(_ string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.HasPrefix(e.Name(), pinPrefix) {
			return nil //nolint:nilerr // a file that just went needs no room
		}
		if info, err := e.Info(); err == nil {
			promised += pages(info.Size())
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", top, err)
	}
	if promised+pages(size) > total {
		return fmt.Errorf("%s: %d MiB more are needed, but %d of %d MiB are taken already: enlarge state_size, or choose a larger chunk",
			top, size>>20, promised>>20, total>>20)
	}
	return nil
}

// topOf is the uppermost directory above dir on the same filesystem.
func topOf(dir string, fs unix.Statfs_t) string {
	for {
		up := filepath.Dir(dir)
		var st unix.Statfs_t
		if up == dir || unix.Statfs(up, &st) != nil || st.Fsid != fs.Fsid {
			return dir
		}
		dir = up
	}
}
