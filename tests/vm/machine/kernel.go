package machine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Newest names the newest kernel of the backports suite in Fetch and Config.Kernel.
const Newest = "newest"

// newestSuite is where Newest comes from: it follows the kernel's own releases within a few weeks.
const newestSuite = "trixie-backports"

// Kernel is an unpacked kernel in the cache.
type Kernel struct {
	Release string // as uname -r says it
	Image   string // path of the bzImage
	Modules string // path of the directory that belongs at /lib/modules/Release
}

var (
	kernelName = regexp.MustCompile(`^(newest|\d+\.\d+)$`)
	imageName  = regexp.MustCompile(`^linux-image-(\d+\.\d+\.\S*-cloud-amd64)$`)
)

// Fetch returns the kernel called name: "newest", or a version such as "6.12", of which the latest package counts.
// Its packages are downloaded through the mirrors that the system's own apt sources name, the first time only:
// the version found then stays in cache until the directory kernels/name is removed. The system's own apt state is
// neither used nor changed.
func Fetch(cache, name string) (*Kernel, error) {
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
	if _, err := os.Stat(link); err != nil {
		release, err := download(dir, name)
		if err != nil {
			return nil, fmt.Errorf("fetch kernel %s: %w", name, err)
		}
		os.Remove(link) // a link to a kernel that was removed
		if err := os.Symlink(release, link); err != nil {
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

// download unpacks the latest package of the kernel called name into dir/RELEASE and returns the release.
func download(dir, name string) (string, error) {
	suites := []string{"", newestSuite}
	prefix := name + "."
	if name == Newest {
		suites, prefix = suites[1:], ""
	}
	for _, suite := range suites {
		private := filepath.Join(dir, "apt")
		if err := os.RemoveAll(private); err != nil {
			return "", fmt.Errorf("clear apt directory: %w", err)
		}
		defer os.RemoveAll(private)
		apt, err := newAptSource(private, suite)
		if err != nil {
			return "", err
		}
		names, err := apt.cache("pkgnames", "linux-image-")
		if err != nil {
			return "", err
		}
		var releases []string
		for _, pkg := range strings.Fields(names) {
			if m := imageName.FindStringSubmatch(pkg); m != nil && strings.HasPrefix(m[1], prefix) {
				releases = append(releases, m[1])
			}
		}
		if len(releases) == 0 {
			continue
		}
		sort.Slice(releases, func(i, j int) bool { return versionLess(releases[i], releases[j]) })
		release := releases[len(releases)-1]
		return release, apt.unpack(dir, release)
	}
	return "", errors.New("no such package in the suites of this system's apt sources nor in " + newestSuite)
}

// versionLess orders releases by their numbers: 6.12.9 before 6.12.10.
func versionLess(a, b string) bool {
	number := regexp.MustCompile(`\d+`)
	x, y := number.FindAllString(a, -1), number.FindAllString(b, -1)
	for i := 0; i < len(x) && i < len(y); i++ {
		m, _ := strconv.Atoi(x[i])
		n, _ := strconv.Atoi(y[i])
		if m != n {
			return m < n
		}
	}
	return len(x) < len(y)
}

// aptSource is apt with a configuration and state of its own.
type aptSource struct {
	dir  string
	opts []string
}

// newAptSource reads the package lists of suite, or of the system's own suites if it is empty.
func newAptSource(dir, suite string) (*aptSource, error) {
	for _, sub := range []string{"sources", "lists/partial", "cache/archives/partial", "download"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("create apt directory: %w", err)
		}
	}
	apt := &aptSource{dir: dir, opts: []string{
		"-q", "-o", "Dir::Etc::SourceList=/dev/null",
		"-o", "Dir::Etc::SourceParts=" + dir + "/sources",
		"-o", "Dir::State::Lists=" + dir + "/lists",
		"-o", "Dir::State::status=/dev/null",
		"-o", "Dir::Cache=" + dir + "/cache",
		"-o", "Acquire::Languages=none",
		"-o", "APT::Sandbox::User=root", // the cache may lie where the user _apt cannot go
	}}
	if err := writeSources(filepath.Join(dir, "sources"), suite); err != nil {
		return nil, err
	}
	if _, err := apt.run("apt-get", "update"); err != nil {
		return nil, err
	}
	return apt, nil
}

// writeSources copies the system's apt sources into dir. If suite is given, only Debian's own entries are copied,
// with that suite in place of theirs.
func writeSources(dir, suite string) error {
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*.sources")
	lists, _ := filepath.Glob("/etc/apt/sources.list.d/*.list")
	files = append(append(files, lists...), "/etc/apt/sources.list")
	found := false
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return fmt.Errorf("read apt sources: %w", err)
		}
		name := filepath.Base(file)
		if name == "sources.list" {
			name = "system.list"
		}
		if strings.HasSuffix(name, ".sources") {
			text = moveStanzas(text, suite)
		} else {
			text = moveLines(text, suite)
		}
		found = found || len(text) > 0
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return fmt.Errorf("write apt sources: %w", err)
		}
	}
	if !found {
		return errors.New("no Debian entry in /etc/apt/sources.list and /etc/apt/sources.list.d")
	}
	return nil
}

// debianSuite matches the suites that lie beside the backports on every mirror (security has a tree of its own).
var debianSuite = regexp.MustCompile(`^(bookworm|trixie|stable|oldstable)(-updates|-backports)?$`)

// moveStanzas puts suite into every stanza of a deb822 file that has one of Debian's suites, and drops the others.
func moveStanzas(text []byte, suite string) []byte {
	if suite == "" {
		return text
	}
	var out []string
	for _, stanza := range regexp.MustCompile(`\n\s*\n`).Split(string(text), -1) {
		ours, binary := false, false
		var lines []string
		for _, line := range strings.Split(stanza, "\n") {
			key, value, _ := strings.Cut(line, ":")
			switch strings.ToLower(key) {
			case "suites":
				for _, s := range strings.Fields(value) {
					ours = ours || debianSuite.MatchString(s)
				}
				line = "Suites: " + suite
			case "types":
				binary = strings.Contains(" "+value+" ", " deb ")
				line = "Types: deb"
			}
			if !strings.HasPrefix(line, "#") {
				lines = append(lines, line)
			}
		}
		if ours && binary {
			out = append(out, strings.Join(lines, "\n"))
		}
	}
	if len(out) == 0 {
		return nil
	}
	return []byte(strings.Join(out, "\n\n") + "\n")
}

// moveLines does for the one-line format what moveStanzas does for deb822.
func moveLines(text []byte, suite string) []byte {
	if suite == "" {
		return text
	}
	line := regexp.MustCompile(`^deb\s+((?:\[[^\]]*\]\s+)?\S+)\s+(\S+)\s+(.*)$`)
	var out bytes.Buffer
	seen := map[string]bool{}
	for _, l := range strings.Split(string(text), "\n") {
		m := line.FindStringSubmatch(strings.TrimSpace(l))
		if m == nil || !debianSuite.MatchString(m[2]) {
			continue
		}
		moved := fmt.Sprintf("deb %s %s %s\n", m[1], suite, m[3])
		if !seen[moved] { // bookworm and bookworm-updates become the same line
			seen[moved] = true
			out.WriteString(moved)
		}
	}
	return out.Bytes()
}

func (a *aptSource) cache(args ...string) (string, error) { return a.run("apt-cache", args...) }

func (a *aptSource) run(tool string, args ...string) (string, error) {
	cmd := exec.Command(tool, append(a.opts[:len(a.opts):len(a.opts)], args...)...)
	cmd.Dir = filepath.Join(a.dir, "download")
	return output(cmd)
}

// unpack makes dir/release out of the kernel's packages: the image, and whatever it was split into.
func (a *aptSource) unpack(dir, release string) error {
	deps, err := a.cache("depends", "--important", "linux-image-"+release)
	if err != nil {
		return err
	}
	packages := []string{"linux-image-" + release}
	for _, word := range strings.Fields(deps) {
		if word != packages[0] && strings.HasSuffix(word, "-"+release) {
			packages = append(packages, word)
		}
	}
	if _, err := a.run("apt-get", append([]string{"download"}, packages...)...); err != nil {
		return err
	}

	root := filepath.Join(dir, release)
	part := root + ".part"
	if err := os.RemoveAll(part); err != nil {
		return fmt.Errorf("clear kernel directory: %w", err)
	}
	debs, _ := filepath.Glob(filepath.Join(a.dir, "download", "*.deb"))
	for _, deb := range debs {
		if _, err := output(exec.Command("dpkg-deb", "-x", deb, part)); err != nil {
			return err
		}
	}
	// Newer packages keep the modules in /usr/lib, where depmod does not look, and the image among them.
	if merged := filepath.Join(part, "usr/lib/modules"); exists(merged) {
		if err := os.MkdirAll(filepath.Join(part, "lib"), 0o755); err != nil {
			return err
		}
		if err := os.Rename(merged, filepath.Join(part, "lib/modules")); err != nil {
			return err
		}
	}
	image := filepath.Join(part, "boot/vmlinuz-"+release)
	if !exists(image) {
		image = filepath.Join(part, "lib/modules", release, "vmlinuz")
	}
	if err := os.Rename(image, filepath.Join(part, "vmlinuz")); err != nil {
		return err
	}
	if _, err := output(exec.Command("depmod", "-b", part, release)); err != nil {
		return err
	}
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	return os.Rename(part, root)
}

// moduleFiles returns the paths of module name and all that it needs, in the order of loading. A module that is
// built into the kernel, or not there, gives none.
func (k *Kernel) moduleFiles(name string) ([]string, error) {
	deps, err := os.ReadFile(filepath.Join(k.Modules, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("read module list: %w", err)
	}
	for _, line := range strings.Split(string(deps), "\n") {
		file, needs, _ := strings.Cut(line, ":")
		base, _, _ := strings.Cut(filepath.Base(file), ".")
		if base != name {
			continue
		}
		files := []string{filepath.Join(k.Modules, file)}
		for _, need := range strings.Fields(needs) { // listed with the deepest last
			files = append([]string{filepath.Join(k.Modules, need)}, files...)
		}
		return files, nil
	}
	return nil, nil
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
