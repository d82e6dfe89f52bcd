package machine

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestArchive(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip("needs busybox to read the archive: make check installs it")
	}
	var a archive
	a.dir("dir")
	a.file("dir/odd", []byte("odd"))
	a.file("dir/none", nil)
	a.file("dir/even", []byte("even\n12"))
	f, err := a.memfd()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("busybox", "cpio", "-i")
	cmd.Dir = t.TempDir()
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v: %s", err, out)
	}
	for name, want := range map[string]string{"odd": "odd", "none": "", "even": "even\n12"} {
		if got, err := os.ReadFile(filepath.Join(cmd.Dir, "dir", name)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestModuleFiles(t *testing.T) {
	k := Kernel{Modules: t.TempDir()}
	const list = `kernel/fs/overlayfs/overlay.ko.xz: kernel/lib/top.ko.xz kernel/lib/deep.ko.xz
kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/lib/deep.ko.xz
kernel/fs/fuse/fuse.ko.xz:
kernel/lib/top.ko.xz: kernel/lib/deep.ko.xz
kernel/lib/deep.ko.xz:
`
	if err := os.WriteFile(filepath.Join(k.Modules, "modules.dep"), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	files, err := k.moduleFiles("builtin", "virtiofs", "overlay")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, strings.TrimSuffix(filepath.Base(f), ".ko.xz"))
	}
	if want := []string{"deep", "fuse", "virtiofs", "top", "overlay"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The entries of this distribution get the suite asked for, once; all others are left out.
func TestOtherSuite(t *testing.T) {
	etc := t.TempDir()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(etc, "sources.list.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"sources.list": `# comment
deb [signed-by=/k arch=amd64] http://mirror/debian NAME main contrib
deb http://mirror/debian NAME-updates main
deb http://mirror/debian-security NAME-security main
deb-src http://mirror/debian NAME main
`,
		"sources.list.d/debian.sources": `Types: deb
# a remark
URIs: http://mirror/debian
Suites: NAME NAME-updates
Components: main
Signed-By: /k

Types: deb
URIs: http://mirror/debian-security
Suites: NAME-security
Components: main
`,
		"sources.list.d/other.sources": "Types: deb\nURIs: http://other\nSuites: nodistro\nComponents: main\n",
	}
	// Neither this system's sources nor a mirror are touched: apt-get is replaced by a function.
	script := aptScript + `
		apt-get() { :; }
		codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
		sed -i "s/NAME/$codename/" "$APT_ETC"/sources.list "$APT_ETC"/sources.list.d/*
		private_apt "$1/new" other-suite /dev/null
		cat "$1"/new/sources/*
		echo --
		private_apt "$1/same" "" /dev/null
		for f in sources.list sources.list.d/debian.sources; do
			diff -B "$APT_ETC/$f" "$1/same/sources/"$(basename $f)* && echo same
		done`
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", "-e", "-c", script, "test", dir)
	cmd.Env = append(os.Environ(), "APT_ETC="+etc)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got []string
	for _, line := range strings.Split(string(out), "\n") {
		if line != "" {
			got = append(got, line)
		}
	}
	want := []string{
		"Types: deb", "# a remark", "URIs: http://mirror/debian", "Suites: other-suite", "Components: main", "Signed-By: /k",
		"deb [signed-by=/k arch=amd64] http://mirror/debian other-suite main contrib",
		"--", "same", "same",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLastLines(t *testing.T) {
	var l lastLines
	for i := 0; i < 2*keptLines; i++ {
		l.Write([]byte("line\r\n"))
	}
	l.Write([]byte("[ 1.0] BUG: unable to handle\n[ 1.1] INFO: task fio:12 blocked for more than 120 sec"))
	l.Write([]byte("onds.\nvirtio_loop: bye\npart"))
	if got := l.String(); strings.Count(got, "\n") != keptLines || !strings.HasSuffix(got, "seconds.\nvirtio_loop: bye\npart") {
		t.Errorf("kept %q", got)
	}
	if got, want := l.alarms(), "[ 1.0] BUG: unable to handle\n[ 1.1] INFO: task fio:12 blocked for more than 120 seconds."; got != want {
		t.Errorf("alarms are %q, want %q", got, want)
	}
	if got := l.without("virtio_loop"); strings.Contains(got, "bye") || !strings.HasSuffix(got, "part") {
		t.Errorf("without the end: %q", got)
	}
}

func TestQuote(t *testing.T) {
	const text = "it's \"a\" $HOME `id` \\ \n é"
	out, err := exec.Command("bash", "-c", "printf %s "+quote(text)).Output()
	if err != nil || !bytes.Equal(out, []byte(text)) {
		t.Errorf("the shell read %q, %v", out, err)
	}
}
