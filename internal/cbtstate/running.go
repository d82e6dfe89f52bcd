package cbtstate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

// Running state is of a disk that has a filter, and is for who finds it after a power
// failure. Its record is KEY.running. Its ID is that of a log of package intentlog, which
// is in KEY.ID.log, with a base in KEY.ID.base. Each new base takes the place of the one
// before. They count from the instant when the record takes the place of the one before.
const (
	runningSuffix = ".running"
	baseSuffix    = ".base"
	logSuffix     = ".log"
)

func pair(k string, log uuid.UUID) (base, file string) {
	name := k + "." + log.String()
	return name + baseSuffix, name + logSuffix
}

// NewLog makes the file of a log: of size bytes, all written, so that writing to it later
// needs no more space, and open for that.
func (s *Store) NewLog(id disk.Identity, log uuid.UUID, size int64) (*os.File, error) {
	_, name := pair(key(id), log)
	f, err := s.folder.create(name)
	if err != nil {
		return nil, fmt.Errorf("make a log: %w", err)
	}
	if _, err = f.Write(make([]byte, size)); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = s.folder.sync()
	}
	if err != nil {
		f.Close()
		_ = s.folder.remove(name)
		return nil, fmt.Errorf("make a log: %w", err)
	}
	opened, _ := f.(*os.File) // a test has another
	return opened, nil
}

// WriteBase makes b the base of a log, durably.
func (s *Store) WriteBase(id disk.Identity, log uuid.UUID, b []byte) error {
	name, _ := pair(key(id), log)
	if err := replace(s.folder, name, b); err != nil {
		return fmt.Errorf("write the base of the log: %w", err)
	}
	return nil
}

// Run makes r the running record of its disk. It is durable when Run returns nil. After
// an error either this one or the one before counts.
func (s *Store) Run(r Record) error {
	text, err := r.encode()
	if err == nil {
		err = replace(s.folder, key(r.Identity)+runningSuffix, text)
	}
	if err != nil {
		return fmt.Errorf("write the running record: %w", err)
	}
	return nil
}

// RemoveLog removes a log that does not count.
func (s *Store) RemoveLog(id disk.Identity, log uuid.UUID) {
	base, name := pair(key(id), log)
	for _, n := range []string{name, base, base + newSuffix} {
		_ = s.folder.remove(n)
	}
}

// Tidy removes the logs of a disk, but for one.
func (s *Store) Tidy(id disk.Identity, but uuid.UUID) {
	k := key(id)
	base, log := pair(k, but)
	names, _ := s.folder.names()
	for _, n := range names {
		trunk := strings.TrimSuffix(n, newSuffix)
		if strings.HasPrefix(n, k+".") && n != base && n != log && (strings.HasSuffix(trunk, baseSuffix) || strings.HasSuffix(trunk, logSuffix)) {
			_ = s.folder.remove(n)
		}
	}
}

// FindRunning is what was kept of a disk that had a filter when the power failed: its
// record, the base and the log, each of at most limit bytes. The error is a *Refusal,
// with the reason NoState if there is no running record.
func (s *Store) FindRunning(id disk.Identity, limit int64) (r *Record, base, log []byte, err error) {
	k := key(id)
	if r, err = s.record(k + runningSuffix); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, nil, refuse(NoState, "the disk had no filter with a log")
		}
		return nil, nil, nil, refusalOf(err)
	}
	baseName, logName := pair(k, r.ID)
	if base, err = s.folder.read(baseName, limit); err == nil {
		log, err = s.folder.read(logName, limit)
	}
	if err != nil {
		no := refusalOf(err)
		no.Record = r
		return nil, nil, nil, no
	}
	return r, base, log, nil
}

// Stop sees to that what is kept of a disk that has a filter is not believed after a
// power failure. It is durable when Stop returns nil.
func (s *Store) Stop(id disk.Identity) error {
	if err := s.useUp(key(id), runningSuffix); err != nil {
		return fmt.Errorf("take back the running record: %w", err)
	}
	s.Tidy(id, uuid.Nil)
	return nil
}
