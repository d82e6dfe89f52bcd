package disk

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// A filesystem on a filter writes to it before it is frozen, and when it is thawed.
// Whoever asks for that waits in the kernel, where no signal reaches him. If that were
// the daemon, and it were killed, it would not end before the filter is served, and the
// filter would not be served before it ends. So a Prober's process asks.
//
//	Freeze ──question──> FIFREEZE ──answer──> Thaw, or the daemon's death ──> FITHAW ──answer

// Frozen is a filesystem that a Prober has frozen, until Thaw or this process's death.
type Frozen struct {
	hold, answers *os.File // hold keeps it frozen while it is open
}

// Freeze freezes the filesystem that dir lies on. If ctx ends before that is done, the
// filesystem is thawed as soon as it is frozen.
func (p *Prober) Freeze(ctx context.Context, dir *os.File) (*Frozen, error) {
	theirs, hold, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	f := &Frozen{hold: hold}
	if f.answers, err = p.put(question{Freeze: true}, dir, theirs); err == nil {
		err = f.answer(ctx)
	}
	if err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

// Thaw lets the filesystem go on. If ctx ends before that is done, it goes on when its
// disk answers. It fails with EINVAL if somebody else has thawed it.
func (f *Frozen) Thaw(ctx context.Context) error {
	defer f.close()
	f.hold.Close()
	return f.answer(ctx)
}

func (f *Frozen) answer(ctx context.Context) error {
	a, err := hear(ctx, f.answers)
	if err == nil && a.Errno != 0 {
		err = a.Errno
	}
	return err
}

func (f *Frozen) close() {
	f.hold.Close()
	if f.answers != nil {
		f.answers.Close()
	}
}

// Thaw lets the filesystem that dir lies on go on, whoever froze it. It fails with EINVAL
// if it is not frozen.
func (p *Prober) Thaw(ctx context.Context, dir *os.File) error {
	return p.askErrno(ctx, question{Thaw: true}, dir)
}

// Sync makes durable what was written to f. For a disk of the daemon's own the same holds
// as for a filesystem on it: see above.
func (p *Prober) Sync(ctx context.Context, f *os.File) error {
	return p.askErrno(ctx, question{Sync: true}, f)
}

func (p *Prober) askErrno(ctx context.Context, q question, f *os.File) error {
	a, err := p.ask(ctx, q, f)
	if err == nil && a.Errno != 0 {
		err = a.Errno
	}
	return err
}

// freeze is Freeze and the Thaw of it in the Prober's process.
func freeze(answers *json.Encoder, dir, hold *os.File) {
	a := request(dir, uapi.FIFREEZE)
	if a.Errno == 0 {
		_ = answers.Encode(a)             // nobody may be left to hear it
		_, _ = hold.Read(make([]byte, 1)) // until nobody has the other end
		a = request(dir, uapi.FITHAW)
	}
	dir.Close() // so that who hears the answer can unmount it
	_ = answers.Encode(a)
}

// request has the kernel freeze or thaw the filesystem of dir.
func request(dir *os.File, what uint) answer {
	return failed(unix.IoctlSetInt(int(dir.Fd()), what, 0))
}

// failed is the answer that an error makes.
func failed(err error) (a answer) {
	if err != nil {
		a.Error, a.Errno = err.Error(), unix.EIO
		errors.As(err, &a.Errno)
	}
	return a
}
