// Package storage tests difference storage: where it may lie, how it ends, and what
// is left of it.
package storage

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
