package daemon

import (
	"fmt"
	"math/rand"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// deathInRecovery has a daemon die that holds two snapshots, the first of them taken, and the
// next one at step n of taking over. In the midst means that the first daemon dies at some step
// of an operation on the second snapshot, else when it has nothing to do.
func (v *victim) deathInRecovery(t *testing.T, n int, midst bool) (died bool) {
	t.Helper()
	seed := int64(n)
	if guest.Long() {
		seed = time.Now().UnixNano()
	}
	rnd := rand.New(rand.NewSource(seed))
	operation, step := "", 1+rnd.Intn(30)
	if midst {
		operation = []string{"take", "append", "destroy"}[rnd.Intn(3)]
		t.Logf("n = %d: the first daemon dies at step %d of %s", n, step, operation)
	}
	v.dies(step)
	now := uint64(n)
	v.write(now)
	first := v.takeSmall()
	if err := v.appendTo(guest.Context(t), first.ID, "named"); err != nil {
		t.Fatal(err)
	}
	v.write(now + 1)
	v.storedAppended(first.ID)
	second := v.Create(v.request(false))
	if operation == "destroy" {
		v.Taken(second.ID)
		v.write(now + 2)
	}

	v.armed()
	var err error
	switch operation {
	case "take":
		_, err = v.TakeSnapshot(guest.Context(t), control.TakeRequest{ID: second.ID})
	case "append":
		err = v.appendTo(guest.Context(t), second.ID, "more")
	case "destroy":
		err = v.DestroySnapshot(guest.Context(t), control.DestroyRequest{ID: second.ID})
	}
	os.Remove(v.arm)
	if !v.Ended(0) && !(err != nil && v.Ended(time.Second)) { // it may be about to die, with the answer on its way
		if err != nil {
			t.Errorf("a daemon that lives says %v", err)
		}
		v.Kill()
	}
	v.Launch(fmt.Sprintf("%s=%d", deathpoint.DieAt, n))
	guest.WaitFor(t, "its death, or its answer", func() bool {
		died = v.Ended(0)
		i, err := v.Info(guest.Context(t))
		return died || err == nil && strings.HasPrefix(i.RunDir, string(v.RunDir))
	})
	if !died {
		v.Kill() // it would die in what comes now
	}
	v.Restart()

	v.shows(v.Show(first.ID).Images[0].Link, now)
	if operation == "destroy" {
		v.shows(v.device().Link, now+2)
		if all := program.SnapshotIDs(t, v.Daemon); slices.Contains(all, second.ID) {
			v.shows(v.Show(second.ID).Images[0].Link, now+1)
		}
		v.clean()
		return died
	}
	v.shows(v.device().Link, now+1)
	if v.Show(second.ID).State == control.SnapshotCreated {
		v.Taken(second.ID)
	}
	v.write(now + 2)
	v.shows(v.Show(second.ID).Images[0].Link, now+1)
	v.shows(v.Show(first.ID).Images[0].Link, now)
	v.clean()
	return died
}
