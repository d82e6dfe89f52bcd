package control

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// Take names a take of a device for good: its number means something only within
// the generation of the change map, which ends when numbers run out or the
// history is lost. As text, and in JSON, it is one token, GENERATION:N.
type Take struct {
	Generation uuid.UUID
	Number     uint64
}

func (t Take) String() string { return t.Generation.String() + ":" + strconv.FormatUint(t.Number, 10) }

// ParseTake reads a token. A bare number is none: it would name another take
// when the generation has changed.
func ParseTake(s string) (Take, error) {
	// The other forms that Parse knows are no names of ours.
	if i := strings.LastIndexByte(s, ':'); i == len(uuid.UUID{}.String()) {
		g, err1 := uuid.Parse(s[:i])
		n, err2 := strconv.ParseUint(s[i+1:], 10, 64)
		if err1 == nil && err2 == nil {
			return Take{g, n}, nil
		}
	}
	return Take{}, &Error{Code: Invalid, Errno: errnoNamed("EINVAL"), Message: fmt.Sprintf("%q names no take", s),
		Fix: `write GENERATION:N, as "snapshot info" and "cbt info" print it`}
}

// MarshalJSON writes the token.
func (t Take) MarshalJSON() ([]byte, error) { return json.Marshal(t.String()) }

// UnmarshalJSON reads the token, and refuses a number as [ParseTake] does.
func (t *Take) UnmarshalJSON(b []byte) (err error) {
	var s string
	if json.Unmarshal(b, &s) != nil {
		s = string(b)
	}
	*t, err = ParseTake(s)
	return err
}
