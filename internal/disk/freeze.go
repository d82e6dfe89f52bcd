package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
)

// A filesystem on a filter writes to it before it is frozen, and when it is thawed.
// Whoever asks for that waits in the kernel, where no signal reaches him. If that were
// the daemon, and it were killed, it would not end before the filter is served, and the
// filter would not be served before it ends. So a Prober's process asks.
//
//	Freeze ──question──> FIFREEZE ──answer──> Thaw, or the daemon's death ──> FITHAW ──answer

// held is what a Prober does until this process has it end, or dies.
type held struct {
	hold, answers *os.File // it goes on while hold is open
}

// Frozen is a filesystem that a Prober has frozen, until Thaw or this process's death.
type Frozen struct{ held }

// Late is the error of what had not begun when the time for it was over. It ends as soon as it
// has begun.
type Late struct {
	error
	ended chan struct{}
	died  bool // guarded by ended
}

func (l *Late) Unwrap() error { return l.error }

// Died waits for the end, and says whether the Prober's process has died instead. It may have
// begun what nobody has ended.
func (l *Late) Died() bool {
	<-l.ended
	return l.died
}

// await waits for the answers: two if the first is that it has begun.
func (l *Late) await(answers *os.File) {
	defer close(l.ended)
	defer answers.Close()
	heard := json.NewDecoder(answers)
	var begun, done answer
	l.died = heard.Decode(&begun) != nil || begun.Errno == 0 && heard.Decode(&done) != nil
}

// Freeze freezes the filesystem that dir lies on. If ctx ends before that is done, the
// filesystem is thawed as soon as it is frozen, and the error is Late.
func (p *Prober) Freeze(ctx context.Context, dir *os.File) (*Frozen, error) {
	h, err := p.begin(ctx, question{Freeze: true}, dir)
	if err != nil {
		return nil, err
	}
	return &Frozen{h}, nil
}

// begin begins what lasts until its end, and waits for the answer that it has begun.
func (p *Prober) begin(ctx context.Context, q question, files ...*os.File) (held, error) {
	theirs, hold, err := os.Pipe()
	if err != nil {
		return held{}, err
	}
	defer theirs.Close()
	h := held{hold: hold}
	if h.answers, err = p.put(q, append(files, theirs)...); err == nil {
		err = h.answer(ctx)
	}
	switch {
	case err == nil:
		return h, nil
	case ctx.Err() != nil && h.answers != nil:
		h.hold.Close()
		late := &Late{error: err, ended: make(chan struct{})}
		go late.await(h.answers)
		return held{}, late
	}
	h.close()
	return held{}, err
}

// end ends it, and waits for that.
func (h *held) end(ctx context.Context) error {
	defer h.close()
	h.hold.Close()
	return h.answer(ctx)
}

// Thaw lets the filesystem go on. If ctx ends before that is done, it goes on when its
// disk answers. It fails with EINVAL if somebody else has thawed it.
func (f *Frozen) Thaw(ctx context.Context) error { return f.end(ctx) }

func (h *held) answer(ctx context.Context) error {
	a, err := hear(ctx, h.answers)
	if err == nil && a.Unsynced {
		err = fmt.Errorf("%w%s", blockdev.ErrUnsynced, strings.TrimPrefix(a.Error, blockdev.ErrUnsynced.Error()))
	} else if err == nil && a.Errno != 0 {
		err = a.Errno
	}
	return err
}

func (h *held) close() {
	h.hold.Close()
	if h.answers != nil {
		h.answers.Close()
	}
}

// Claim is a disk that a Prober has open, so that nobody else can claim it, until Release
// or this process's death.
type Claim struct{ held }

// Claim opens the disk at path for that, and makes durable what was written to it. For a
// disk of the daemon's own the same holds as for a filesystem on it: see above. Opening it
// may have to wait for its I/O too, of whoever reads its partition table. If ctx ends before
// it is done, the disk is let go as soon as it is. The error is that of the opening, or
// blockdev.ErrUnsynced.
func (p *Prober) Claim(ctx context.Context, path string) (*Claim, error) {
	h, err := p.begin(ctx, question{Claim: path})
	if err != nil {
		return nil, err
	}
	return &Claim{h}, nil
}

// Held says whether the Prober has not let go of the disk, as it does when it is killed.
func (c *Claim) Held() (held bool) {
	conn, err := c.answers.SyscallConn()
	if err != nil {
		return false
	}
	_ = conn.Control(func(fd uintptr) {
		pipe := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(pipe, 0)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Poll(pipe, 0)
		}
		held = err == nil && n == 0 // neither a last answer nor the end
	})
	return held
}

// Release lets go of the disk. If ctx ends before that is done, it is done later.
func (c *Claim) Release(ctx context.Context) error { return c.end(ctx) }

// Thaw lets the filesystem that dir lies on go on, whoever froze it. It fails with EINVAL
// if it is not frozen.
func (p *Prober) Thaw(ctx context.Context, dir *os.File) error {
	return p.askErrno(ctx, question{Thaw: true}, dir)
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

// claim is Claim and the Release of it in the Prober's process.
func claim(answers *json.Encoder, path string, hold *os.File) {
	f, err := blockdev.OpenSynced(path)
	if err == nil {
		_ = answers.Encode(answer{})      // nobody may be left to hear it
		_, _ = hold.Read(make([]byte, 1)) // until nobody has the other end
		_ = f.Close()
	}
	a := failed(err)
	a.Unsynced = errors.Is(err, blockdev.ErrUnsynced)
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
