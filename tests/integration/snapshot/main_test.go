// Package snapshot tests takes, snapshots under load, and images as disks.
package snapshot

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
