// Package cbt tests change tracking: what the maps and the ranges of changes tell a
// backup program.
package cbt

import (
	"testing"

	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

func TestMain(m *testing.M) { guest.Main(m) }
