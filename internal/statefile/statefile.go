// Package statefile keeps what a daemon must find again after its death in small
// files, each of which is there whole or not at all.
//
//	ublk-blksnap KIND VERSION SUM LENGTH\n
//	LENGTH bytes of JSON\n
//
// SUM is the CRC-32C of "KIND VERSION LENGTH\n" and all that follows, in
// hexadecimal. A file is written under another name and then renamed: whoever
// dies in between leaves the old one. It is meant for a tmpfs, so nothing is
// synced.
//
// [Read] trusts nobody: the file has to belong to this user alone, and to be what
// this program, in this version or an older one, has written.
package statefile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/deathpoint"
)

// What is wrong with a file. They arrive wrapped, with its path and the way out.
var (
	ErrDamaged = errors.New("damaged")
	ErrNewer   = errors.New("written by a newer version")
	ErrForeign = errors.New("not ours alone")
)

const (
	magic    = "ublk-blksnap"
	maxSize  = 16 << 20
	fileMode = 0o600
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Write replaces the file at path by one that holds v. There is one writer at a
// time. On an error the file is what it was.
func Write(path, kind string, version int, v any) error {
	text, err := Encode(kind, version, v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, fileMode)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	deathpoint.Point()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		deathpoint.Point()
		err = os.Rename(fresh, path)
	}
	if err != nil {
		os.Remove(fresh)
		return fmt.Errorf("write %s: %w", path, err)
	}
	deathpoint.Point()
	return nil
}

// Encode is the whole text of a file that holds v.
func Encode(kind string, version int, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return frame(kind, version, body), nil
}

func frame(kind string, version int, body []byte) []byte {
	what := fmt.Sprintf("%s %d", kind, version)
	return fmt.Appendf(nil, "%s %s %08x %d\n%s\n", magic, what, sum(kind, version, body), len(body), body)
}

func sum(kind string, version int, body []byte) uint32 {
	head := fmt.Appendf(nil, "%s %d %d\n", kind, version, len(body))
	return crc32.Update(crc32.Checksum(append(head, body...), castagnoli), castagnoli, []byte("\n"))
}

// Read returns the JSON of the file at path, and the version that it was written
// with: newest or an older one. The error wraps fs.ErrNotExist, ErrDamaged,
// ErrNewer or ErrForeign, or is that of a system call.
func Read(path, kind string, newest int) (body []byte, version int, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, 0, fmt.Errorf("%s: %w: it is a link: remove it", path, ErrForeign)
	}
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	if err := CheckOwn(f); err != nil {
		return nil, 0, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, 0, fmt.Errorf("read %s: %w", path, err)
	}
	return Decode(path, text, kind, newest)
}

// Decode is Read of a text that was at path, whoever it belongs to.
func Decode(path string, text []byte, kind string, newest int) (body []byte, version int, err error) {
	damaged := func(what string) error {
		return fmt.Errorf("%s: %w: %s: nothing of it is used", path, ErrDamaged, what)
	}
	head, body, ok := bytes.Cut(text, []byte("\n"))
	fields := bytes.Split(head, []byte(" "))
	switch {
	case len(text) > maxSize:
		return nil, 0, damaged("too large")
	case !ok || len(fields) != 5 || string(fields[0]) != magic:
		return nil, 0, damaged("no heading")
	}
	version, err1 := strconv.Atoi(string(fields[2]))
	length, err2 := strconv.Atoi(string(fields[4]))
	switch {
	case err1 != nil || err2 != nil || length < 0 || len(body) != length+1 || body[length] != '\n':
		return nil, 0, damaged("it is cut off, or its heading is wrong")
	case !bytes.Equal(text, frame(string(fields[1]), version, body[:length])):
		return nil, 0, damaged("its checksum is wrong")
	case string(fields[1]) != kind:
		return nil, 0, damaged(fmt.Sprintf("it is a %q, not a %q", fields[1], kind))
	case version > newest:
		return nil, 0, fmt.Errorf("%s: %w of ublk-blksnap: it has version %d, and this one knows up to %d: start that one again", path, ErrNewer, version, newest)
	case version < 1:
		return nil, 0, damaged("no version")
	}
	return body[:length], version, nil
}

// Load is Read and Unmarshal, for who makes the same of all versions.
func Load(path, kind string, newest int, v any) error {
	body, _, err := Read(path, kind, newest)
	if err != nil {
		return err
	}
	return Unmarshal(path, body, v)
}

// Unmarshal makes v of the body of the file at path. A field that v does not have is an
// error that wraps ErrDamaged: it was written by another program, and means something.
func Unmarshal(path string, body []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%s: %w: %w: nothing of it is used", path, ErrDamaged, err)
	}
	return nil
}

// CheckOwn makes sure that an open file is a regular one with one name, and that
// nobody but this user can read or write it.
func CheckOwn(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("look at %s: %w", f.Name(), err)
	}
	foreign := func(what string) error {
		return fmt.Errorf("%s: %w: %s: nothing of it is used", f.Name(), ErrForeign, what)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return foreign("it is no regular file")
	case int(st.Uid) != os.Geteuid():
		return foreign(fmt.Sprintf("it belongs to user %d", st.Uid))
	case st.Mode&0o077 != 0:
		return foreign(fmt.Sprintf("it has the mode %o", st.Mode&0o7777))
	case st.Nlink != 1:
		return foreign(fmt.Sprintf("it has %d names", st.Nlink))
	}
	return nil
}
