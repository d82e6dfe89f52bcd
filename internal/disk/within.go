package disk

import "context"

// Within runs f, which may hang for as long as a disk does not answer, and
// returns its result. When ctx ends first it returns the error of ctx, and f goes
// on by itself: late gets the result then, on another goroutine, to take back
// what was done.
func Within[T any](ctx context.Context, f func() T, late func(T)) (T, error) {
	done := make(chan T)
	go func() {
		x := f()
		select {
		case done <- x:
		case <-ctx.Done():
			late(x)
		}
	}()
	select {
	case x := <-done:
		return x, nil
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
