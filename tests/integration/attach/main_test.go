// Package attach tests device-mapper's interface, and filters that come under a mounted
// device of it.
package attach

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
