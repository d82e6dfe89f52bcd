package disk

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/internal/bounded"
)

// ErrNoAnswer: a file server or a disk does not answer. It arrives wrapped in an
// *Error, with the path or the device that was asked about.
var ErrNoAnswer = errors.New("does not answer")

const (
	// defaultTimeout is the Timeout of a Host that has none.
	defaultTimeout = 5 * time.Second
	// grace is how long any one question is waited for, though the time for all
	// of them is over: what answers at all does so at once.
	grace = time.Second
	// maxUnanswered is how many questions may hang before no further path is looked
	// up. There are as many paths as somebody thinks of, and each takes a thread.
	maxUnanswered = 100
)

// unanswered are the questions that nobody waits for any more and that have not
// ended. A question that is among them is not put again: each hangs in a thread.
// They are of the machine, not of a Host.
var unanswered = struct {
	sync.Mutex
	ended map[string]<-chan struct{}
}{ended: map[string]<-chan struct{}{}}

// ask runs f, which may hang, under a name by which the question is known again.
// It waits until end, or for the grace, and fails with ErrNoAnswer then, or at
// once if the same question hangs already. undo takes back what a late f did.
func ask[T any](end time.Time, question string, f func() T, undo func(T)) (T, error) {
	var none T
	unanswered.Lock()
	for q, ended := range unanswered.ended {
		select {
		case <-ended:
			delete(unanswered.ended, q)
		default:
		}
	}
	_, hangs := unanswered.ended[question]
	unanswered.Unlock()
	if hangs {
		return none, ErrNoAnswer
	}
	ctx, cancel := context.WithTimeout(context.Background(), max(time.Until(end), grace))
	defer cancel()
	ended := make(chan struct{})
	answer, err := bounded.Call(ctx, func() T {
		defer close(ended)
		return f()
	}, undo)
	if err != nil {
		unanswered.Lock()
		unanswered.ended[question] = ended
		unanswered.Unlock()
		return none, ErrNoAnswer
	}
	return answer, nil
}

// askPath is ask about a path.
func askPath[T any](h *Host, what, path string, f func() T, undo func(T)) (T, error) {
	unanswered.Lock()
	n := len(unanswered.ended)
	unanswered.Unlock()
	if n < maxUnanswered {
		if answer, err := ask(h.deadline(), what+" "+filepath.Join(h.Root, path), f, undo); err == nil {
			return answer, nil
		}
	}
	var none T
	return none, &Error{ErrNoAnswer, path, "a file server or a disk on the way to it does not answer", ""}
}

// deadline is when a question put now must have been answered.
func (h *Host) deadline() time.Time {
	if h.Timeout == 0 {
		return time.Now().Add(defaultTimeout)
	}
	return time.Now().Add(h.Timeout)
}
