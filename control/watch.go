package control

import (
	"context"
	"time"
)

const (
	// nextPatience is how long a Watch waits for the next daemon, and nextInterval how
	// often it looks for it.
	nextPatience = 5 * time.Minute
	nextInterval = 50 * time.Millisecond
)

// Watch implements API. If the daemon dies, or another program takes over in its
// process, Watch goes on after the last event that each has had. It ends with
// [Interrupted] when the daemon is stopped, and with [Unavailable] if no daemon runs, or
// none comes within five minutes.
func (c *Client) Watch(ctx context.Context, r WatchRequest, each func(Event) error) error {
	next := r          // what the next daemon is asked
	var lost time.Time // since when there has been none
	for first := true; ; first = false {
		info, err := c.Info(ctx)
		switch {
		case err == nil:
			if first && r == (WatchRequest{}) {
				next.Since = info.LastEvent // if no event comes before the daemon dies
			}
			lost = time.Time{}
			var failed error
			err = lines(ctx, c, "snapshot/watch", r, func(l EventLine) (*LastLine, error) {
				if l.Event == nil {
					return &l.LastLine, nil
				}
				failed = each(*l.Event)
				next.Since = max(next.Since, l.Seq)
				if r.ID != "" {
					next.ID = l.Snapshot // its name may be another's by then
				}
				return &l.LastLine, failed
			})
			if err == nil || failed != nil || ctx.Err() != nil || CodeOf(err) != Unavailable {
				return err
			}
			r = next
		case first || ctx.Err() != nil || CodeOf(err) != Unavailable:
			return err
		case lost.IsZero():
			lost = time.Now()
		case time.Since(lost) > nextPatience:
			return err
		}
		select {
		case <-time.After(nextInterval):
		case <-ctx.Done():
			return ContextError(ctx.Err(), "watch")
		}
	}
}
