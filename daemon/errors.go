package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// fail is the error of an operation that failed with err. format and args say what
// was being done: a verb and its object.
func fail(err error, format string, args ...any) *control.Error {
	what := fmt.Sprintf(format, args...)
	var (
		e     *control.Error
		d     *disk.Error
		errno unix.Errno
	)
	switch {
	case errors.As(err, &e):
		c := *e
		c.Message = joinMessage(what, err.Error())
		if e.Fix != "" {
			c.Message = joinMessage(what, e.Message)
		}
		return &c
	case errors.As(err, &d):
		c := diskError(d)
		c.Message = joinMessage(what, d.What)
		return c
	case errors.Is(err, ublk.ErrTooOld), errors.Is(err, ublk.ErrZoned):
		return &control.Error{Code: control.Unsupported, Errno: unix.EOPNOTSUPP, Message: joinMessage(what, err.Error())}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return control.ContextError(err, what)
	case errors.As(err, &errno):
		return &control.Error{Code: codeOfErrno(errno), Errno: errno, Message: joinMessage(what, err.Error())}
	case errors.Is(err, os.ErrNotExist):
		return &control.Error{Code: control.NotFound, Errno: unix.ENOENT, Message: joinMessage(what, err.Error())}
	}
	return &control.Error{Code: control.Internal, Message: joinMessage(what, err.Error())}
}

// publicPaths gives paths the form in which everybody knows them. This process
// reaches many files through the root directory of process 1.
func publicPaths(text string) string { return strings.ReplaceAll(text, initRoot+"/", "/") }

// joinMessage puts what was being done before what came of it, and names the object
// only once.
func joinMessage(what, came string) string {
	came = publicPaths(came)
	object := what[strings.LastIndexByte(what, ' ')+1:]
	return what + ": " + strings.TrimPrefix(came, object+": ")
}

func codeOfErrno(n unix.Errno) control.Code {
	switch n {
	case unix.ENOENT, unix.ENODEV, unix.ESRCH, unix.ENXIO:
		return control.NotFound
	case unix.EEXIST, unix.EALREADY:
		return control.Exists
	case unix.EBUSY:
		return control.Busy
	case unix.EINVAL, unix.ERANGE:
		return control.Invalid
	case unix.EROFS:
		return control.ReadOnly
	case unix.EPERM, unix.EACCES:
		return control.Denied
	case unix.ENOSPC:
		return control.NoSpace
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return control.Unsupported
	case unix.ETIMEDOUT:
		return control.Timeout
	case unix.EINTR:
		return control.Interrupted
	}
	return control.Internal
}

// diskError gives an error of package disk its code. It does not say what was being
// done.
func diskError(d *disk.Error) *control.Error {
	e := &control.Error{Code: control.Internal, Message: d.Error(), Fix: d.Fix}
	var errno unix.Errno
	switch {
	case errors.Is(d, disk.ErrNotFound):
		e.Code, e.Errno = control.NotFound, unix.ENODEV
	case errors.Is(d, disk.ErrNotBlock):
		e.Code, e.Errno = control.Invalid, unix.ENOTBLK
	case errors.Is(d, disk.ErrEmpty):
		e.Code, e.Errno = control.Invalid, unix.ENOMEDIUM
	case errors.Is(d, disk.ErrReadOnly):
		e.Code, e.Errno = control.ReadOnly, unix.EROFS
	case errors.Is(d, disk.ErrForeign):
		e.Code, e.Errno = control.Denied, unix.EPERM
	case errors.Is(d, disk.ErrInUse), errors.Is(d, disk.ErrUnknown):
		e.Code, e.Errno = control.Busy, unix.EBUSY
	case errors.Is(d, disk.ErrNoAnswer):
		e.Code, e.Errno = control.Timeout, unix.ETIMEDOUT
	case errors.As(d, &errno):
		e.Code, e.Errno = codeOfErrno(errno), errno
	}
	return e
}

func invalid(format string, args ...any) *control.Error {
	return &control.Error{Code: control.Invalid, Errno: unix.EINVAL, Message: fmt.Sprintf(format, args...)}
}
