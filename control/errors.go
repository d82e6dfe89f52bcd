package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// Code is the kind of an error, for programs.
type Code string

// The codes.
const (
	Internal    Code = "internal"
	Invalid     Code = "invalid"     // the request makes no sense
	NotFound    Code = "not_found"   // no such device, snapshot, file
	Exists      Code = "exists"      // already there
	Busy        Code = "busy"        // in use
	ReadOnly    Code = "read_only"   // cannot be written
	Unsupported Code = "unsupported" // not on this kernel
	Denied      Code = "denied"      // not allowed
	Unavailable Code = "unavailable" // no daemon
	NoSpace     Code = "no_space"
	Corrupted   Code = "corrupted" // a snapshot or a change map that broke
	Timeout     Code = "timeout"
	Interrupted Code = "interrupted"
	// GenerationEnded: what changed since then cannot be told, everything has to be copied.
	GenerationEnded Code = "generation_ended"
)

// Error is a failed operation, as it travels from the daemon to the caller.
// errors.Is finds its Errno in it.
type Error struct {
	Code    Code       `json:"code"`
	Errno   unix.Errno `json:"-"`
	Message string     `json:"message"`
	Fix     string     `json:"fix,omitempty"` // what to do about it
}

func (e *Error) Error() string {
	if e.Fix != "" {
		return e.Message + ": " + e.Fix
	}
	return e.Message
}

func (e *Error) Unwrap() error {
	if e.Errno != 0 {
		return e.Errno
	}
	return nil
}

// wireError adds the errno by its name: numbers differ between architectures.
type wireError struct {
	*plainError
	Errno string `json:"errno,omitempty"`
}

type plainError Error

// MarshalJSON writes the errno by name.
func (e *Error) MarshalJSON() ([]byte, error) {
	w := wireError{plainError: (*plainError)(e)}
	if e.Errno != 0 {
		w.Errno = unix.ErrnoName(e.Errno)
	}
	return json.Marshal(w)
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (e *Error) UnmarshalJSON(b []byte) error {
	w := wireError{plainError: (*plainError)(e)}
	if err := json.Unmarshal(b, &w); err != nil {
		return err
	}
	e.Errno = errnoNamed(w.Errno)
	return nil
}

func errnoNamed(name string) unix.Errno {
	for n := unix.Errno(1); name != "" && n < 200; n++ {
		if unix.ErrnoName(n) == name {
			return n
		}
	}
	return 0
}

// CodeOf is the code of err, Internal if it carries none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}

// fail says that doing what (verb and object) came to err.
func fail(err error, format string, args ...any) *Error {
	what := fmt.Sprintf(format, args...)
	var (
		e     *Error
		d     *disk.Error
		errno unix.Errno
	)
	switch {
	case errors.As(err, &e):
		c := *e
		c.Message = said(what, err.Error())
		if e.Fix != "" {
			c.Message = said(what, e.Message)
		}
		return &c
	case errors.As(err, &d):
		c := diskError(d)
		c.Message = said(what, d.What)
		return c
	case errors.Is(err, ublk.ErrTooOld), errors.Is(err, ublk.ErrZoned):
		return &Error{Code: Unsupported, Errno: unix.EOPNOTSUPP, Message: said(what, err.Error())}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Code: Timeout, Errno: unix.ETIMEDOUT, Message: what + ": took too long"}
	case errors.Is(err, context.Canceled):
		return &Error{Code: Interrupted, Errno: unix.EINTR, Message: what + ": interrupted"}
	case errors.As(err, &errno):
		return &Error{Code: codeOfErrno(errno), Errno: errno, Message: said(what, err.Error())}
	case errors.Is(err, os.ErrNotExist):
		return &Error{Code: NotFound, Errno: unix.ENOENT, Message: said(what, err.Error())}
	}
	return &Error{Code: Internal, Message: said(what, err.Error())}
}

// asKnown names the files that this process reaches through the root of process
// 1 as everybody knows them.
func asKnown(text string) string { return strings.ReplaceAll(text, initRoot+"/", "/") }

// said puts what was being done before what came of it, naming the object once.
func said(what, came string) string {
	came = asKnown(came)
	object := what[strings.LastIndexByte(what, ' ')+1:]
	return what + ": " + strings.TrimPrefix(came, object+": ")
}

func codeOfErrno(n unix.Errno) Code {
	switch n {
	case unix.ENOENT, unix.ENODEV, unix.ESRCH, unix.ENXIO:
		return NotFound
	case unix.EEXIST, unix.EALREADY:
		return Exists
	case unix.EBUSY:
		return Busy
	case unix.EINVAL, unix.ERANGE:
		return Invalid
	case unix.EROFS:
		return ReadOnly
	case unix.EPERM, unix.EACCES:
		return Denied
	case unix.ENOSPC:
		return NoSpace
	case unix.EOPNOTSUPP, unix.ENOSYS:
		return Unsupported
	case unix.ETIMEDOUT:
		return Timeout
	case unix.EINTR:
		return Interrupted
	}
	return Internal
}

// diskError is the error of looking at a disk without what was being done.
func diskError(d *disk.Error) *Error {
	e := &Error{Code: Internal, Message: d.Error(), Fix: d.Fix}
	var errno unix.Errno
	switch {
	case errors.Is(d, disk.ErrNotFound):
		e.Code, e.Errno = NotFound, unix.ENODEV
	case errors.Is(d, disk.ErrNotBlock):
		e.Code, e.Errno = Invalid, unix.ENOTBLK
	case errors.Is(d, disk.ErrEmpty):
		e.Code, e.Errno = Invalid, unix.ENOMEDIUM
	case errors.Is(d, disk.ErrReadOnly):
		e.Code, e.Errno = ReadOnly, unix.EROFS
	case errors.Is(d, disk.ErrForeign):
		e.Code, e.Errno = Denied, unix.EPERM
	case errors.Is(d, disk.ErrInUse), errors.Is(d, disk.ErrUnknown):
		e.Code, e.Errno = Busy, unix.EBUSY
	case errors.Is(d, disk.ErrNoAnswer):
		e.Code, e.Errno = Timeout, unix.ETIMEDOUT
	case errors.As(d, &errno):
		e.Code, e.Errno = codeOfErrno(errno), errno
	}
	return e
}

func invalid(format string, args ...any) *Error {
	return &Error{Code: Invalid, Errno: unix.EINVAL, Message: fmt.Sprintf(format, args...)}
}
