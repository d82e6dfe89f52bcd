package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
	"github.com/ublk-blksnap/ublk-blksnap/internal/statefile"
)

// Hooks are programs in a directory that are run around a take, as for a database that is to
// write down all that it has:
//
//	each pre, in order ──> freeze, cut, thaw ──> each post whose pre was begun, backwards
//	        │ fails, or is late                          ^
//	        └─────────────────── nothing is taken ───────┘
//
// Whoever dies in between leaves on record which pre was begun. The next daemon runs the post
// of these before it changes anything. A post may therefore come more than once, but never
// not at all. The prober runs them, with a limit for each.

// hookRun is a take around which hooks are run, in state/hooks while a post is owed.
type hookRun struct {
	Hooks    []string `json:"hooks"` // whose pre was begun, as paths
	Snapshot string   `json:"snapshot"`
	Name     string   `json:"name,omitempty"`
	Devices  []string `json:"devices"` // names of filters
	Disks    []string `json:"disks"`   // their originals
	Mounts   []string `json:"mounts"`  // of the filesystems on them
	// failed are the hooks that have failed and did not keep the take.
	failed []string
}

const hooksKind, hooksFormat = "hooks", 1

func (d *Daemon) hooksFile() string { return filepath.Join(d.opts.Dir.State(), hooksKind) }

// findHooks are the paths of the hooks.
func (d *Daemon) findHooks(ctx context.Context) ([]string, error) {
	dir := d.opts.Config.HookDir
	if dir == "" {
		return nil, nil
	}
	ctx, cancel := d.withDiskTimeout(ctx)
	defer cancel()
	err := disk.ErrGone
	var names []string
	if d.opts.Prober != nil {
		names, err = d.opts.Prober.FindHooks(ctx, dir)
	}
	if errors.Is(err, disk.ErrGone) {
		// Nobody can run them. That there are none this process can see by itself.
		if !d.host.Exists(dir) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("look for hooks in %s: %w", dir, err)
	}
	for i, name := range names {
		names[i] = filepath.Join(dir, name)
	}
	return names, nil
}

// beforeTake runs each hook before a take. If the take shall not be made, nothing is owed any
// more when beforeTake returns. It needs opLock.
func (d *Daemon) beforeTake(ctx context.Context, s *snapshot, without bool) (*hookRun, error) {
	run := &hookRun{Snapshot: s.id, Name: s.note.Name}
	if without || len(s.images) == 0 {
		return run, nil
	}
	for _, im := range s.images {
		run.Devices, run.Disks = append(run.Devices, im.device.Name), append(run.Disks, im.device.Original)
	}
	for _, m := range d.mountsOver(s) {
		run.Mounts = append(run.Mounts, m.Point)
	}
	if err := d.beforeTakeOf(ctx, run); err != nil {
		return nil, err
	}
	return run, nil
}

// beforeTakeOf is beforeTake, when it is known of what.
func (d *Daemon) beforeTakeOf(ctx context.Context, run *hookRun) error {
	hooks, err := d.findHooks(ctx)
	if err != nil {
		if d.opts.Config.HooksRequired {
			return d.hookError(err)
		}
		d.hookFailed(run, err.Error())
	}
	for _, hook := range hooks {
		next := *run
		next.Hooks = append(next.Hooks, hook)
		err := statefile.Write(d.hooksFile(), hooksKind, hooksFormat, next)
		if err == nil {
			run.Hooks = next.Hooks
			err = d.runHook(ctx, run, hook, "pre")
		}
		if err == nil {
			continue
		}
		err = fmt.Errorf("hook %s before the take: %w", filepath.Base(hook), err)
		if d.opts.Config.HooksRequired || ctx.Err() != nil || d.ending.begun.Load() {
			d.afterTake(run, err)
			return d.hookError(err)
		}
		d.hookFailed(run, err.Error())
	}
	return nil
}

// afterTake runs the hooks after a take that ended with err; needs opLock.
func (d *Daemon) afterTake(run *hookRun, err error) {
	env := []string{"UBLK_BLKSNAP_RESULT=taken"}
	if err != nil {
		text, _, _ := strings.Cut(strings.ReplaceAll(publicPaths(err.Error()), "\x00", ""), "\n")
		env = []string{"UBLK_BLKSNAP_RESULT=failed", "UBLK_BLKSNAP_ERROR=" + text}
	}
	for _, hook := range slices.Backward(run.Hooks) {
		if err := d.runHook(context.Background(), run, hook, "post", env...); err != nil {
			d.hookFailed(run, fmt.Sprintf("hook %s after the take: %v", filepath.Base(hook), err))
		}
	}
	if len(run.Hooks) > 0 {
		_ = os.Remove(d.hooksFile()) // nothing is owed any more
	}
}

// runHook runs one, in one of its phases.
func (d *Daemon) runHook(ctx context.Context, run *hookRun, hook, phase string, env ...string) error {
	d.step("take snapshot %s: run the hook %s (%s)", run.Snapshot, filepath.Base(hook), phase)
	if d.opts.Prober == nil {
		return disk.ErrGone
	}
	if phase == "pre" { // the end of the machine waits for no hook
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(d.ending.untilEnd, cancel)()
	}
	return d.opts.Prober.RunHook(ctx, disk.Hook{
		Path: hook, Args: []string{phase}, Limit: d.opts.Config.HookTimeout,
		Env: append([]string{
			"UBLK_BLKSNAP_PHASE=" + phase,
			"UBLK_BLKSNAP_SNAPSHOT=" + run.Snapshot,
			"UBLK_BLKSNAP_NAME=" + run.Name,
			"UBLK_BLKSNAP_DEVICES=" + strings.Join(run.Devices, " "),
			"UBLK_BLKSNAP_DISKS=" + strings.Join(run.Disks, " "),
			"UBLK_BLKSNAP_MOUNTS=" + strings.Join(run.Mounts, "\n"),
		}, env...),
	})
}

// hookFailed tells of a hook that has failed and does not keep the take.
func (d *Daemon) hookFailed(run *hookRun, what string) {
	run.failed = append(run.failed, what)
	d.opts.Log.Warn("a hook has failed", "snapshot", run.Snapshot, "error", what)
	d.events.emit(control.Event{Snapshot: run.Snapshot, Kind: control.EventHookFailed, Text: what})
}

// hookError is the error of a take that hooks have cancelled.
func (d *Daemon) hookError(err error) error {
	e := fail(err, "run hooks")
	e.Fix = "nothing was taken; mend the hook in " + d.opts.Config.HookDir + ", or take with --no-hooks"
	if errors.Is(err, disk.ErrHookLate) {
		e.Code, e.Errno = control.Timeout, unix.ETIMEDOUT
	}
	return e
}

// runOwedHooks runs what a dead daemon owes; needs opLock.
func (d *Daemon) runOwedHooks() {
	var run hookRun
	err := statefile.Load(d.hooksFile(), hooksKind, hooksFormat, &run)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		d.opts.Log.Error("it is not known which hooks are to be run after a take whose daemon has died", "error", err)
		return
	}
	d.opts.Log.Warn("hooks are run for a daemon that died around a take", "snapshot", run.Snapshot, "hooks", run.Hooks)
	err = errors.New("the daemon has died")
	d.mu.Lock()
	if s := d.snapshots[run.Snapshot]; s != nil && s.taken != nil && !s.destroying {
		err = nil
	}
	d.mu.Unlock()
	d.afterTake(&run, err)
	d.activity.Store(new(string))
}
