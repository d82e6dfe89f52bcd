package bounded

import (
	"context"
	"errors"
	"testing"
)

// TestCall: what comes late is taken back, once.
func TestCall(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	never := func(int) { t.Error("taken back in time") }
	if x, err := Call(ctx, func() int { return 7 }, never); x != 7 || err != nil {
		t.Errorf("%d, %v", x, err)
	}
	hang, late := make(chan int), make(chan int)
	go func() { cancel() }()
	if x, err := Call(ctx, func() int { return <-hang }, func(x int) { late <- x }); x != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d, %v", x, err)
	}
	hang <- 8
	if x := <-late; x != 8 {
		t.Errorf("taken back: %d", x)
	}
}
