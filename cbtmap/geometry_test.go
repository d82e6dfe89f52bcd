package cbtmap

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestBlockSizeFollowsFromDeviceSize(t *testing.T) {
	const GiB, TiB = 1 << 30, 1 << 40
	d := DefaultParams()
	for _, c := range []struct {
		name  string
		size  int64
		p     Params
		shift uint8
		count int64
	}{
		{"one sector", 512, d, 16, 1},
		{"one block", 65536, d, 16, 1},
		{"one block and a sector", 65536 + 512, d, 16, 2},
		{"largest with smallest blocks", 128 * GiB, d, 16, 2097152},
		{"one sector more", 128*GiB + 512, d, 17, 1048577},
		{"1 TiB", TiB, d, 19, 2097152},
		{"largest within the count", 128 * TiB, d, 26, 2097152},
		{"beyond the count", 128*TiB + 512, d, 26, 2097153},
		{"fixed shift ignores the count", 1 << 20, Params{9, 9, 1}, 9, 2048},
		{"count of one", 1 << 20, Params{9, 31, 1}, 20, 1},
	} {
		g, err := c.p.geometry(c.size)
		if err != nil || g.shift != c.shift || g.count != c.count {
			t.Errorf("%s: shift %d, count %d, %v; want shift %d, count %d", c.name, g.shift, g.count, err, c.shift, c.count)
		}
	}
}

func TestImpossibleParamsAndSizesAreRefused(t *testing.T) {
	d := DefaultParams()
	for _, c := range []struct {
		size int64
		p    Params
		want error
		text string
	}{
		{1 << 20, Params{8, 26, 1}, ErrParams, "minimum shift 8"},
		{1 << 20, Params{32, 32, 1}, ErrParams, "minimum shift 32"},
		{1 << 20, Params{16, 32, 1}, ErrParams, "maximum shift 32"},
		{1 << 20, Params{16, 15, 1}, ErrParams, "maximum shift 15 is below minimum shift 16"},
		{1 << 20, Params{16, 26, 0}, ErrParams, "maximum count 0"},
		{1 << 20, Params{16, 26, -1}, ErrParams, "maximum count -1"},
		{0, d, ErrSize, "0 bytes"},
		{-512, d, ErrSize, "-512 bytes"},
		{65537, d, ErrSize, "65537 bytes"},
		{math.MaxInt64 &^ 511, d, ErrSize, "blocks of 67108864 bytes"},
	} {
		_, err := NewMemory(c.size, c.p)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("size %d, %+v: %v, want %v naming %q", c.size, c.p, err, c.want, c.text)
		}
	}
}

func TestMasksSelectBytesInMemoryOrder(t *testing.T) {
	for i := range 8 {
		m := newMap(t, 8)
		b, w := m.active, m.activeWords
		for name, c := range map[string]struct {
			mask uint64
			has  func(j int) bool
		}{
			"from": {maskFrom(i), func(j int) bool { return j >= i }},
			"to":   {maskTo(i), func(j int) bool { return j <= i }},
		} {
			w[0] = c.mask
			for j := range b {
				if (b[j] == 255) != c.has(j) {
					t.Errorf("mask %s %d: byte %d is %d", name, i, j, b[j])
				}
			}
		}
	}
	if _, err := wordsOf(newMap(t, 8).Memory()[1:9]); !errors.Is(err, errMisaligned) {
		t.Errorf("misaligned memory: %v", err)
	}
}
