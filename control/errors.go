package control

import (
	"context"
	"encoding/json"
	"errors"
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
	Code    Code   `json:"code"`
	Errno   Errno  `json:"-"` // as this system has it; on the wire by its name
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"` // what to do about it
	// CutOff is what was broken by force before it failed.
	CutOff *CutOff `json:"cut_off,omitempty"`
}

func (e *Error) Error() string {
	if e.Fix != "" {
		return e.Message + ": " + e.Fix
	}
	return e.Message
}

func (e *Error) Unwrap() error {
	if e.Errno == noErrno {
		return nil
	}
	return e.Errno
}

// ContextError says that what was being done did not end before its context, which
// ended with err.
func ContextError(err error, what string) *Error {
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Code: Timeout, Errno: errnoNamed("ETIMEDOUT"), Message: what + ": took too long"}
	}
	return &Error{Code: Interrupted, Errno: errnoNamed("EINTR"), Message: what + ": interrupted"}
}

// noErrno is what an error without an errno has.
var noErrno Errno

// wireError adds the errno by its name: numbers differ between systems, and
// between architectures.
type wireError struct {
	*plainError
	Errno string `json:"errno,omitempty"`
}

type plainError Error

// MarshalJSON writes the errno by name.
func (e *Error) MarshalJSON() ([]byte, error) {
	return json.Marshal(wireError{(*plainError)(e), errnoName(e.Errno)})
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

// CodeOf is the code of err, Internal if it carries none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}
