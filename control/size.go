package control

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// ParseSize reads a size in bytes: digits, and one of K, M, G, T (powers of
// 1024, either case) or nothing. Anything else is an error, as is a size that
// does not fit 63 bits.
func ParseSize(s string) (int64, error) {
	digits, shift := s, 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]&^0x20); i >= 0 {
			digits, shift = s[:n-1], 10*(i+1)
		}
	}
	// ParseUint takes no sign, but underscores are for base 0 only.
	v, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || v > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size: write a number and K, M, G or T", s)
	}
	return int64(v) << shift, nil
}

// FormatSize writes a size in the largest unit that divides it.
func FormatSize(n int64) string {
	unit := ""
	for _, u := range []string{"K", "M", "G", "T"} {
		if n == 0 || n%1024 != 0 {
			break
		}
		n, unit = n/1024, u
	}
	return strconv.FormatInt(n, 10) + unit
}

// HumanSize writes a size as people read it: in the largest unit of which it has
// one, with a digit after the point if need be.
func HumanSize(n int64) string {
	v, unit := float64(n), ""
	for _, u := range []string{"K", "M", "G", "T", "P"} {
		if v < 1023.95 { // which would be written as 1024
			break
		}
		v, unit = v/1024, u
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + unit
}

// Range is a range of a device in sectors of 512 bytes.
type Range struct {
	Sector uint64 `json:"sector"`
	Count  uint64 `json:"count"`
}

func (r Range) String() string { return fmt.Sprintf("%d:%d", r.Sector, r.Count) }

// ParseRange reads "sector:count".
func ParseRange(s string) (Range, error) {
	first, count, ok := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(first, 10, 64)
	b, err2 := strconv.ParseUint(count, 10, 64)
	if !ok || err1 != nil || err2 != nil {
		return Range{}, fmt.Errorf("%q is not a range: write SECTOR:COUNT", s)
	}
	r := Range{a, b}
	if err := r.Check(); err != nil {
		return Range{}, err
	}
	return r, nil
}

// Check refuses ranges that no device has.
func (r Range) Check() error {
	switch {
	case r.Count == 0:
		return fmt.Errorf("range %q is empty", r)
	case r.Sector+r.Count < r.Sector:
		return fmt.Errorf("range %q ends beyond all sectors", r)
	}
	return nil
}
