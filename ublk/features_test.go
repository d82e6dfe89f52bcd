package ublk

import (
	"errors"
	"strings"
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

func TestFeatures(t *testing.T) {
	seen := uint64(0)
	for i, f := range features {
		if f.Flag != 1<<i {
			t.Errorf("%s is number %d in the list, flag %#x", f.Name, i, f.Flag)
		}
		if f.Since == "" || f.Means == "" || OlderThan(f.Since, "6.0") {
			t.Errorf("incomplete: %+v", f)
		}
		seen |= f.Flag
	}
	// The flags of a 6.12 kernel.
	answers := map[Answer]int{}
	for _, p := range probes(0x1fe, nil) {
		answers[p.Answer]++
		if want := 0x1fe&p.Flag != 0; want != (p.Answer == Yes) {
			t.Errorf("%s: %s", p.Name, p.Answer)
		}
	}
	if answers[Yes] != 8 || answers[No] != len(features)-8 {
		t.Errorf("answers %v", answers)
	}
	for _, p := range probes(^uint64(0), ErrNoDriver) {
		if p.Answer != Unknown || !errors.Is(p.Err, ErrNoDriver) {
			t.Errorf("%s: %s, %v without a driver", p.Name, p.Answer, p.Err)
		}
	}
	if err := unsupported(uapi.UBLK_F_AUTO_BUF_REG); !errors.Is(err, ErrTooOld) || !strings.Contains(err.Error(), "AUTO_BUF_REG: Linux 6.16") {
		t.Error(err)
	}
}
