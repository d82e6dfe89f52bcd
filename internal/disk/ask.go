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
	// grace is how long each question is waited for, even if the time for all of them
	// is over. What answers at all does so at once.
	grace = time.Second
	// maxUnanswered is how many questions may hang before no further path is looked up.
	// Callers may ask about any number of paths, and each that hangs takes a thread.
	maxUnanswered = 100
)

// unanswered are the questions that have not ended and that nobody waits for any more.
// A question that is among them is not asked again, because each hangs in a thread. All
// Hosts share them, because they are about the machine.
var unanswered = struct {
	sync.Mutex
	ended map[string]<-chan struct{}
}{ended: map[string]<-chan struct{}{}}

// ask runs f, which may hang. question is a name by which the same question is known
// again. ask waits until end, and for the grace at least, and then fails with
// ErrNoAnswer. If the same question hangs already, it fails at once. undo takes back
// what f did too late.
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
