package ublk

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// fakeSys is a sysfs with the given attributes and links.
func fakeSys(t *testing.T, files map[string]string, links map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range links {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// nvme is a disk with everything, and a partition of it.
func nvme(change map[string]string) (files, links map[string]string) {
	d := "devices/pci/nvme0n1/"
	files = map[string]string{
		d + "size": "2097153", d + "ro": "0", d + "discard_alignment": "0",
		d + "queue/logical_block_size": "512", d + "queue/physical_block_size": "4096",
		d + "queue/minimum_io_size": "4096", d + "queue/optimal_io_size": "131072",
		d + "queue/discard_max_bytes": "2199023255040", d + "queue/discard_granularity": "512",
		d + "queue/write_zeroes_max_bytes": "131072", d + "queue/rotational": "0",
		d + "queue/write_cache": "write back", d + "queue/fua": "1", d + "queue/zoned": "none",
		d + "queue/dma_alignment": "3", d + "queue/virt_boundary_mask": "4095", d + "queue/stable_writes": "1",
		d + "nvme0n1p1/partition": "1", d + "nvme0n1p1/size": "1000", d + "nvme0n1p1/ro": "1",
		d + "nvme0n1p1/discard_alignment": "256",
	}
	for name, value := range change {
		files[d+name] = value
	}
	return files, map[string]string{
		"dev/block/259:0": "../../devices/pci/nvme0n1",
		"dev/block/259:1": "../../devices/pci/nvme0n1/nvme0n1p1",
	}
}

func TestReadGeometry(t *testing.T) {
	sys := fakeSys(t, func() map[string]string { f, _ := nvme(nil); return f }(), func() map[string]string { _, l := nvme(nil); return l }())
	want := Geometry{
		Size: 2097153 * 512, LogicalBlock: 512, PhysicalBlock: 4096, IOMin: 4096, IOOpt: 131072,
		MaxDiscard: 2199023255040, DiscardGranularity: 512, MaxWriteZeroes: 131072,
		VolatileCache: true, FUA: true, DMAMask: 3, VirtBoundaryMask: 4095, StableWrites: true,
	}
	got, err := readGeometry(sys, 259, 0)
	if err != nil || got != want {
		t.Errorf("disk: %+v, %v, want %+v", got, err, want)
	}
	want.Size, want.ReadOnly, want.DiscardAlignment = 1000*512, true, 256
	got, err = readGeometry(sys, 259, 1)
	if err != nil || got != want {
		t.Errorf("partition: %+v, %v, want %+v", got, err, want)
	}
	if _, err := readGeometry(sys, 8, 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no disk: %v", err)
	}
}

func TestReadGeometryOdd(t *testing.T) {
	read := func(change map[string]string) (Geometry, error) {
		files, links := nvme(change)
		for name, value := range change {
			if value == "" {
				delete(files, "devices/pci/nvme0n1/"+name)
			}
		}
		return readGeometry(fakeSys(t, files, links), 259, 0)
	}
	// What an old kernel or a simple driver lacks has a default.
	g, err := read(map[string]string{
		"queue/dma_alignment": "", "queue/virt_boundary_mask": "", "queue/stable_writes": "", "queue/fua": "", "queue/zoned": "",
		"queue/write_cache": "write through", "queue/rotational": "1", "discard_alignment": "",
	})
	if err != nil || g.DMAMask != 511 || g.VirtBoundaryMask != 0 || g.StableWrites || g.FUA || g.VolatileCache || !g.Rotational {
		t.Errorf("simple disk: %+v, %v", g, err)
	}
	g, err = read(map[string]string{"queue/discard_max_bytes": "18446744073709551615"})
	if err != nil || g.MaxDiscard != math.MaxInt64 {
		t.Errorf("boundless discard: %d, %v", g.MaxDiscard, err)
	}
	if _, err = read(map[string]string{"queue/zoned": "host-managed"}); !errors.Is(err, ErrZoned) {
		t.Errorf("zoned disk: %v", err)
	}
	for _, must := range []string{"size", "ro", "queue/logical_block_size"} {
		if _, err = read(map[string]string{must: ""}); err == nil || !strings.Contains(err.Error(), filepath.Base(must)) {
			t.Errorf("without %s: %v", must, err)
		}
		if _, err = read(map[string]string{must: "many"}); err == nil {
			t.Errorf("%s of \"many\" was taken", must)
		}
	}
}

func TestReadGeometryPath(t *testing.T) {
	for _, path := range []string{"/dev/null", "/", "/nowhere"} {
		if _, err := ReadGeometry(path); err == nil {
			t.Errorf("%s has a geometry", path)
		}
	}
}

func TestParams(t *testing.T) {
	base := Geometry{Size: 1<<30 + 512, LogicalBlock: 512, PhysicalBlock: 4096, IOMin: 4096, DMAMask: 511}
	basic := uapi.UblkParamBasic{LogicalBsShift: 9, PhysicalBsShift: 12, IOMinShift: 12, MaxSectors: 1024, DevSectors: 1<<21 + 1}
	cases := map[string]struct {
		change   func(*Geometry)
		zeroCopy bool
		want     func(*uapi.UblkParams)
	}{
		"plain": {},
		"flags": {
			change: func(g *Geometry) { g.ReadOnly, g.Rotational, g.VolatileCache, g.FUA = true, true, true, true },
			want:   func(p *uapi.UblkParams) { p.Basic.Attrs = 15 },
		},
		"no FUA without a cache": {change: func(g *Geometry) { g.FUA = true }},
		"stripe of three disks": {
			change: func(g *Geometry) { g.IOMin, g.IOOpt = 65536, 3*65536 },
			want:   func(p *uapi.UblkParams) { p.Basic.IOMinShift, p.Basic.IOOptShift = 16, 16 },
		},
		"4k blocks": {
			change: func(g *Geometry) { g.Size, g.LogicalBlock, g.PhysicalBlock, g.IOMin = 1<<30, 4096, 512, 0 },
			want: func(p *uapi.UblkParams) {
				p.Basic.LogicalBsShift, p.Basic.PhysicalBsShift, p.Basic.IOMinShift, p.Basic.DevSectors = 12, 12, 12, 1<<21
			},
		},
		"discard without bounds": {
			change: func(g *Geometry) {
				g.MaxDiscard, g.MaxWriteZeroes, g.DiscardGranularity, g.DiscardAlignment = math.MaxInt64, 1<<40, 1<<20, 4096
			},
			want: func(p *uapi.UblkParams) {
				p.Types |= 2
				p.Discard = uapi.UblkParamDiscard{DiscardGranularity: 1 << 20, DiscardAlignment: 4096,
					MaxDiscardSectors: 8388607, MaxWriteZeroesSectors: 8388607, MaxDiscardSegments: 1}
			},
		},
		"discard in 4k blocks": {
			change: func(g *Geometry) {
				g.Size, g.LogicalBlock, g.MaxDiscard = 1<<30, 4096, math.MaxInt64
			},
			want: func(p *uapi.UblkParams) {
				p.Basic.LogicalBsShift, p.Basic.DevSectors = 12, 1<<21
				p.Types |= 2
				p.Discard = uapi.UblkParamDiscard{DiscardGranularity: 4096, MaxDiscardSectors: 8388600, MaxDiscardSegments: 1}
			},
		},
		"only write-zeroes": {
			change: func(g *Geometry) { g.MaxWriteZeroes = 1 << 20 },
			want: func(p *uapi.UblkParams) {
				p.Types |= 2
				p.Discard = uapi.UblkParamDiscard{DiscardGranularity: 512, MaxWriteZeroesSectors: 2048, MaxDiscardSegments: 1}
			},
		},
		"zero copy": {
			change:   func(g *Geometry) { g.VirtBoundaryMask = 4095 },
			zeroCopy: true,
			want: func(p *uapi.UblkParams) {
				p.Types |= 16
				p.DMA.Alignment = 511
				p.Basic.VirtBoundaryMask = 4095
			},
		},
		"zero copy without demands":    {change: func(g *Geometry) { g.DMAMask = 0 }, zeroCopy: true},
		"copying leaves demands to us": {change: func(g *Geometry) { g.VirtBoundaryMask = 4095 }},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			g := base
			if c.change != nil {
				c.change(&g)
			}
			want := uapi.UblkParams{Len: 152, Types: 1, Basic: basic}
			if c.want != nil {
				c.want(&want)
			}
			got, err := g.params(512<<10, c.zeroCopy)
			if err != nil || got != want {
				t.Errorf("got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

func TestParamsRefused(t *testing.T) {
	for name, change := range map[string]func(*Geometry, *int){
		"empty":               func(g *Geometry, _ *int) { g.Size = 0 },
		"half a sector":       func(g *Geometry, _ *int) { g.Size = 1<<20 + 256 },
		"no block size":       func(g *Geometry, _ *int) { g.LogicalBlock = 0 },
		"odd block size":      func(g *Geometry, _ *int) { g.LogicalBlock = 520 },
		"small blocks":        func(g *Geometry, _ *int) { g.LogicalBlock = 256 },
		"large blocks":        func(g *Geometry, _ *int) { g.LogicalBlock = 1 << 20 },
		"small requests":      func(_ *Geometry, n *int) { *n = 512 },
		"requests over limit": func(_ *Geometry, n *int) { *n = 64 << 20 },
	} {
		g := Geometry{Size: 1 << 20, LogicalBlock: 512}
		n := 1 << 20
		if _, err := g.params(n, false); err != nil {
			t.Fatal(err)
		}
		change(&g, &n)
		if _, err := g.params(n, false); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestSameParams(t *testing.T) {
	g := Geometry{Size: 1 << 30, LogicalBlock: 512, MaxDiscard: 1 << 20, DMAMask: 511}
	want, err := g.params(1<<20, true)
	if err != nil {
		t.Fatal(err)
	}
	got := want
	got.Types |= uapi.UBLK_PARAM_TYPE_DEVT // the driver's addition
	got.Devt.CharMajor = 240
	if err := sameParams(&want, &got); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*uapi.UblkParams){
		"type":    func(p *uapi.UblkParams) { p.Types &^= uapi.UBLK_PARAM_TYPE_DMA_ALIGN },
		"basic":   func(p *uapi.UblkParams) { p.Basic.MaxSectors-- },
		"discard": func(p *uapi.UblkParams) { p.Discard.MaxDiscardSectors = 0 },
		"dma":     func(p *uapi.UblkParams) { p.DMA.Alignment = 3 },
	} {
		other := got
		change(&other)
		if sameParams(&want, &other) == nil {
			t.Errorf("a change of %s was not noticed", name)
		}
	}
}

// FuzzParams checks that what is derived from any disk is something the driver
// takes.
func FuzzParams(f *testing.F) {
	f.Add(int64(1<<30), 512, 4096, 4096, 0, int64(0), int64(0), int64(0), int64(511), true)
	f.Add(int64(512), 4096, 1<<20, 3, 5, int64(math.MaxInt64), int64(-1), int64(1<<50), int64(4095), false)
	f.Fuzz(func(t *testing.T, size int64, logical, physical, ioMin, ioOpt int, discard, zeroes, granularity, dma int64, zeroCopy bool) {
		g := Geometry{Size: size, LogicalBlock: logical, PhysicalBlock: physical, IOMin: ioMin, IOOpt: ioOpt,
			MaxDiscard: discard, MaxWriteZeroes: zeroes, DiscardGranularity: granularity, DMAMask: dma}
		p, err := g.params(256<<10, zeroCopy)
		if err != nil {
			return
		}
		b := p.Basic
		if b.LogicalBsShift < 9 || b.LogicalBsShift > 12 || b.PhysicalBsShift < b.LogicalBsShift ||
			b.IOMinShift < b.PhysicalBsShift || b.IOOptShift > 31 || b.IOMinShift > 62 || b.MaxSectors != 512 {
			t.Errorf("basic %+v", b)
		}
		if int64(b.DevSectors)*512 != size {
			t.Errorf("%d sectors for %d bytes", b.DevSectors, size)
		}
		if p.Types&uapi.UBLK_PARAM_TYPE_DISCARD != 0 {
			d := p.Discard
			if d.DiscardGranularity == 0 || d.MaxDiscardSegments != 1 ||
				uint64(d.MaxDiscardSectors)<<9 > math.MaxUint32 || uint64(d.MaxWriteZeroesSectors)<<9 > math.MaxUint32 {
				t.Errorf("discard %+v", d)
			}
		}
		if p.Types&uapi.UBLK_PARAM_TYPE_DMA_ALIGN != 0 {
			if a := p.DMA.Alignment; a >= 4096 || a&(a+1) != 0 {
				t.Errorf("alignment %#x", a)
			}
		}
	})
}

func TestDeviceIDs(t *testing.T) {
	sys := fakeSys(t, map[string]string{
		"class/ublk-char/ublkc7/dev": "1", "class/ublk-char/ublkc0/dev": "1", "class/ublk-char/ublkc12/dev": "1",
		"class/ublk-char/other/dev": "1", "class/ublk-char/ublkcx/dev": "1",
	}, nil)
	ids, err := deviceIDs(sys)
	if err != nil || !reflect.DeepEqual(ids, []int{0, 7, 12}) {
		t.Errorf("%v, %v", ids, err)
	}
	if ids, err := deviceIDs(t.TempDir()); err != nil || len(ids) != 0 {
		t.Errorf("without the driver: %v, %v", ids, err)
	}
}

func TestPossibleCPUs(t *testing.T) {
	for text, want := range map[string]int{"0": 1, "0-1": 2, "0-127": 128, "0,2-5": 6} {
		sys := fakeSys(t, map[string]string{"devices/system/cpu/possible": text}, nil)
		if got := possibleCPUs(sys); got != want {
			t.Errorf("%q: %d CPUs, want %d", text, got, want)
		}
	}
	if n := possibleCPUs(t.TempDir()); n < 1 {
		t.Errorf("%d CPUs", n)
	}
}

func TestTag(t *testing.T) {
	for _, kind := range []byte{0, 1, 'f', 255} {
		if k, ok := IsOurs(NewTag(kind)); !ok || k != kind {
			t.Errorf("tag of kind %d: %d, %v", kind, k, ok)
		}
	}
	if a, b := NewTag(1), NewTag(1); a == b {
		t.Error("two devices have the same tag")
	}
	for _, tag := range []uint64{0, 1, ^uint64(0), NewTag(1) ^ 1<<32} {
		if _, ok := IsOurs(tag); ok {
			t.Errorf("tag %#x is ours", tag)
		}
	}
}

// Pages that may change while they are written do not go to a disk that makes
// checksums of them.
func TestStableWritesAreCopied(t *testing.T) {
	able := &Control{features: ^uint64(0)}
	for _, c := range []struct {
		mode     Mode
		stable   bool
		zeroCopy bool
		ok       bool
	}{
		{ModeAuto, false, true, true},
		{ModeAuto, true, false, true},
		{ModeZeroCopy, false, true, true},
		{ModeZeroCopy, true, false, false},
		{ModeCopy, true, false, true},
	} {
		cfg := Config{ID: AnyID, Queues: 1, Depth: 1, Mode: c.mode, Geometry: Geometry{StableWrites: c.stable},
			NewHandler: func(int, blockdev.Queue) Handler { return nil }}
		if got, err := cfg.check(able); got != c.zeroCopy || (err == nil) != c.ok {
			t.Errorf("mode %v, stable %v: zero copy %v, %v", c.mode, c.stable, got, err)
		}
	}
}
