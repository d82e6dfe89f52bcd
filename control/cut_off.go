package control

import "errors"

// CutOff is what was broken by force, for people.
type CutOff struct {
	// Users are those of the filter and of images: their I/O fails from then on.
	Users []string `json:"users,omitempty"`
	// Snapshots held the filter, and are destroyed. They are given by name, or by UUID.
	Snapshots []string `json:"snapshots,omitempty"`
}

// Empty says whether nobody was there.
func (c CutOff) Empty() bool { return len(c.Users)+len(c.Snapshots) == 0 }

// With is an error with what was broken before it came to that.
func (c CutOff) With(e *Error) *Error {
	if c.Empty() {
		return e
	}
	told := *e
	told.CutOff = &c
	return &told
}

// forced finds what was broken by force in the error too.
func forced(c CutOff, err error) (CutOff, error) {
	var e *Error
	if errors.As(err, &e) && e.CutOff != nil {
		c = *e.CutOff
	}
	return c, err
}
