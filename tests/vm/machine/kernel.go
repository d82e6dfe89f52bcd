package machine

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Newest names the newest kernel of the backports suite in Fetch and Config.Kernel.
const Newest = "newest"

// Kernel is an unpacked kernel in the cache.
type Kernel struct {
	Release string // as uname -r says it
	Image   string // path of the bzImage
	Modules string // path of the directory that belongs at /lib/modules/Release
}

var kernelName = regexp.MustCompile(`^(newest|\d+\.\d+)$`)

//go:embed apt.sh
var aptScript string

//go:embed fetch.sh
var fetchScript string

// Fetch returns the kernel called name: "newest", or a version such as "6.12", of which the latest package counts.
// Its packages are downloaded through the mirrors that the system's own apt sources name, the first time only:
// the version found then stays in cache until the directory kernels/name is removed. The system's own apt state is
// neither used nor changed.
func Fetch(ctx context.Context, cache, name string) (*Kernel, error) {
	if !kernelName.MatchString(name) {
		return nil, fmt.Errorf("kernel %q: want %q or a version such as 6.12", name, Newest)
	}
	dir := filepath.Join(cache, "kernels")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create kernel cache: %w", err)
	}
	unlock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()

	link := filepath.Join(dir, name)
	if !exists(filepath.Join(link, "vmlinuz")) {
		script := aptScript + fetchScript + "set -e -o pipefail\nfetch_kernel \"$@\"\n"
		if _, err := output(exec.CommandContext(ctx, "bash", "-c", script, "fetch", dir, name)); err != nil {
			return nil, fmt.Errorf("fetch kernel %s: %w", name, err)
		}
	}
	// The release's own directory rather than the link: a later fetch may move the link under a running guest.
	root, err := filepath.EvalSymlinks(link)
	if err != nil {
		return nil, fmt.Errorf("find kernel %s: %w", name, err)
	}
	release := filepath.Base(root)
	return &Kernel{
		Release: release,
		Image:   filepath.Join(root, "vmlinuz"),
		Modules: filepath.Join(root, "lib", "modules", release),
	}, nil
}

// moduleFiles returns the paths of modules and all that they need, in the order of loading. A module that is built
// into the kernel gives none.
func (k *Kernel) moduleFiles(names ...string) ([]string, error) {
	list, err := os.ReadFile(filepath.Join(k.Modules, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("read module list: %w", err)
	}
	var files []string
	for _, name := range names {
		for _, line := range strings.Split(string(list), "\n") {
			file, needs, _ := strings.Cut(line, ":")
			if base, _, _ := strings.Cut(filepath.Base(file), "."); base != name {
				continue
			}
			chain := append([]string{file}, strings.Fields(needs)...) // the deepest last
			for i := len(chain) - 1; i >= 0; i-- {
				if path := filepath.Join(k.Modules, chain[i]); !slices.Contains(files, path) {
					files = append(files, path)
				}
			}
		}
	}
	return files, nil
}

// readModule returns the module in file, unpacked.
func readModule(file string) ([]byte, error) {
	var cmd *exec.Cmd
	switch filepath.Ext(file) {
	case ".xz":
		cmd = exec.Command("busybox", "xzcat", file)
	case ".zst":
		cmd = exec.Command("zstd", "-dcq", file)
	default:
		return os.ReadFile(file)
	}
	out, err := output(cmd)
	return []byte(out), err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// output runs cmd and returns what it printed; its error carries the last of what it complained about.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		if len(said) > 1000 {
			said = "…" + said[len(said)-1000:]
		}
		return "", fmt.Errorf("run %s: %w: %s", filepath.Base(cmd.Path), err, said)
	}
	return stdout.String(), nil
}

// lockFile takes the exclusive lock of file and waits for it.
func lockFile(file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", file, err)
	}
	return func() { f.Close() }, nil
}
