package control

import "testing"

func TestRoomForQueues(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		queues, depth int
		mode          Mode
		available     int64
		ok            bool
	}{
		{1, 128, ModeAuto, gib, true}, // 64 MiB
		{4, 4096, ModeAuto, 8 * gib, false},
		{4, 4096, ModeCopy, 32 * gib, true},
		{4, 4096, ModeZeroCopy, gib, true}, // has no buffers
		{4, 4096, ModeCopy, 0, true},       // nobody knows
	} {
		err := roomForQueues(AddRequest{Queues: c.queues, Depth: c.depth, Mode: c.mode}, c.available)
		if (err == nil) != c.ok {
			t.Errorf("%d queues of %d, %s, %d GiB: %v", c.queues, c.depth, c.mode, c.available>>30, err)
		}
	}
}
