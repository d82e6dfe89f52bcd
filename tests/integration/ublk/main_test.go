// Package ublk tests package ublk of the product with the real driver and no daemon.
// Each test is called TestUblk…, for RUN=Ublk.
package ublk

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
