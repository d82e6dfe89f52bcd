package daemon

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// A snapshot is found by its UUID, by a beginning of it, by its name, by the path of an image,
// or as the latest one. So a name is none of these.

// uuidShape is a UUID, of which a beginning is one too if the rest of it fits.
const uuidShape = "00000000-0000-0000-0000-000000000000"

// looksLikeUUID says whether text is a UUID or the beginning of one.
func looksLikeUUID(text string) bool {
	if text == "" || len(text) > len(uuidShape) {
		_, err := uuid.Parse(text) // there are longer ways to write one
		return err == nil
	}
	rest := strings.Map(func(r rune) rune {
		if strings.ContainsRune("0123456789abcdefABCDEF", r) {
			return '0'
		}
		return r
	}, text)
	if strings.HasPrefix(uuidShape, rest) {
		return true
	}
	_, err := uuid.Parse(text)
	return err == nil
}

// endsInUUID says whether a name ends as the image of a snapshot without a name does.
var endsInUUID = regexp.MustCompile(`-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

const (
	maxLabels     = 32
	maxLabelValue = 256 // bytes
)

// checkSnapshotName refuses what no snapshot can be called, and needs opLock.
func (d *Daemon) checkSnapshotName(name string) error {
	switch {
	case name == "":
		return nil
	case !validName.MatchString(name):
		return invalid("name %q: use up to 64 letters, digits and . _ + -", name)
	case name == control.Latest:
		return invalid("name %q: it stands for the snapshot that was created last: choose another", name)
	case looksLikeUUID(name):
		return invalid("name %q: it could be the beginning of a UUID: choose another, with a letter from g to z", name)
	case endsInUUID.MatchString(name):
		return invalid("name %q: it ends in a UUID: choose another", name)
	}
	for _, s := range d.sortedSnapshots() {
		if s.note.Name == name && !s.releasing {
			return &control.Error{Code: control.Exists, Errno: unix.EEXIST, Message: fmt.Sprintf("the name %s is taken by snapshot %s", name, s.id),
				Fix: "choose another with --name, or destroy that one first: ublk-blksnap snapshot destroy " + name}
		}
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return invalid("%d labels: at most %d", len(labels), maxLabels)
	}
	for key, value := range labels {
		if !validName.MatchString(key) {
			return invalid("label %q: use up to 64 letters, digits and . _ + -", key)
		}
		if len(value) > maxLabelValue || !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
			return invalid("label %s: its value is to be a text of one line, of at most %d bytes", key, maxLabelValue)
		}
	}
	return nil
}

// findSnapshot is the snapshot that is called so.
func (d *Daemon) findSnapshot(ref string) (*snapshot, error) {
	if u, err := uuid.Parse(ref); err == nil {
		d.mu.Lock()
		s := d.snapshots[u.String()]
		d.mu.Unlock()
		if s == nil {
			return nil, d.explainSnapshot(noSnapshot(u.String()), u.String())
		}
		return s, nil
	}
	if !filepath.IsAbs(ref) && !validName.MatchString(ref) {
		return nil, invalid("snapshot %q: neither a name nor a UUID", ref)
	}
	switch found := d.snapshotsCalled(ref); len(found) {
	case 0:
		return nil, d.explainSnapshot(noSnapshot(ref), ref)
	case 1:
		return found[0], nil
	default:
		var which []string
		for _, s := range found {
			which = append(which, s.called())
		}
		return nil, invalid("snapshot %s: it may be %s: write more of the UUID", ref, strings.Join(which, " or "))
	}
}

// snapshotsCalled are the snapshots that ref, which is no whole UUID, may stand for.
func (d *Daemon) snapshotsCalled(ref string) []*snapshot {
	all := d.sortedSnapshots()
	d.mu.Lock()
	defer d.mu.Unlock()
	which := func(fits func(*snapshot) bool) (found []*snapshot) {
		for _, s := range all {
			if fits(s) {
				found = append(found, s)
			}
		}
		return found
	}
	switch {
	case ref == control.Latest:
		found := which(func(s *snapshot) bool { return !s.destroying })
		return found[max(0, len(found)-1):]
	case filepath.IsAbs(ref):
		path := filepath.Clean(ref)
		return which(func(s *snapshot) bool {
			return slices.ContainsFunc(s.images, func(im *image) bool { return im.ublk != nil && (im.link == path || im.ublk.Path == path) })
		})
	case looksLikeUUID(ref):
		return which(func(s *snapshot) bool { return strings.HasPrefix(s.id, strings.ToLower(ref)) })
	}
	// One whose images are gone has given its name up, and is found by it if no other has it.
	if found := which(func(s *snapshot) bool { return s.note.Name == ref && !s.releasing }); len(found) > 0 {
		return found
	}
	return which(func(s *snapshot) bool { return s.note.Name == ref })
}

// called is the snapshot's UUID, with its name if it has one.
func (s *snapshot) called() string {
	if s.note.Name == "" {
		return s.id
	}
	return s.id + " (" + s.note.Name + ")"
}

// imageName is the name of the image of a device below linkDir. If the snapshot has a name,
// that is the same each time.
func (s *snapshot) imageName(device string) string {
	if s.note.Name != "" {
		return filepath.Join(imageDir, s.note.Name, device)
	}
	return filepath.Join(imageDir, device+"-"+s.id)
}

// noteName is how udev knows image i, whose rules put it into the folder of images.
func (s *snapshot) noteName(i int) string {
	return strings.TrimPrefix(s.imageName(s.images[i].device.Name), imageDir+"/")
}
