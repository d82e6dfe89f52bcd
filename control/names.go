package control

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Latest names the snapshot that was created last, of those that are not being destroyed.
const Latest = "latest"

// SetRequest asks to change a snapshot.
type SetRequest struct {
	ID  string        `json:"id"`
	TTL time.Duration `json:"ttl_ns"` // as in CreateRequest
}

// DestroyRequest asks to destroy a snapshot.
type DestroyRequest struct {
	ID string `json:"id"`
	// Force destroys it under the users of its images, whose I/O fails.
	Force bool `json:"force,omitempty"`
}

const day = 24 * time.Hour

// ParseTTL reads how long a snapshot shall live: 45m, 12h, 7d, 1d12h.
func ParseTTL(text string) (time.Duration, error) {
	days, rest, ok := strings.Cut(text, "d")
	if !ok {
		days, rest = "0", text
	}
	n, err := strconv.ParseUint(days, 10, 16)
	var more time.Duration
	if err == nil && rest != "" {
		more, err = time.ParseDuration(rest)
	}
	// A sum that does not fit is below zero.
	if ttl := time.Duration(n)*day + more; err == nil && more >= 0 && ttl > 0 {
		return ttl, nil
	}
	return 0, fmt.Errorf("%q is no time to live: write 45m, 12h, 7d or 1d12h", text)
}
