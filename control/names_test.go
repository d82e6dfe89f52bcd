package control

import (
	"testing"
	"time"
)

func TestParseTTL(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "45m": 45 * time.Minute, "12h": 12 * time.Hour, "7d": 7 * 24 * time.Hour, "1d12h30m": 36*time.Hour + 30*time.Minute, "0d1h": time.Hour,
		"": 0, "d": 0, "12": 0, "0h": 0, "0d": 0, "-1h": 0, "1d-1h": 0, "-1d": 0, "h": 0, "1w": 0, "99999999d": 0, "65535d2540000h": 0, "1h1d": 0, "1 h": 0, "+1d": 0,
	} {
		if got, err := ParseTTL(text); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
