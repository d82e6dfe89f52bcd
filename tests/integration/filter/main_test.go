// Package filter tests data through a filter without snapshots.
package filter

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
