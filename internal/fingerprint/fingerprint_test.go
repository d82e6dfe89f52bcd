package fingerprint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// image makes a sparse file of size bytes with the given commands, in which %s is
// the file.
func image(t testing.TB, size int64, commands ...string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		c = strings.ReplaceAll(c, "%s", f.Name())
		cmd := exec.Command("bash", "-c", c)
		cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c, err, out)
		}
	}
	return f
}

func read(t testing.TB, f *os.File) []Place {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	places, err := Read(context.Background(), f, st.Size(), 512)
	if err != nil {
		t.Fatal(err)
	}
	return places
}

func flip(t testing.TB, f *os.File, at int64) {
	t.Helper()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, f *os.File, at int64, parts ...any) {
	t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		if s, ok := p.(string); ok {
			p = []byte(s)
		}
		if err := binary.Write(&b, binary.LittleEndian, p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(b.Bytes(), at); err != nil {
		t.Fatal(err)
	}
}

// disk is an image by what it holds, and places that must be found there.
type disk struct {
	name string
	make func(t testing.TB) *os.File
	want []string
}

var disks = []disk{
	{"nothing", func(t testing.TB) *os.File { return image(t, 8<<20) }, nil},
	{"less than a MiB", func(t testing.TB) *os.File { return image(t, 5*512) }, nil},
	{"ext4", func(t testing.TB) *os.File { return image(t, 1<<30, "mkfs.ext4 -q -F -b 4096 %s") },
		[]string{"ext superblock", "ext superblock copy in group 1", "ext superblock copy in group 3", "ext superblock copy in group 5", "ext superblock copy in group 7", "ext journal head"}},
	{"ext3 in small blocks", func(t testing.TB) *os.File { return image(t, 64<<20, "mkfs.ext3 -q -F -b 1024 %s") },
		[]string{"ext superblock", "ext superblock copy in group 1", "ext superblock copy in group 3", "ext journal head"}},
	{"ext2", func(t testing.TB) *os.File {
		return image(t, 64<<20, "mkfs.ext2 -q -F -O ^sparse_super,^resize_inode -b 1024 %s")
	},
		[]string{"ext superblock", "ext superblock copy in group 1", "ext superblock copy in group 2"}},
	{"ext4 with two copies", func(t testing.TB) *os.File { return image(t, 1<<30, "mkfs.ext4 -q -F -O sparse_super2 -b 4096 %s") },
		[]string{"ext superblock", "ext superblock copy in group 1", "ext superblock copy in group 7"}},
	{"xfs", func(t testing.TB) *os.File { return image(t, 400<<20, "mkfs.xfs -q -f %s") },
		[]string{"xfs superblock", "xfs headers of allocation group 0", "xfs headers of allocation group 3", "xfs log head", "xfs log start"}},
	{"btrfs", func(t testing.TB) *os.File { return image(t, 300<<20, "mkfs.btrfs -q -f %s") },
		[]string{"btrfs superblock 0", "btrfs superblock 1"}},
	{"swap", func(t testing.TB) *os.File { return image(t, 8<<20, "mkswap %s") }, []string{"swap header"}},
	{"GPT", func(t testing.TB) *os.File {
		f := image(t, 600<<20, `printf 'label: gpt\n start=2048 size=262144\n start=264192 size=819200\n' | sfdisk -q %s`)
		in(t, f, 1<<20, 128<<20, "mkfs.ext4 -q -F %s")
		in(t, f, 129<<20, 400<<20, "mkfs.xfs -q -f %s")
		return f
	}, []string{"MBR", "GPT", "GPT entries", "backup GPT", "backup GPT entries", "partition 1: ext superblock", "partition 1: first MiB", "partition 1: last MiB", "partition 2: xfs log head", "partition 2: last MiB"}},
	{"MBR", func(t testing.TB) *os.File {
		f := image(t, 300<<20, `printf 'label: dos\n start=2048 size=65536\n start=67584 size=524288 type=5\n start=69632 size=65536\n start=137216 size=65536\n' | sfdisk -q %s`)
		in(t, f, 34<<20, 32<<20, "mkfs.ext4 -q -F %s")
		in(t, f, 137216*512, 32<<20, "mkfs.ext2 -q -F %s")
		return f
	}, []string{"MBR", "partition 1: first MiB", "table of partition 5", "partition 5: ext superblock", "table of partition 6", "partition 6: ext superblock"}},
	{"f2fs", func(t testing.TB) *os.File { return image(t, 64<<20, "mkfs.f2fs -q -f %s") },
		[]string{"f2fs superblock 0", "f2fs superblock 1", "f2fs checkpoint 0", "f2fs checkpoint 1"}},
	{"LUKS1", func(t testing.TB) *os.File { return image(t, 64<<20, luksFormat+" --type luks1 %s") },
		[]string{"LUKS header", "head of the encrypted data"}},
	{"LUKS2", func(t testing.TB) *os.File { return image(t, 64<<20, luksFormat+" --type luks2 %s") },
		[]string{"LUKS header", "second LUKS header", "head of the encrypted data"}},
	{"LVM", lvmDisk, []string{"LVM label", "head of LVM metadata", "volume root: ext superblock", "volume root: first 128 KiB", "volume wide: head"}},
	{"md mirror", func(t testing.TB) *os.File {
		f := image(t, 64<<20)
		put(t, f, 4096, uint32(0xa92b4efc), uint32(1))
		put(t, f, 4096+72, uint32(1))
		put(t, f, 4096+128, uint64(4096), uint64(32<<20>>9))
		in(t, f, 2<<20, 32<<20, "mkfs.ext4 -q -F %s")
		return f
	}, []string{"md superblock", "md: ext superblock", "md: last 128 KiB"}},
	{"md 0.90", func(t testing.TB) *os.File {
		f := image(t, 64<<20)
		put(t, f, 64<<20-64<<10, uint32(0xa92b4efc))
		return f
	}, []string{"md superblock"}},
}

const luksFormat = "echo key | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000"

// in makes something in a part of the disk f.
func in(t testing.TB, f *os.File, at, size int64, commands ...string) {
	t.Helper()
	part := image(t, size, commands...)
	b := make([]byte, size)
	if _, err := part.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// lvmDisk has a linear volume of one extent of 32 MiB, and a part of a striped one.
func lvmDisk(t testing.TB) *os.File {
	f := image(t, 128<<20)
	const uuid = "abcdefghijklmnopqrstuvwxyz012345"
	text := `vg {
id = "x"
extent_size = 65536		# 32 Megabytes
physical_volumes {

pv0 {
id = "other0-ghij-klmn-opqr-stuv-wxyz-012345"
device = "/dev/sdb"
pe_start = 4096
}
pv1 {
id = "abcdef-ghij-klmn-opqr-stuv-wxyz-012345"
device = "/dev/sda"
pe_start = 2048
}
}

logical_volumes {

root {
id = "y"
segment1 {
start_extent = 0
extent_count = 1	# 32 Megabytes

type = "striped"
stripe_count = 1	# linear

stripes = [
"pv1", 1
]
}
}

wide {
segment1 {
start_extent = 0
extent_count = 2
type = "striped"
stripe_count = 2
stripes = [
"pv0", 0,
"pv1", 2
]
}
}
}
}
`
	put(t, f, 512, "LABELONE", uint64(1), uint32(0), uint32(32), "LVM2 001", uuid, uint64(128<<20),
		uint64(1<<20), uint64(0), uint64(0), uint64(0), uint64(4096), uint64(1<<20-4096), uint64(0), uint64(0))
	put(t, f, 4096, uint32(0), " LVM2 x[5A%r0N*>", uint32(1), uint64(4096), uint64(1<<20-4096), uint64(1024), uint64(len(text)))
	put(t, f, 4096+1024, text)
	in(t, f, 33<<20, 32<<20, "mkfs.ext4 -q -F %s")
	return f
}

// TestPlaces: a change of one byte in any place is seen.
func TestPlaces(t *testing.T) {
	for _, d := range disks {
		t.Run(d.name, func(t *testing.T) {
			f := d.make(t)
			before := read(t, f)
			if diff := Difference(before, read(t, f)); diff != "" {
				t.Fatalf("read twice it differs: %s", diff)
			}
			for _, name := range append([]string{"first MiB", "last MiB"}, d.want...) {
				if !slices.ContainsFunc(before, func(p Place) bool { return p.Name == name }) {
					t.Errorf("no place %q in %v", name, names(before))
				}
			}
			for n, p := range before {
				if testing.Short() && n%5 != 0 {
					continue
				}
				at := []int64{p.Offset, p.Offset + p.Length/2, p.Offset + p.Length - 1}[n%3]
				flip(t, f, at)
				if Difference(before, read(t, f)) == "" {
					t.Errorf("a change of %s at byte %d is not seen", p.Name, at)
				}
				flip(t, f, at)
			}
			if diff := Difference(before, read(t, f)); diff != "" {
				t.Errorf("as before it differs: %s", diff)
			}
		})
	}
}

func names(places []Place) (out []string) {
	for _, p := range places {
		out = append(out, fmt.Sprintf("%s@%d+%d", p.Name, p.Offset, p.Length))
	}
	return out
}

// TestDifferenceNamesThePlace: the superblock, not the MiB that it lies in.
func TestDifferenceNamesThePlace(t *testing.T) {
	n := slices.IndexFunc(disks, func(d disk) bool { return d.name == "GPT" })
	f := disks[n].make(t)
	before := read(t, f)
	flip(t, f, 1<<20+1024+0x30)
	if got := Difference(before, read(t, f)); got != "partition 1: ext superblock" {
		t.Errorf("a changed superblock of the first partition is called %q", got)
	}
	if got := Difference(before, before[1:]); got != before[0].Name {
		t.Errorf("a missing place is called %q", got)
	}
	if got := Difference(before[1:], before); got != before[0].Name {
		t.Errorf("a new place is called %q", got)
	}
}

// TestWhatIsNotLookedAt is in README and docs/change-tracking.md: a write to the middle of a file.
func TestWhatIsNotLookedAt(t *testing.T) {
	f := image(t, 1<<30, "mkfs.ext4 -q -F %s")
	before := read(t, f)
	flip(t, f, 700<<20)
	if diff := Difference(before, read(t, f)); diff != "" {
		t.Errorf("%s", diff)
	}
}

type failing struct{ at int64 }

func (r failing) ReadAt(b []byte, off int64) (int, error) {
	if off <= r.at && r.at < off+int64(len(b)) {
		return 0, errors.New("broken")
	}
	return len(b), nil
}

func TestReadError(t *testing.T) {
	for _, at := range []int64{0, 3000, 9 << 20} {
		if _, err := Read(context.Background(), failing{at}, 9<<20+1, 512); err == nil {
			t.Errorf("an error at %d is lost", at)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Read(ctx, failing{-1}, 9<<20, 512); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

// sparse is a disk of which a fuzzer chooses the beginning.
type sparse struct{ b []byte }

func (r sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(r.b)) {
		copy(p, r.b[off:])
	}
	return len(p), nil
}

// FuzzRead: whatever a disk holds is read within bounds, and twice the same.
func FuzzRead(f *testing.F) {
	for _, d := range disks {
		img := d.make(f)
		b := make([]byte, 16<<10)
		n, _ := img.ReadAt(b, 0)
		f.Add(b[:n], int64(64<<20))
	}
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < 0 || size > 1<<50 {
			return
		}
		a, err := Read(context.Background(), sparse{b}, size, 512)
		if err != nil && !errors.Is(err, ErrTooMany) {
			t.Fatal(err)
		}
		for _, p := range a {
			if p.Offset < 0 || p.Length <= 0 || p.Offset+p.Length > size {
				t.Fatalf("%+v is not within %d", p, size)
			}
		}
	})
}

// TestRunning: what a filesystem changes while it is mounted does not show, unlike what a
// mount, a check and a tune change.
func TestRunning(t *testing.T) {
	running := func(f *os.File) []Place {
		t.Helper()
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		places, err := Running(context.Background(), f, st.Size(), 512)
		if err != nil || len(places) == 0 {
			t.Fatalf("%v, %v", places, err)
		}
		return places
	}
	const size = 32 * mib
	for _, c := range []struct {
		make        string
		live, shows []int64 // bytes
	}{
		{"mkfs.ext4 -q -F %s", []int64{0, 1024 + 0xe8, 1024 + 0x178, 1024 + 0x3ff, 4096, 1 * mib, size - 1},
			[]int64{1024 + 0x2c, 1024 + 0x30, 1024 + 0x34, 1024 + 0x3a, 1024 + 0x60, 1024 + 0x78}},
		{"true", []int64{4096, mib, size - 1}, []int64{0, 1024, 4095}},
		{"mkswap %s", []int64{4096, mib}, []int64{1024, 4086}},
		{"mkfs.ext4 -q -F -E offset=1048576 %s 16M; echo 2048,32768 | sfdisk -q %s", []int64{512, mib, mib + 4096, 20 * mib}, []int64{450, mib + 1024 + 0x34}},
	} {
		f := image(t, size, c.make)
		before := running(f)
		for _, at := range c.live {
			flip(t, f, at)
			if place := Difference(before, running(f)); place != "" {
				t.Errorf("%s: %s shows that byte %d has changed", c.make, place, at)
			}
			flip(t, f, at)
		}
		for _, at := range c.shows {
			flip(t, f, at)
			if Difference(before, running(f)) == "" {
				t.Errorf("%s: it does not show that byte %d has changed", c.make, at)
			}
			flip(t, f, at)
		}
	}
}
