package disk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A path may lead through the very filesystem that a daemon serves the disk of. Whoever goes
// along it may have to wait for that disk, and a daemon that is killed meanwhile could not
// end: its thread waits for the disk, the disk for the next daemon, and that for the end of
// this one. So a daemon has its Prober go along paths and read small files, and gets what was
// found there as descriptors. What it does with those needs no name any more.

// mayWalk says whether this process goes along a path if there is nobody to do it.
func (h *Host) mayWalk(path string) bool {
	return !h.WalkerOnly || slices.ContainsFunc([]string{"/dev/", "/proc/", "/sys/", "/run/"}, func(top string) bool { return strings.HasPrefix(filepath.Clean(path), top) })
}

// goAlong has the Walker go along a path, or this process if it may and there is none.
func goAlong[T any](h *Host, path string, by func(*Prober) (T, error), self func() (T, error)) (T, error) {
	if h.Walker != nil {
		if found, err := by(h.Walker); !errors.Is(err, ErrGone) {
			return found, err
		}
	}
	if !h.mayWalk(path) {
		var none T
		return none, ErrGone
	}
	return self()
}

// way is a path that the process of a Prober goes along for others.
type way struct {
	Root  string      `json:"root"`
	Path  string      `json:"path"`
	Place bool        `json:"place,omitempty"` // for OpenPlace, else for Open with Flags and Mode
	Flags int         `json:"flags,omitempty"`
	Mode  os.FileMode `json:"mode,omitempty"`
	To    string      `json:"to,omitempty"`    // of CopyFile
	Stamp bool        `json:"stamp,omitempty"` // for Stamp
}

// walked is what was found. With it come the files: the one that was opened, or that of a
// Place, if it has one, and its directory, if it has one.
type walked struct {
	Op    string     `json:"op,omitempty"` // of an *os.PathError
	At    string     `json:"at,omitempty"` // and its path
	Errno unix.Errno `json:"errno,omitempty"`

	Foreign bool   `json:"foreign,omitempty"` // of an *Error, whose errno is above if it has none of the kinds
	What    string `json:"what,omitempty"`
	Fix     string `json:"fix,omitempty"`

	Mode    uint32 `json:"mode,omitempty"` // of the Place
	Base    string `json:"base,omitempty"`
	HasFile bool   `json:"has_file,omitempty"`
	HasDir  bool   `json:"has_dir,omitempty"`
}

// do is what the Prober's process does. The caller closes the files.
func (w way) do() (walked, []*os.File) {
	h := Host{Root: w.Root}
	if !w.Place {
		f, err := h.open(w.Path, w.Flags, w.Mode)
		var at *os.PathError
		if errors.As(err, &at) {
			a := walked{Op: at.Op, At: at.Path}
			errors.As(at.Err, &a.Errno)
			return a, nil
		}
		return walked{HasFile: true}, []*os.File{f}
	}
	p, err := h.openPlace(w.Path)
	var no *Error
	if errors.As(err, &no) {
		a := walked{What: no.What, Fix: no.Fix, Foreign: errors.Is(no.Kind, ErrForeign)}
		errors.As(no.Kind, &a.Errno)
		return a, nil
	}
	return walked{Mode: p.Mode, Base: p.Base, HasFile: p.File != nil, HasDir: p.Dir != nil},
		slices.DeleteFunc([]*os.File{p.File, p.Dir}, func(f *os.File) bool { return f == nil })
}

// walk has the process go along a path. Of the files the caller is the owner.
func (p *Prober) walk(w way) (a walked, files []*os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return a, nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "walked"), os.NewFile(uintptr(pair[1]), "walked")
	defer ours.Close()
	err = p.send(question{Walk: &w}, theirs)
	theirs.Close()
	if err != nil {
		return a, nil, err
	}
	text, oob := make([]byte, maxQuestion), make([]byte, unix.CmsgSpace(2*4))
	c, err := ours.SyscallConn()
	if err != nil {
		return a, nil, err
	}
	var n, oobn int
	var hears error
	err = c.Read(func(fd uintptr) bool {
		n, oobn, _, _, hears = unix.Recvmsg(int(fd), text, oob, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(hears, unix.EAGAIN) && !errors.Is(hears, unix.EINTR)
	})
	if err = errors.Join(err, hears); err != nil {
		return a, nil, err
	}
	if n == 0 {
		return a, nil, ErrGone
	}
	files = received(oob[:oobn], w.Path)
	if err := json.Unmarshal(text[:n], &a); err != nil {
		closeAll(files)
		return a, nil, err
	}
	return a, files, nil
}

// received are the files that came with a message, under a name of this process.
func received(oob []byte, name string) (files []*os.File) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		fds, _ := unix.ParseUnixRights(&m)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), name))
		}
	}
	return files
}

// answerWalk goes along a path for whoever has the other end of the socket.
func answerWalk(w way, socket *os.File) {
	a, files := w.do()
	defer closeAll(files)
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	text, err := json.Marshal(a)
	if err == nil {
		_ = unix.Sendmsg(int(socket.Fd()), text, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL) // or nobody waits any more
	}
}

// openBy is open by a Walker.
func (h *Host) openBy(p *Prober, path string, flags int, mode os.FileMode) (*os.File, error) {
	a, files, err := p.walk(way{Root: h.Root, Path: path, Flags: flags, Mode: mode})
	switch {
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	case a.Errno != 0:
		return nil, &os.PathError{Op: a.Op, Path: a.At, Err: a.Errno}
	case len(files) != 1:
		closeAll(files)
		return nil, &os.PathError{Op: "open", Path: path, Err: unix.EMFILE} // no place for a descriptor
	}
	return files[0], nil
}

// openPlaceBy is openPlace by a Walker.
func (h *Host) openPlaceBy(w *Prober, path string) (*Place, error) {
	a, files, err := w.walk(way{Root: h.Root, Path: path, Place: true})
	switch {
	case err != nil:
		return nil, &Error{err, path, err.Error(), ""}
	case a.Foreign:
		return nil, &Error{ErrForeign, path, a.What, a.Fix}
	case a.Errno != 0:
		return nil, &Error{a.Errno, path, a.What, a.Fix}
	}
	p := &Place{Path: path, Mode: a.Mode, Base: a.Base}
	for _, x := range []struct {
		to  **os.File
		has bool
	}{{&p.File, a.HasFile}, {&p.Dir, a.HasDir}} {
		if x.has && len(files) > 0 {
			*x.to, files = files[0], files[1:]
		}
	}
	if a.HasFile && p.File == nil || a.HasDir && p.Dir == nil {
		p.Close()
		return nil, &Error{unix.EMFILE, path, "no place for a descriptor", ""}
	}
	return p, nil
}

// largestText is how much of a file ReadFile reads, in bytes.
const largestText = 1 << 20

// ReadFile is the content of a file of text, below Root. The errors are those of Open; one that
// is larger than a file of text may be is EFBIG.
func (h *Host) ReadFile(path string) (string, error) {
	return askText(h, "content of", path, question{Read: &way{Root: h.Root, Path: path}})
}

// Stamp is another text when a file is another, or when the files in a directory are. The errors
// are those of Open.
func (h *Host) Stamp(path string) (string, error) {
	return askText(h, "times of", path, question{Read: &way{Root: h.Root, Path: path, Stamp: true}})
}

// CopyFile puts a copy of a file below Root in the place of one of this process's, which has
// the copy or what it had.
func (h *Host) CopyFile(path, to string, mode os.FileMode) error {
	_, err := askText(h, "copy of", path, question{Read: &way{Root: h.Root, Path: path, Mode: mode, To: to}})
	return err
}

// ReadNames are the names in a directory, in their order. The errors are those of Open.
func (h *Host) ReadNames(path string) ([]string, error) {
	text, err := askText(h, "names in", path, question{Read: &way{Root: h.Root, Path: path, Flags: unix.O_DIRECTORY}})
	var names []string
	if err == nil {
		err = json.Unmarshal([]byte(text), &names)
	}
	return names, err
}

func askText(h *Host, what, path string, q question) (string, error) {
	type read struct {
		text string
		err  error
	}
	failed := func(err error) error { return &os.PathError{Op: "read", Path: path, Err: err} }
	r, err := askPath(h, what, path, func() (r read) {
		a, err := goAlong(h, path, func(by *Prober) (answer, error) { return by.ask(context.Background(), q) },
			func() (answer, error) { return q.Read.read(), nil })
		switch {
		case errors.Is(err, ErrGone):
			err = failed(ErrGone)
		case err == nil && a.Errno != 0:
			err = failed(a.Errno)
		}
		return read{a.Text, err}
	}, func(read) {})
	if err != nil {
		return "", err
	}
	return r.text, r.err
}

// read is the content of what the way leads to: text, or the names in a directory as JSON.
func (w way) read() answer {
	h := Host{Root: w.Root}
	f, err := h.open(w.Path, unix.O_RDONLY|unix.O_NONBLOCK|w.Flags, 0)
	var text []byte
	switch {
	case err != nil:
	case w.Stamp:
		text, err = stampOf(f)
	case w.Flags&unix.O_DIRECTORY != 0:
		var names []string
		names, err = f.Readdirnames(-1)
		slices.Sort(names)
		text, _ = json.Marshal(names)
	case w.To != "":
		err = ReplaceFile(w.To, f, w.Mode)
	default:
		if text, err = io.ReadAll(io.LimitReader(f, largestText+1)); len(text) > largestText {
			err = unix.EFBIG
		}
	}
	if f != nil {
		f.Close()
	}
	if err != nil {
		errno := unix.EIO
		errors.As(err, &errno)
		return answer{Errno: errno}
	}
	return answer{Text: string(text)}
}

// stampOf is the Stamp of an open file or directory.
func stampOf(f *os.File) ([]byte, error) {
	line := func(text []byte, name string) []byte {
		var st unix.Stat_t
		_ = unix.Fstatat(int(f.Fd()), name, &st, unix.AT_EMPTY_PATH)
		return fmt.Appendf(text, "%q %d %d %d\n", name, st.Ino, st.Size, st.Mtim.Nano())
	}
	text := line(nil, "")
	if st, err := f.Stat(); err != nil || !st.IsDir() {
		return text, err
	}
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	for _, name := range names {
		text = line(text, name)
	}
	return text, err
}

// ReplaceFile puts a file with that content in the place of one, if there is one. The directory
// is of those that do not outlive the machine.
func ReplaceFile(path string, content io.Reader, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(mode), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
