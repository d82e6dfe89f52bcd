// Package bounded puts a time limit on calls that may hang.
//
// Neither a signal nor a context can interrupt a system call on a disk that does
// not answer. So Call makes the call on a goroutine of its own, and leaves that
// goroutine behind when the time is up:
//
//	caller                 goroutine            disk
//	  │ Call(ctx, f, undo) ──> f ─────────────────> │ does not answer
//	  │ ctx ends                                    │
//	  │ <── the error of ctx                        │
//	  v goes on                │ <───────────────── │ answers at last
//	                           │ undo(result)
//
// Call may be used from any goroutine. Its error is always context.DeadlineExceeded
// or context.Canceled.
package bounded

import "context"

// Call runs f, which may hang for as long as a disk does not answer, and returns
// its result. If ctx ends first, Call returns the error of ctx, and f goes on by
// itself. When f ends at last, undo gets its result, on another goroutine, and
// takes back what f did.
func Call[T any](ctx context.Context, f func() T, undo func(T)) (T, error) {
	done := make(chan T)
	go func() {
		result := f()
		select {
		case done <- result:
		case <-ctx.Done():
			undo(result)
		}
	}()
	select {
	case result := <-done:
		return result, nil
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
