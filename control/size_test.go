package control

import (
	"math"
	"testing"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "4k": 4096, "4K": 4096, "10g": 10 << 30, "10G": 10 << 30, "3M": 3 << 20, "2t": 2 << 40,
		"9223372036854775807": math.MaxInt64, "8388607T": 8388607 << 40,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "g", "10x", "10gg", "-1", "+1", "1.5G", " 1", "1 ", "1 G", "0x10", "1_000", "10GB", "10GiB",
		"9223372036854775808", "8388608T", "9007199254740992K"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", s, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"10g", "10x", "", "9223372036854775807", "8388608T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("%q is negative: %d", s, n)
		}
		if back, err := ParseSize(FormatSize(n)); err != nil || back != n {
			t.Fatalf("%q is %d, written %q, read %d, %v", s, n, FormatSize(n), back, err)
		}
	})
}

func TestHumanSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 1: "1", 512: "512", 1023: "1023", 1024: "1K", 1536: "1.5K", 65536: "64K", 1 << 20: "1M", 1<<20 - 1: "1M", 1<<20 - 1<<10: "1023K",
		10 << 30: "10G", 1_000_204_886_016: "931.5G", 1 << 40: "1T", math.MaxInt64: "8192P",
	} {
		if got := HumanSize(n); got != want {
			t.Errorf("HumanSize(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestParseRange(t *testing.T) {
	for s, want := range map[string]Range{"0:1": {0, 1}, "8:16": {8, 16}, "18446744073709551614:1": {math.MaxUint64 - 1, 1}} {
		if got, err := ParseRange(s); err != nil || got != want {
			t.Errorf("ParseRange(%q) = %v, %v; want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", ":", "1", "1:", ":1", "1:0", "1:2:3", "-1:2", "1:-2", "a:b", "1 :2", "18446744073709551615:1", "18446744073709551616:1"} {
		if got, err := ParseRange(s); err == nil {
			t.Errorf("ParseRange(%q) = %v, want an error", s, got)
		}
	}
}

func FuzzParseRange(f *testing.F) {
	f.Add("8:16")
	f.Add("18446744073709551615:18446744073709551615")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRange(s)
		if err != nil {
			return
		}
		if r.Count == 0 || r.Sector+r.Count < r.Sector {
			t.Fatalf("%q is %v", s, r)
		}
		if back, err := ParseRange(r.String()); err != nil || back != r {
			t.Fatalf("%q is %v, comes back as %v, %v", s, r, back, err)
		}
	})
}
