package control

import "errors"

// CutOff is what was broken by force, for people. It is empty if nobody was there.
type CutOff struct {
	// Users are those of the filter and of images: their I/O fails from then on.
	Users []string `json:"users,omitempty"`
	// Snapshots held the filter, and are destroyed. They are given by name, or by UUID.
	Snapshots []string `json:"snapshots,omitempty"`
}

// With is err, with what was broken before it came to that.
func (c CutOff) With(err error) error {
	var e *Error
	if len(c.Users)+len(c.Snapshots) > 0 && errors.As(err, &e) {
		told := *e
		told.CutOff = &c
		return &told
	}
	return err
}

// forced finds what was broken by force in the error too.
func forced(c CutOff, err error) (CutOff, error) {
	var e *Error
	if errors.As(err, &e) && e.CutOff != nil {
		c = *e.CutOff
	}
	return c, err
}
