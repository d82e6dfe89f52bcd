package guest

import (
	"context"
	"testing"
	"time"
)

// Patience is how long a test waits for what has to come, under emulation and
// with the machine busy. It says that something hangs, and never how long
// something may take.
const Patience = 3 * time.Minute

// WaitFor waits until cond holds.
func WaitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// Await is what comes out of c.
func Await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case x := <-c:
		return x
	case <-time.After(Patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

// Context bounds one call of the daemon, or a few of the driver.
func Context(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), Patience)
	t.Cleanup(cancel)
	return c
}
