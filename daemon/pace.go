package daemon

import (
	"sync"
	"time"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// How fast snapshots fill, and how long their storage lasts.

const (
	paceEach   = 2 * time.Second // a look at what is copied, and at the filesystem
	paceWindow = time.Minute     // over which a rate is taken
)

// pace is what was copied for a snapshot lately.
type pace struct {
	mu    sync.Mutex
	looks []paceLook
}

type paceLook struct {
	at     time.Time
	copied int64 // bytes
}

// add notes what is copied by now.
func (p *pace) add(now time.Time, copied int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := 0
	for old < len(p.looks) && now.Sub(p.looks[old].at) > paceWindow {
		old++
	}
	p.looks = append(p.looks[:0], p.looks[old:]...)
	p.looks = append(p.looks, paceLook{now, copied})
}

// rate is what was copied in the last minute, in bytes a second.
func (p *pace) rate(now time.Time, copied int64) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.looks {
		if since := now.Sub(l.at); since <= paceWindow+paceEach && since > 0 {
			return int64(float64(copied-l.copied) / since.Seconds())
		}
	}
	return 0
}

// percent of what there is.
func percent(used, of int64) int {
	if of <= 0 {
		return 0
	}
	return int(float64(used) / float64(of) * 100)
}

// lasts is how long room lasts at a rate; 0: for ever.
func lasts(room, rate int64) time.Duration {
	if rate <= 0 {
		return 0
	}
	seconds := min(float64(max(room, 0))/float64(rate), (100 * 365 * 24 * time.Hour).Seconds())
	return max(time.Duration(seconds*float64(time.Second)).Round(time.Second), time.Second)
}

// copied is in bytes.
func (s *snapshot) copied() int64 {
	u := s.snap.Usage()
	return u.Regions * u.ChunkSize
}

// usage waits for nobody.
func (s *snapshot) usage() control.SnapshotUsage {
	u := s.snap.Usage()
	out := control.SnapshotUsage{
		Copied:   u.Regions * u.ChunkSize,
		Stored:   (u.Regions - u.Unstored) * u.ChunkSize,
		Capacity: u.Capacity * u.ChunkSize,
		Limit:    max(u.Limit, 0) * u.ChunkSize,
		Need:     u.Need * u.ChunkSize,
	}
	out.Rate = s.pace.rate(time.Now(), out.Copied)
	if u.Limit < 0 || u.Need <= u.Limit {
		out.Percent = percent(out.Copied, out.Need)
		return out
	}
	out.Percent, out.Left = percent(out.Copied, out.Limit), lasts(out.Limit-out.Copied, out.Rate)
	return out
}

// watchRoom looks at the filesystems of a snapshot's storage until it is destroyed. If one
// does not answer, it waits as long.
func (s *snapshot) watchRoom() {
	look := time.NewTicker(paceEach)
	defer look.Stop()
	for {
		select {
		case <-s.destroyed:
			return
		case <-look.C:
		}
		s.use.RLock()
		gone := s.gone
		s.use.RUnlock()
		if !gone {
			s.snap.LookAtRoom()
		}
	}
}
