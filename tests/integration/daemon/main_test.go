// Package daemon tests the daemon and its commands: starting, stopping and dying,
// what it refuses, what it leaves behind, and blksnap's own commands.
package daemon

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
