package control

import (
	"fmt"
	"strconv"
	"strings"
)

// ParsePercent reads a percentage from 1 to 99: "10%" or "10".
func ParsePercent(s string) (int, error) {
	v, err := strconv.ParseUint(strings.TrimSuffix(s, "%"), 10, 8)
	if err != nil || v < 1 || v > 99 {
		return 0, fmt.Errorf("%q is not a percentage: write one from 1%% to 99%%", s)
	}
	return int(v), nil
}
