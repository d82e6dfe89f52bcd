package daemon

import (
	"context"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/snapshots"
)

// Snapshots implements control.API.
func (d *Daemon) Snapshots(context.Context) ([]control.Snapshot, error) {
	out := []control.Snapshot{}
	for _, s := range d.sortedSnapshots() {
		out = append(out, d.describeSnapshot(s))
	}
	return out, nil
}

// Snapshot implements control.API.
func (d *Daemon) Snapshot(_ context.Context, id string) (control.Snapshot, error) {
	s, err := d.findSnapshot(id)
	if err != nil {
		return control.Snapshot{}, err
	}
	return d.describeSnapshot(s), nil
}

func (d *Daemon) describeSnapshot(s *snapshot) control.Snapshot {
	out := control.Snapshot{ID: s.id, Created: s.created, ChunkSize: s.chunk, Encrypted: s.encrypted, Images: []control.SnapshotImage{}, Storage: []control.Storage{}}
	s.use.RLock()
	var spaces []snapshots.Space
	if !s.gone {
		out.Usage = s.usage()
		out.Errno = -int(s.snap.Err())
		spaces = s.snap.Spaces()
	} else {
		out.Errno = -int(unix.ESHUTDOWN)
	}
	s.use.RUnlock()
	if out.Errno == 0 && d.passedBy(s) != nil {
		out.Errno = -int(unix.ENODEV)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	out.Taken, out.Frozen, out.AutoAppend = s.taken, s.frozen, s.note.AutoAppend
	out.Name, out.Labels, out.Overdue, out.Warnings = s.note.Name, s.note.Labels, s.overdue, s.warnings
	if s.note.Ends != 0 {
		expires := s.note.Ends.wall()
		out.Expires = &expires
	}
	out.Storage = append(out.Storage, s.storage...)
	for i := range out.Storage {
		st := &out.Storage[i]
		if n := slices.IndexFunc(spaces, func(sp snapshots.Space) bool { return sp.Path == st.Path }); n >= 0 {
			st.Most, st.Spare = spaces[n].Most, spaces[n].Spare
			spaces = spaces[n+1:]
		}
	}
	out.State = s.stateLocked(out.Errno != 0)
	for _, im := range s.images {
		img := control.SnapshotImage{Device: im.device.Name, Original: im.device.Original, Errno: out.Errno}
		if im.ublk != nil {
			img.Path, img.Link = im.ublk.Path, im.link
			take := takeOf(im.take)
			img.Take = &take
		}
		out.Images = append(out.Images, img)
	}
	return out
}

// passedBy is a device of a snapshot by whose filter requests pass, nil if there is none. The
// snapshot's images may be newer than its take then.
func (d *Daemon) passedBy(s *snapshot) *device {
	d.mu.Lock()
	images := slices.Clone(s.images)
	d.mu.Unlock()
	for _, im := range images {
		release, err := im.device.hold()
		if err != nil {
			continue
		}
		_ = d.checkTable(im.device)
		release()
		if im.device.whyBypassed() != "" {
			return im.device
		}
	}
	return nil
}

// stateLocked needs Daemon.mu.
func (s *snapshot) stateLocked(broken bool) string {
	switch {
	case s.destroying:
		return control.SnapshotDestroying
	case broken:
		return control.SnapshotCorrupted
	case s.taken != nil:
		return control.SnapshotTaken
	}
	return control.SnapshotCreated
}
