package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

// program is one run of the command line.
type program struct {
	name     string   // ublk-blksnap or blksnap
	blksnap  bool     // a command of blksnap's was called
	in       *os.File // nil: standard input
	out, err io.Writer
	// connect reaches the daemon, starting it if need be and start says so.
	connect func(ctx context.Context, start starts) (control.API, error)
	// terminal says whether a person reads what is written; nil: nobody does.
	terminal func(io.Writer) bool
	// driver says why there is no ublk driver.
	driver func() error

	json       bool
	compact    bool // JSON is a line for each result
	runDir     string
	configPath string
}

// starts says which daemon a command starts, if none runs.
type starts int

const (
	startNext  starts = iota // the one after a daemon that has died, if something waits for it
	startFirst               // any
	startNone                // none: it is to stop, or nothing is to be done
)

// run executes a command line and returns the exit status; an error has been
// written.
func (p *program) run(ctx context.Context, args []string) int {
	p.name = filepath.Base(args[0])
	root := p.root()
	root.SetArgs(args[1:])
	root.SetOut(p.out)
	root.SetErr(p.err)
	c, err := root.ExecuteContextC(ctx)
	p.blksnap = p.name == "blksnap" || c.Annotations[blksnapVerb] != ""
	return p.exit(err)
}

// exit is the one place where an error becomes text and an exit status.
func (p *program) exit(err error) int {
	if err == nil {
		return 0
	}
	var silent silentError
	if errors.As(err, &silent) {
		return int(silent)
	}
	if several, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // this one, not one within
		status := 0
		for _, err := range several.Unwrap() {
			status = cmp.Or(status, p.exit(err))
		}
		return status
	}
	e := &control.Error{Code: control.Internal}
	if within := new(control.Error); errors.As(err, &within) {
		*e = *within
	}
	e.Message = strings.TrimSuffix(err.Error(), ": "+e.Fix)
	if p.blksnap {
		inBlksnapsWords(e)
	}
	if p.json {
		_ = p.printJSON(p.err, map[string]any{"error": e})
	} else {
		fmt.Fprintf(p.err, "%s: %s\n", p.name, e)
	}
	if s := exitStatus(e.Code); !p.blksnap || s == statusInterrupted {
		return s
	}
	return statusFailed
}

func exitStatus(c control.Code) int {
	switch c {
	case control.Invalid:
		return statusUsage
	case control.NotFound:
		return statusNotFound
	case control.Unavailable:
		return statusNoDaemon
	case control.Busy:
		return statusBusy
	case control.GenerationEnded:
		return statusGenerationEnded
	case control.Corrupted:
		return statusCorrupted
	case control.Timeout:
		return statusTimeout
	case control.Interrupted:
		return statusInterrupted
	case control.Internal, control.Exists, control.ReadOnly, control.Unsupported, control.Denied, control.NoSpace:
	}
	return statusFailed
}

// silentError ends the program with this status after it has said everything.
type silentError int

func (silentError) Error() string { return "failed" }

// usage is the error of a command line that makes no sense.
func usage(format string, args ...any) error {
	return &control.Error{Code: control.Invalid, Message: fmt.Sprintf(format, args...)}
}

func (p *program) root() *cobra.Command {
	asBlksnap := p.name == "blksnap"
	root := &cobra.Command{
		Use:           p.name,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noCommand,
		RunE:          p.whichCommand,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().BoolVarP(&p.json, "json", "j", false, "print JSON")
	root.PersistentFlags().StringVar(&p.runDir, "run-dir", daemon.DefaultRunDir, "run directory of the daemon")
	root.PersistentFlags().StringVar(&p.configPath, "config", "", "configuration of a daemon that is started (default "+daemon.DefaultConfigPath+")")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		// The daemon that a command starts works in another directory.
		for _, path := range []*string{&p.runDir, &p.configPath} {
			if *path == "" {
				continue
			}
			var err error
			if *path, err = filepath.Abs(*path); err != nil {
				return err
			}
		}
		return nil
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		text := flagError(err)
		if c.HasParent() {
			text = c.Name() + ": " + text
		}
		return usage("%s: see %s --help", text, c.CommandPath())
	})
	if asBlksnap {
		root.Short = "Snapshots and changed-block tracking of block devices"
		script := p.completion()
		script.Hidden = true // it is not a verb of blksnap's
		root.AddCommand(p.version(), script)
		root.AddCommand(p.blksnapCommands()...)
		p.complete(root)
		return root
	}
	root.Version = longVersion()
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.Short = "Snapshots and changed-block tracking of block devices, on ublk"
	root.Long = root.Short + `

A filter device is put over a disk and used in its place. Through it changed
blocks are tracked and snapshots of one or several disks are taken at one
instant; each has a writable image device.

  ublk-blksnap add /dev/vdb                 a filter over /dev/vdb
  mount /dev/ublk-blksnap/vdb /mnt          used instead of /dev/vdb
  ublk-blksnap snapshot create vdb --storage /var/tmp --take
  mount -o ro /dev/ublk-blksnap/images/…    as it was
  ublk-blksnap cbt changes vdb --since …    what changed since a take
  ublk-blksnap remove vdb

A daemon does the work. "add" and "snapshot create" start it if none runs; other
commands do only if one has died and what it had waits for the next.
"ublk-blksnap doctor" tells whether this machine can run it.

` + statusHelp
	root.AddGroup(
		&cobra.Group{ID: "device", Title: "Devices:"},
		&cobra.Group{ID: "snapshot", Title: "Snapshots and changes:"},
		&cobra.Group{ID: "program", Title: "The program:"},
		&cobra.Group{ID: "blksnap", Title: "As blksnap has them:"},
	)
	root.SetHelpCommandGroupID("program")
	group := func(id string, cs ...*cobra.Command) {
		for _, c := range cs {
			c.GroupID = id
		}
		root.AddCommand(cs...)
	}
	group("device", p.add(), p.remove(), p.list(), p.status(), p.top())
	group("snapshot", p.snapshot(), p.cbt())
	group("program", p.daemon(), p.doctor(), p.config(), p.completion(), p.version())
	group("blksnap", p.blksnapCommands()...)
	root.AddCommand(p.probe(), p.guard(), p.manual())
	p.complete(root)
	return root
}

// noCommand refuses arguments that are no command, for commands that only hold
// others.
func noCommand(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("no command %q: see %s --help", args[0], c.CommandPath())
	}
	return nil
}

// whichCommand refuses to do nothing.
func (p *program) whichCommand(c *cobra.Command, _ []string) error {
	if !p.json {
		c.SetOut(p.err)
		if err := c.Help(); err != nil {
			return err
		}
		fmt.Fprintln(p.err)
	}
	return usage("no command given: see %s --help", c.CommandPath())
}

// flagError is what is wrong with a flag, in words.
func flagError(err error) string {
	var n *strconv.NumError
	if !errors.As(err, &n) {
		text := err.Error()
		if v := (*pflag.InvalidValueError)(nil); errors.As(err, &v) {
			// Both pflag and our own flags name the value.
			text = strings.Replace(text, fmt.Sprintf(" flag: %q is ", v.GetValue()), " flag: ", 1)
		}
		return text
	}
	words := "not a whole number"
	switch {
	case errors.Is(n, strconv.ErrRange):
		words = "out of range"
	case n.Func == "ParseBool":
		words = "neither true nor false"
	}
	return strings.Replace(err.Error(), n.Error(), words, 1)
}

// args refuses the wrong number of arguments in the words of the command's usage.
func args(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < least || most >= 0 && len(args) > most {
			given := fmt.Sprint(len(args), " arguments")
			if len(args) == 1 {
				given = "1 argument"
			}
			return usage("%s: %s given: use %s", c.Name(), given, c.UseLine())
		}
		return nil
	}
}

func (p *program) dir() daemon.RunDir { return daemon.RunDir(p.runDir) }

// with runs f with the daemon that runs, and says what goes on if it takes long.
func (p *program) with(c *cobra.Command, f func(ctx context.Context, api control.API) error) error {
	return p.withDaemon(c, startNext, f)
}

// start is with for what can be asked of a fresh daemon: without one it starts
// one.
func (p *program) start(c *cobra.Command, f func(ctx context.Context, api control.API) error) error {
	return p.withDaemon(c, startFirst, f)
}

func (p *program) withDaemon(c *cobra.Command, start starts, f func(ctx context.Context, api control.API) error) error {
	api, err := p.reach(c.Context(), start)
	if err != nil {
		return err
	}
	done := p.tellWhatGoesOn(c.Context(), c.Name(), api)
	defer done()
	return f(c.Context(), api)
}

// reach is connect to a daemon with the configuration that was asked for.
func (p *program) reach(ctx context.Context, start starts) (control.API, error) {
	api, err := p.connect(ctx, start)
	if err != nil || p.configPath == "" {
		return api, err
	}
	info, err := api.Info(ctx)
	if err == nil && info.Config != p.configPath {
		err = usage("--config %s: a daemon runs that was started with %s: stop it first, or leave --config out", p.configPath, info.Config)
	}
	return api, err
}

// tellLost says, beside a list of what there is, what is not there any more.
func (p *program) tellLost(ctx context.Context, api control.API) {
	if info, err := api.Info(ctx); err == nil {
		p.sayLost(info.Lost)
	}
}

// tellUnfiltered says which disks shall have a filter and have none.
func (p *program) tellUnfiltered(ctx context.Context, api control.API) {
	info, err := api.Info(ctx)
	if err != nil {
		return
	}
	for _, u := range info.Unfiltered {
		p.tell(unfiltered(u))
	}
}

// tell is say for scripts as well as people.
func (p *program) tell(s string) { fmt.Fprintf(p.err, "%s: %s\n", p.name, s) }

// sayLost tells what a daemon that died had.
func (p *program) sayLost(lost *control.Lost) {
	if lost != nil {
		p.tell(lost.String())
	}
}

// slow is when waiting starts to need an explanation.
const slow = 2 * time.Second

func (p *program) tellWhatGoesOn(ctx context.Context, what string, api control.API) (done func()) {
	ctx, cancel := context.WithCancel(ctx)
	stopped := make(chan struct{})
	began := time.Now()
	go func() {
		defer close(stopped)
		pause := slow
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			doing := what
			if info, err := api.Info(ctx); err == nil && info.Activity != "" {
				doing = info.Activity
			}
			if ctx.Err() == nil {
				p.say(fmt.Sprintf("%s … %ds", doing, int(time.Since(began).Seconds())))
			}
			pause = min(2*pause, 30*time.Second)
		}
	}()
	return func() {
		cancel()
		<-stopped
	}
}

// say tells a person something that is not the result. A script that keeps what
// is on standard error looks for errors there.
func (p *program) say(s string) {
	if p.read(p.err) {
		fmt.Fprintf(p.err, "%s: %s\n", p.name, s)
	}
}

// read says whether a person reads what is written to w.
func (p *program) read(w io.Writer) bool { return p.terminal != nil && p.terminal(w) }

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// watched is what comes of watching until err: a person who has seen enough makes
// no error.
func watched(ctx context.Context, err error) error {
	if ctx.Err() != nil && control.CodeOf(err) == control.Interrupted {
		return silentError(statusInterrupted)
	}
	return err
}

// print writes a result: as JSON if that is wanted, else by text.
func (p *program) print(v any, text func(w io.Writer)) error {
	if p.json {
		return p.printJSON(p.out, v)
	}
	w := bufio.NewWriter(p.out)
	text(w)
	return w.Flush() // who keeps what is printed has to know that it is not whole
}

func (p *program) printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	if !p.compact {
		e.SetIndent("", "  ")
	}
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// devicePath makes a device named by a person fit for the daemon, whose working
// directory is another: paths become absolute, bare names stay. What happens to lie in
// the working directory hides no name, unless it is a block device: somebody may work
// in /dev.
func devicePath(s string) (string, error) {
	if !strings.Contains(s, "/") && !isBlockDevice(s) {
		return s, nil
	}
	return filepath.Abs(s)
}

// isBlockDevice says whether path is a block device, or a link that leads into /dev, where no
// file server hangs, and there to one.
func isBlockDevice(path string) bool {
	if to, err := os.Readlink(path); err == nil {
		here, err := filepath.Abs(filepath.Dir(path))
		if !filepath.IsAbs(to) {
			to = filepath.Join(here, to)
		}
		if err != nil || !strings.HasPrefix(filepath.Clean(to), "/dev/") {
			return false
		}
	}
	info, err := os.Stat(path)
	return err == nil && info.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
}

// errno says whether err carries the errno.
func errno(err error, n unix.Errno) bool { return errors.Is(err, n) }
