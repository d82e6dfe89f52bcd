package cbtstate

import (
	"bytes"
	"errors"
	"math/rand"
	"slices"
	"testing"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/fingerprint"
)

// TestRunningPowerFailure takes the power at every operation of a life with
// logs and bases that ends as it should, or is taken back. What is found is the last base
// that was written, whole, or the one under way; nothing once it was taken back; and the
// clean record once that was saved.
func TestRunningPowerFailure(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	id := disk.Identity{"serial=x"}
	var bases [4][]byte
	var records [4]Record
	for i := range records {
		bases[i] = make([]byte, 3000+i)
		rnd.Read(bases[i])
		records[i] = Record{ID: uuid.New(), Name: "data", Disk: Disk{Identity: id}}
		if i%2 == 1 {
			records[i].ID = records[i-1].ID
		}
	}
	clean := Record{ID: uuid.New(), Name: "data", Disk: Disk{Identity: id, Size: 100}}
	for _, stop := range []bool{false, true} {
		for n, whole := 0, 0; whole < 50; n++ {
			for range 60 {
				l := newLossy(rnd)
				s := &Store{l}
				last, ended, mayEnd := -1, false, false
				l.left = n
				life := func() error {
					for i, r := range records {
						if i%2 == 0 {
							if _, err := s.NewLog(id, r.ID, 2000); err != nil {
								return err
							}
						}
						if err := s.WriteBase(id, r.ID, bases[i]); err != nil {
							return err
						}
						if err := s.Run(r); err != nil {
							return err
						}
						last = i
						s.Tidy(id, r.ID)
					}
					mayEnd = true
					if stop {
						if err := s.Stop(id); err != nil {
							return err
						}
					} else if err := s.Save(clean, bases[0], always); err != nil {
						return err
					}
					ended = true
					return nil
				}
				if life() == nil {
					whole++
				}
				after := &Store{l.after()}
				r, base, log, err := after.FindRunning(id, 1<<20)
				c, _, cleanErr := after.Find(id, "data", 1<<20)
				var no *Refusal
				switch {
				case err != nil && !errors.As(err, &no), cleanErr != nil && !errors.As(cleanErr, &no):
					t.Fatal(err, cleanErr)
				case cleanErr == nil && (stop || !mayEnd || c.ID != clean.ID):
					t.Fatalf("power lost after %d operations: found %+v", n, c)
				case cleanErr == nil:
				case ended && !stop:
					t.Fatalf("power lost after %d operations: Save had returned, and %v", n, cleanErr)
				case err == nil && ended:
					t.Fatalf("power lost after %d operations: %+v is believed, which was taken back", n, r)
				case err == nil:
					i := slices.IndexFunc(bases[:], func(b []byte) bool { return bytes.Equal(b, base) })
					if i < last || i > last+1 || r.ID != records[i].ID || len(log) != 2000 {
						t.Fatalf("power lost after %d operations: base %d is believed, the last one is %d", n, i, last)
					}
				case last >= 0 && !mayEnd:
					t.Fatalf("power lost after %d operations: base %d was written, and %v", n, last, err)
				}
			}
		}
	}
}

func TestJudgeRunning(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *Record, now *Disk)
		want   string
	}{
		"as it was":         {func(*Record, *Disk) {}, ""},
		"this boot":         {func(r *Record, now *Disk) { now.Boot = r.Boot }, Unclean},
		"a copy of it":      {func(r *Record, now *Disk) { r.Machine, now.Machine = "a", "b" }, OtherHost},
		"another identity":  {func(_ *Record, now *Disk) { now.Identity = disk.Identity{"serial=c"} }, OtherDisk},
		"another size":      {func(_ *Record, now *Disk) { now.Size++ }, OtherSize},
		"written":           {func(_ *Record, now *Disk) { now.Writes.Own[1]++ }, Written},
		"written past it":   {func(_ *Record, now *Disk) { now.Writes.WholeDisk[3]++ }, Written},
		"no counters":       {func(_ *Record, now *Disk) { now.Writes = nil }, Unknown},
		"superblock":        {func(_ *Record, now *Disk) { now.Fingerprint[0].SHA256 = "cc" }, Written},
		"no superblock now": {func(_ *Record, now *Disk) { now.Fingerprint = now.Fingerprint[1:] }, Written},
	} {
		r, now := &Record{Disk: aDisk}, aDisk
		now.Boot, now.Writes = "boot 2", &disk.Writes{Attached: 7}
		now.Fingerprint = append([]fingerprint.Place(nil), aDisk.Fingerprint...)
		c.change(r, &now)
		judged(t, name, r, r.JudgeRunning(now), c.want)
	}
}
