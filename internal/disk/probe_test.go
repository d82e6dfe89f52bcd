package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
)

// TestMain is a prober's process too.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "probe" {
		if ServeProbes(3, os.Args[2]) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// image is a file of 16 MiB of zeroes but for what is put into it.
func image(t *testing.T, put map[int64]string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(16 << 20); err != nil {
		t.Fatal(err)
	}
	for at, s := range put {
		if _, err := f.WriteAt([]byte(s), at); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// TestProbe has what a look at the beginning alone does not find.
func TestProbe(t *testing.T) {
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, c := range []struct {
		want string
		put  map[int64]string
	}{
		{"", nil},
		{"", map[int64]string{1 << 20: "anything"}},
		{"squashfs", map[int64]string{0: "hsqs\x00\x00\x00\x00", 28: "\x04\x00\x00\x00"}},
		{"iso9660", map[int64]string{0x8000: "\x01CD001\x01", 0x8800: "\xffCD001\x01"}},
		{"swsuspend", map[int64]string{4096 - 10: "S1SUSPEND\x00"}},
		{"erofs", map[int64]string{1024: "\xe2\xe1\xf5\xe0", 1024 + 12: "\x0c"}},
		{"crypto_LUKS", map[int64]string{0x4000: "SKUL\xba\xbe\x00\x02", 0x4000 + 0x100: string(binary.BigEndian.AppendUint64(nil, 0x4000))}},
		{"linux_raid_member", map[int64]string{
			16<<20 - 8<<10:       "\xfc\x4e\x2b\xa9\x01\x00\x00\x00",
			16<<20 - 8<<10 + 144: string(binary.LittleEndian.AppendUint64(nil, (16<<20-8<<10)/512)),
		}},
		{"a partition table (dos)", map[int64]string{446: "\x00\x00\x02\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x10\x00\x00", 510: "\x55\xaa"}},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		got, err := p.Probe(ctx, image(t, c.put))
		cancel()
		if err != nil || got != c.want {
			t.Errorf("%q: found %q, %v", c.want, got, err)
		}
	}
	// Two at once are none to choose from.
	two := image(t, map[int64]string{0: "hsqs\x00\x00\x00\x00", 28: "\x04\x00\x00\x00", 4096 - 10: "SWAPSPACE2", 1024: "\x01\x00\x00\x00\xff\x00\x00\x00"})
	if got, err := p.Probe(context.Background(), two); err == nil || !strings.Contains(err.Error(), "several formats") {
		t.Errorf("squashfs and swap: %q, %v", got, err)
	}
}

// TestLate: what did not begin in time ends as soon as it has begun, and it is told if instead its
// prober has died.
func TestLate(t *testing.T) {
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	late := func() *Late {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		_, err := p.Claim(ctx, fifo) // there is no writer
		var l *Late
		if !errors.As(err, &l) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("not late: %v", err)
		}
		select {
		case <-l.ended:
			t.Error("ended before it began")
		case <-time.After(50 * time.Millisecond):
		}
		return l
	}
	first := late()
	writer, err := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if first.Died() {
		t.Error("it has ended, and the prober is said to have died")
	}
	writer.Close()
	second := late()
	if err := unix.Kill(p.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !second.Died() {
		t.Error("the prober has died")
	}
}

// TestClaim: the prober has the disk open, and nobody else, until the release or the end of
// who has asked for it.
func TestClaim(t *testing.T) {
	p, err := StartProber("ublk-blksnap", "probe", "/")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	path := image(t, nil).Name()
	files := func() []string {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID()))
		if err != nil || len(fds) == 0 {
			t.Fatalf("%v, %v", fds, err)
		}
		return fds
	}
	open := func() bool {
		return slices.ContainsFunc(files(), func(fd string) bool {
			to, err := os.Readlink(fd)
			return err == nil && to == path
		})
	}
	if _, err := p.Claim(ctx, path+"0"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("what is not there: %v", err)
	}
	var before []string // when the runtime has what it keeps open
	for range 8 {
		c, err := p.Claim(ctx, path)
		if err != nil {
			t.Fatal(err)
		}
		if !open() {
			t.Error("the prober does not have it open")
		}
		if !c.Held() {
			t.Error("claimed, and not held")
		}
		if err := c.Release(ctx); err != nil || open() {
			t.Errorf("released: %v, and it is open: %v", err, open())
		}
		if before == nil {
			before = files()
		}
	}
	for len(files()) > len(before) { // the last answer comes before the last is closed
		if ctx.Err() != nil {
			t.Fatalf("the prober has %d files open, and had %d", len(files()), len(before))
		}
		time.Sleep(time.Millisecond)
	}
	// The number of the error would say something else if it were the opening's.
	if _, err := p.Claim(ctx, "/proc/self/comm"); !errors.Is(err, blockdev.ErrUnsynced) || errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "durable: invalid") {
		t.Errorf("what cannot be synced: %v", err)
	}
	c, err := p.Claim(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(p.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Ended()
	if c.Held() {
		t.Error("held by a process that was killed")
	}
	_ = c.Release(ctx)
	p.Close()
	if _, err := p.Claim(ctx, path); !errors.Is(err, ErrGone) {
		t.Errorf("a prober that has ended: %v", err)
	}
}

// TestProbeWithout has no blkid, another program of that name, one that hangs,
// and no process to ask.
func TestProbeWithout(t *testing.T) {
	root := t.TempDir()
	if _, err := Blkid(root, image(t, nil)); !errors.Is(err, ErrNoTool) {
		t.Errorf("without blkid: %v", err)
	}
	p, err := StartProber("ublk-blksnap", "probe", root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Probe(context.Background(), image(t, nil)); !errors.Is(err, ErrNoTool) {
		t.Errorf("without blkid, asked: %v", err)
	}
	p.Close()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		t.Error("the process does not end with who asks it")
	}
	if _, err := p.Probe(context.Background(), image(t, nil)); err == nil {
		t.Error("a prober that has ended answers")
	}
	for _, c := range []struct {
		status    int
		out, said string
	}{
		{0, "", ""}, {0, "TYPE=ext4\n", ""}, {2, "", "error: cannot open"}, {2, "DEVNAME=x\n", ""}, {1, "", ""}, {4, "", ""}, {8, "", ""}, {127, "", ""},
	} {
		if got, err := parseBlkid(c.status, strings.NewReader(c.out), c.said); err == nil {
			t.Errorf("status %d, %q, %q was taken for %q", c.status, c.out, c.said, got)
		}
	}
	if got, err := parseBlkid(0, strings.NewReader("DEVNAME=x\nPART_ENTRY_SCHEME=gpt\nPART_ENTRY_NUMBER=1\n"), ""); got != "" || err != nil {
		t.Errorf("an empty partition is %q, %v", got, err)
	}
	if got, err := parseBlkid(0, strings.NewReader("DEVNAME=x\nNEWS=1\n"), ""); got != "NEWS=1" || err != nil {
		t.Errorf("what is not known is %q, %v", got, err)
	}
}
