// Package bounded puts a time limit on calls that may hang.
//
// A system call on a disk that does not answer cannot be interrupted: not by a
// signal, not by a context. Whoever must not hang with it makes the call on a
// goroutine of its own and leaves it behind:
//
//	caller                 goroutine            disk
//	  │ Call(ctx, f, undo) ──> f ─────────────────> │ does not answer
//	  │ ctx ends                                    │
//	  │ <── the error of ctx                        │
//	  v goes on                │ <───────────────── │ answers at last
//	                           │ undo(result)
//
// Call may be used from any goroutine. The error is context.DeadlineExceeded or
// context.Canceled, and nothing else.
package bounded

import "context"

// Call runs f, which may hang for as long as a disk does not answer, and returns
// its result. When ctx ends first it returns the error of ctx, and f goes on by
// itself: undo gets the result then, on another goroutine, to take back what was
// done.
func Call[T any](ctx context.Context, f func() T, undo func(T)) (T, error) {
	done := make(chan T)
	go func() {
		x := f()
		select {
		case done <- x:
		case <-ctx.Done():
			undo(x)
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
