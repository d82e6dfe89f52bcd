package docs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// notRun are the commands of the texts that no test runs, because they need a network, a restart of the machine, or
// another machine.
var notRun = []string{
	"make demo     # the whole story on a real device, step by step",
	"make test     # everything that must hold",
	"make deb                                        # or rpm; ARCH=arm64 for that processor",
	"apt install ./bin/ublk-blksnap_*.deb",
	"reboot",
	"ublk-blksnap add /dev/vg0/root --name root", // make root
	"ublk-blksnap snapshot create root --name nightly --storage /mnt/store --take",
}

// pages are the texts for people who use the program.
func pages(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(root, "docs/*.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := []string{"README.md"}
	for _, name := range found {
		all = append(all, "docs/"+filepath.Base(name))
	}
	return all
}

func blocks(t *testing.T, page string) []block {
	t.Helper()
	if page == picture {
		return []block{pictureBlock(t)}
	}
	all, err := blocksOf(text(t, page))
	if err != nil {
		t.Fatalf("%s: %v", page, err)
	}
	return all
}

// TestNotRun: what is marked as not to be run is what the list says, no more and no less.
func TestNotRun(t *testing.T) {
	seen := map[string]bool{}
	for _, page := range pages(t) {
		for _, b := range blocks(t, page) {
			if _, err := b.steps(); err != nil {
				t.Errorf("%s: %v", page, err)
			}
			for i, line := range b.lines {
				if !b.notRun || line == "" {
					continue
				}
				seen[line] = true
				if !slices.Contains(notRun, line) {
					t.Errorf("%s:%d: %q is marked as not to be run: let it run, or put it on the list", page, b.line+i, line)
				}
			}
		}
	}
	for _, line := range notRun {
		if !seen[line] {
			t.Errorf("no text has %q", line)
		}
	}
}

// TestBlocks: what a text's blocks are taken for.
func TestBlocks(t *testing.T) {
	all, err := blocksOf("Text:\n\n    one\n    two\n\nmore\n    no block\n\n- item\n\n      three\n\n```console\n# four\na …  b\n```\n```ini\nx = 1\n```\n```sh not-run\nfive\n```\n")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, b := range all {
		got = append(got, fmt.Sprint(b.line, b.kind, b.notRun, strings.Join(b.lines, "|")))
	}
	want := []string{"3 sh false one|two", "11 sh false three", "14 console false # four|a …  b", "21 sh true five"}
	for i := range want {
		want[i] = strings.Replace(want[i], " sh ", "sh", 1)
		want[i] = strings.Replace(want[i], " console ", "console", 1)
		want[i] = strings.Replace(strings.Replace(want[i], "false ", "false", 1), "true ", "true", 1)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	steps, err := all[2].steps()
	if err != nil || len(steps) != 1 || !steps[0].matches("a lot of      b\n") || steps[0].matches("a b c\n") {
		t.Errorf("%+v, %v", steps, err)
	}
	for _, wrong := range []string{"```\nx\n```\n", "```sh\nx\n"} {
		if _, err := blocksOf(wrong); err == nil {
			t.Errorf("%q is taken", wrong)
		}
	}
}

// TestCommands runs every command of the texts, each text on a machine as it is after "make install": with a systemd, and
// two disks that nobody uses, /dev/vdb of 64 MiB with an empty filesystem, and /dev/vdc of 128 MiB.
func TestCommands(t *testing.T) {
	if comm, _ := os.ReadFile("/proc/1/comm"); os.Getenv("UBLK_BLKSNAP_VM") != "1" || string(comm) != "systemd\n" {
		t.Skip("needs a machine of its own with systemd: make docs")
	}
	bash(t, "make -C ../.. -o build install && systemctl daemon-reload && udevadm control --reload")
	bash(t, "modprobe -a ublk_drv dm_mod")
	// The README that is installed leads to the pages beside it.
	bash(t, "cd /usr/local/share/doc/ublk-blksnap && grep -o '(docs/[^)#]*' README.md | tr -d '(' | xargs ls -d")
	for _, page := range append(pages(t), picture) {
		t.Run(filepath.Base(page), func(t *testing.T) { runPage(t, page) })
	}
	bash(t, "make -C ../.. uninstall")
	if left, _ := exec.Command("bash", "-c", "ls -d /usr/local/sbin/*blksnap /etc/systemd/system/*blksnap* /etc/udev/rules.d/*blksnap* /run/ublk-blksnap").Output(); len(left) > 0 {
		t.Errorf("left by make uninstall: %s", left)
	}
}

// before and after stand around the commands of a text. They are short, because each program takes its time in an emulated
// machine.
const (
	before = `
		for disk in vdb vdc; do [[ $(<"/sys/block/$disk/serial") == docs? ]]; done
		wipefs -qa /dev/vdb /dev/vdc
		mkfs.ext4 -q /dev/vdb
		mkdir -p /srv /mnt /backup
		mount -t tmpfs tmp /var/tmp
		>/etc/fstab`
	after = `
		cd /
		for point in $(findmnt -rno TARGET,SOURCE | sed -n 's,\(.*\) /dev/\(ublkb\|vd\|mapper/\|loop\).*,\1,p'); do umount "$point"; done
		for id in $(blksnap snapshot_collect); do ublk-blksnap snapshot destroy $id; done
		ublk-blksnap daemon stop
		[ ! -e /dev/vg0 ] || vgremove -qqf vg0
		[ ! -e /etc/systemd/system/backup-data.timer ] || systemctl disable -q --now backup-data.timer
		rm -f /etc/systemd/system/{backup-data.*,*.wants/ublk-blksnap.service}
		rm -rf /etc/ublk-blksnap.d /backup /var/lib/ublk-blksnap
		umount /var/tmp
		true`
)

// patience is how long a page may take: it says that something hangs.
const patience = 10 * time.Minute

func runPage(t *testing.T, page string) {
	var steps []step
	for _, b := range blocks(t, page) {
		if b.notRun {
			continue
		}
		s, err := b.steps()
		if err != nil {
			t.Fatal(err)
		}
		steps = append(steps, s...)
	}
	if len(steps) == 0 {
		return
	}
	dir := t.TempDir()
	bash(t, "set -e"+before)
	defer bash(t, after)

	// All in one shell, so that a variable is known later on. Where the text says what is printed, that decides, so
	// that it may show a refusal.
	var script strings.Builder
	fmt.Fprintf(&script, "cd %s\n", root)
	for i, s := range steps {
		form := "{\n%s\n} >%s/%d 2>&1 </dev/null\n"
		if s.prints {
			form = "set +e\n" + form + "set -e\n"
		}
		fmt.Fprintf(&script, "echo %d >%s/at\n"+form, i, dir, s.script, dir, i)
	}
	file := filepath.Join(dir, "script")
	if err := os.WriteFile(file, []byte(script.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	said, err := exec.CommandContext(ctx, "bash", "-e", "-o", "pipefail", file).CombinedOutput()
	last := len(steps) - 1
	if err != nil {
		at, _ := os.ReadFile(filepath.Join(dir, "at"))
		_, _ = fmt.Sscan(string(at), &last)
		out, _ := os.ReadFile(fmt.Sprintf("%s/%d", dir, last))
		t.Errorf("%s:%d: %v\n%s\nprints\n%s%s", page, steps[last].line, err, steps[last].script, out, said)
		journal, _ := exec.Command("journalctl", "-u", "ublk-blksnap", "-n", "20", "-o", "cat").Output()
		t.Logf("the daemon's log:\n%s", journal)
	}
	for i, s := range steps[:last+1] {
		out, _ := os.ReadFile(fmt.Sprintf("%s/%d", dir, i))
		if s.prints && !s.matches(string(out)) {
			t.Errorf("%s:%d: %s\nprints\n%sthe text shows\n%s", page, s.line, s.script, out, strings.Join(s.output, "\n"))
		}
	}
}

func bash(t *testing.T, script string) {
	t.Helper()
	if out, err := exec.Command("bash", "-o", "pipefail", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
}
