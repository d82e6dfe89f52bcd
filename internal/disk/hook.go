package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Hooks are programs of the administrator's that are run around a take. They may lie on a
// disk of the daemon's own, so the Prober's process looks for them, too.

// Hook is a hook to run.
type Hook struct {
	Path  string        `json:"path"` // as everybody sees it
	Args  []string      `json:"args"` // without its name
	Env   []string      `json:"env"`  // beside the usual PATH
	Limit time.Duration `json:"limit_ns"`
}

// Why a hook has not done what it should. They arrive wrapped.
var (
	ErrHookFailed = errors.New("failed")
	ErrHookLate   = errors.New("took too long")
)

const (
	// hookFarewell is how long a hook that is to end has for that.
	hookFarewell = 2 * time.Second
	// hookOutput is how long a hook's output is waited for when it has ended: something that
	// it has left running may have it open.
	hookOutput = time.Second
)

// FindHooks are the names of the hooks in a directory, in order; none if it is not there. It
// fails if one of them is not root's alone, or cannot be run.
func (p *Prober) FindHooks(ctx context.Context, dir string) ([]string, error) {
	a, err := p.ask(ctx, question{FindHooks: dir})
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return a.Hooks, err
}

// RunHook runs a hook. It and what it has started are killed when its time is over, when ctx
// ends, and when this process dies; RunHook returns when that is done. The error says how it
// has ended otherwise than well.
func (p *Prober) RunHook(ctx context.Context, h Hook) error {
	theirs, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	r, err := p.put(question{Hook: &h}, theirs)
	theirs.Close()
	if err != nil {
		hold.Close()
		return err
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { hold.Close() })
	defer func() {
		if stop() {
			hold.Close()
		}
	}()
	// Longer than the Prober needs: it may be gone without a word.
	limited, cancel := context.WithTimeout(context.Background(), h.Limit+2*hookFarewell+2*hookOutput)
	defer cancel()
	a, err := hear(limited, r)
	switch {
	case err != nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case a.Overdue:
		return fmt.Errorf("%w: it was ended after %v", ErrHookLate, h.Limit)
	case a.Error != "":
		return fmt.Errorf("%w: %s", ErrHookFailed, a.Error)
	}
	return nil
}

// leftByEditors is what editors and packages leave beside a file.
var leftByEditors = regexp.MustCompile(`^\.|~$|\.(dpkg|ucf|rpm)[-a-z]*$`)

// findHooks is FindHooks in the Prober's process.
func findHooks(root, dir string) (names []string, err error) {
	entries, err := os.ReadDir(filepath.Join(root, dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if leftByEditors.MatchString(e.Name()) {
			continue
		}
		if err := checkHook(root, filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
		names = append(names, e.Name())
	}
	return names, nil
}

// checkHook refuses a hook that somebody else than root could have written or put there.
func checkHook(root, path string) error {
	for at := path; ; at = filepath.Dir(at) {
		var st unix.Stat_t
		// Not joined: the root itself may be a link in /proc, and is followed.
		if err := unix.Lstat(strings.TrimSuffix(root, "/")+at, &st); err != nil {
			return fmt.Errorf("look at %s: %w", at, err)
		}
		if at != path && st.Mode&unix.S_ISVTX != 0 {
			st.Mode &^= 0o022 // there nobody can replace what is not his own
		}
		switch {
		case at == path && st.Mode&unix.S_IFMT != unix.S_IFREG:
			return fmt.Errorf("%s is no regular file: put the program itself there", at)
		case at == path && st.Mode&0o111 == 0:
			return fmt.Errorf("%s cannot be executed: chmod +x it, or remove it", at)
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			return fmt.Errorf("%s is a link: name the directory that it leads to", at)
		case st.Uid != 0 || st.Mode&0o022 != 0:
			return fmt.Errorf("%s is not root's alone: chown root and chmod go-w it", at)
		case at == "/":
			return nil
		}
	}
}

// runHook is RunHook in the Prober's process, until nobody has the other end of hold.
func runHook(root string, h Hook, hold *os.File) answer {
	if err := checkHook(root, h.Path); err != nil {
		return answer{Error: err.Error()}
	}
	ctx, cancel := context.WithTimeout(context.Background(), h.Limit)
	defer cancel()
	go func() {
		_, _ = hold.Read(make([]byte, 1))
		cancel()
	}()
	said := kept{last: true}
	cmd := exec.CommandContext(ctx, h.Path, h.Args...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}, h.Env...)
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a group of its own, to be killed
	cmd.WaitDelay = hookOutput
	cmd.Cancel = func() error {
		group := -cmd.Process.Pid
		_ = unix.Kill(group, unix.SIGTERM)
		for end := time.Now().Add(hookFarewell); time.Now().Before(end) && unix.Kill(group, 0) == nil; {
			time.Sleep(10 * time.Millisecond)
		}
		_ = unix.Kill(group, unix.SIGKILL) // what has not ended by itself
		return nil
	}
	if err := startOutside(root, cmd); err != nil {
		return answer{Error: err.Error()}
	}
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid), []byte("0"), 0)
	err := cmd.Wait()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return answer{Overdue: true}
	case err == nil, errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil:
		return answer{}
	}
	text := strings.TrimSpace(string(said.text))
	if text != "" {
		text = ": " + text[strings.LastIndexByte(text, '\n')+1:]
	}
	return answer{Error: err.Error() + text}
}

// startOutside starts a program where everybody is, and not in the daemon's own mount
// namespace: a program of the administrator's may mount things.
func startOutside(root string, cmd *exec.Cmd) error {
	if root == "/" {
		return cmd.Start()
	}
	started := make(chan error)
	go func() {
		// The thread ends with this goroutine, because nobody else may have it any more.
		runtime.LockOSThread()
		err := func() error {
			ns, err := os.Open("/proc/1/ns/mnt")
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("leave the mount namespace: %w", err)
			}
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("leave the mount namespace: %w", err)
			}
			return cmd.Start()
		}()
		started <- err
	}()
	return <-started
}
