package snapshots

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/diffarea"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile/statefiletest"
)

// TestDamage: no file of a dead daemon's snapshot is believed that is damaged in any way,
// as far as its content tells. What is data, and words that change by single stores, have
// no checksum: they are memory of the daemon's, in which root alone can write.
func TestDamage(t *testing.T) {
	l := newLife(t, "directory")
	l.Encrypt, l.Reserve = true, 1 // which only the newest version of the record knows
	dieTaken(t, l, nil)
	dir := filepath.Join(l.path("state"), l.ID)
	id := uuid.MustParse(l.ID)
	r, err := readRecord(dir, id)
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	r.Note = json.RawMessage("{}") // with which it has the latest version
	if err := statefile.Write(path(recordName), recordKind, r.version(), r); err != nil {
		t.Fatal(err)
	}
	d := daemonOf(t, l)
	// with calls f with the directory, as the next daemon opens it.
	with := func(f func(s *state) error) error {
		s, err := openState(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer s.release()
		return f(s)
	}
	statefiletest.Try(t, statefiletest.Statefile(t, "snapshot", path(recordName), func() error {
		_, err := readRecord(dir, id)
		return err
	}))
	take := TakeSize(len(r.Devices))
	statefiletest.Try(t, statefiletest.File{Kind: "take", Path: path(takeName), Header: int(take),
		Future: func(whole []byte) []byte { whole[7]++; return whole },
		Read: func() error {
			mem, err := readOwn(path(takeName), take)
			if err != nil {
				return err
			}
			if _, _, wrong := (TakePage{mem}).read(len(r.Devices)); wrong != "" {
				return errors.New(wrong)
			}
			return nil
		}})
	log := func() error {
		return with(func(s *state) error {
			c, err := s.logConfig(s.reopen, r.Chunk, r.Pool)
			if err != nil {
				return err
			}
			if c.Seal, err = s.reopenSeal(); err != nil {
				return err
			}
			_, err = diffarea.OpenLog(c, []diffarea.Storage{{File: c.Pool.File}})
			return err
		})
	}
	const next, slots = 16, 32 // how far it is, and whether it is broken: single stores
	statefiletest.Try(t, statefiletest.File{Kind: "log", Path: path(logName), Header: 56, Free: [][2]int{{next, slots}}, Read: log,
		Future: func(whole []byte) []byte { whole[7]++; return whole }})
	statefiletest.Try(t, statefiletest.File{Kind: "pool", Path: path("pool"), Data: true, Read: log})
	// Another key is not that of the log.
	statefiletest.Try(t, statefiletest.File{Kind: "key", Path: path(keyName), Header: keySize, Read: log})
	statefiletest.Try(t, statefiletest.File{Kind: "words", Path: path(wordsName(0)), Data: true, Read: func() error {
		return with(func(s *state) error {
			_, f, err := s.reopen(wordsName(0), diffarea.TableSize(diffarea.Chunk(r.Devices[0].Size/r.Chunk)), true)
			if err == nil {
				f.Close()
			}
			return err
		})
	}})
	if err := l.left(t).Clear(d.config()); err != nil {
		t.Error(err)
	}
	l.checkGone(t)
}
