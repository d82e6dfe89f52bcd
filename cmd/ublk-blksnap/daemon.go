package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

func (p *program) daemon() *cobra.Command {
	// The flags have a configuration of their own: which of them were given is
	// known only after the file has been read over the defaults.
	flags := daemon.DefaultConfig()
	var reportFD int
	c := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Run the daemon in the foreground",
		Long: `Run the daemon in the foreground, logging to standard error. Usually systemd or
"ublk-blksnap add" does this.

"daemon stop", SIGTERM and SIGINT stop it if no filter is mounted, open or held
by a snapshot: the filters are synced and removed. Otherwise it tells which one is
used by whom, removes nothing and keeps running. Filters under device-mapper devices
count as used only by snapshots. SIGQUIT has it log what each of
its goroutines is doing. Under systemd SIGPWR says that the machine ends: snapshots
are destroyed, each filter is removed as soon as nobody uses it, and the daemon
ends with the last one.

Parameters come from the configuration file, and from flags, which win:`,
		Example: "  ublk-blksnap daemon --log-level debug",
		Args:    args(0, 0),
	}
	params := flags.Params()
	for _, q := range params {
		f := c.Flags().VarPF(q.Value, q.Flag(), "", q.Doc)
		if b, ok := q.Value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
			f.NoOptDefVal = "true"
		}
	}
	c.Flags().IntVar(&reportFD, reportFlag, 0, "file descriptor to report the start to")
	if err := c.Flags().MarkHidden(reportFlag); err != nil {
		panic(err)
	}
	var check bool
	c.Flags().BoolVar(&check, daemon.CheckTakeoverFlag, false, "only say whether this program could take over from the daemon that runs")
	if err := c.Flags().MarkHidden(daemon.CheckTakeoverFlag); err != nil {
		panic(err)
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		if check {
			return p.checkTakeover(c.Flags(), params)
		}
		// Before anything is read.
		if err := p.dir().GoOnResident(); err != nil {
			p.tell("start the daemon: " + err.Error())
		}
		if daemon.ToJournal(os.Stderr) {
			p.err = prefixed{p.err, daemon.Priority(slog.LevelError)}
		}
		err := p.runDaemon(c.Flags(), params, reportFD, func(err error) { daemon.ReportStart(reportFD, err) })
		if err == nil || !daemon.Supervised() {
			return err
		}
		status := p.exit(err)
		switch control.CodeOf(err) {
		case control.Exists:
			if reportFD == 0 {
				err := daemon.HandOver(c.Context(), p.dir())
				if err == nil {
					return nil // the guard was first
				}
				if !errors.Is(err, daemon.ErrNoHandOver) {
					return silentError(status) // systemd tries again
				}
			}
			// systemd shall not try again and again while another daemon runs
			// (RestartPreventExitStatus).
			status = statusBusy
		case control.Unsupported, control.Invalid, control.Denied, control.Corrupted:
			time.Sleep(refusedPause)
		default:
		}
		return silentError(status)
	}
	c.AddCommand(p.daemonReload(), p.daemonStop())
	return c
}

// reportFlag is the flag of a daemon whose starter waits for its report.
const reportFlag = "report-fd"

// refusedPause is how long a daemon of systemd's waits with its end if its start was
// refused by what only a person can change: a configuration, state that it cannot read, a
// kernel without the driver, or one that forbids io_uring. systemd tries the next one at
// once, for ever, because I/O may wait for it.
const refusedPause = 5 * time.Second

// flushTimeout is how long a daemon that ends waits for its log's last lines to be
// taken.
const flushTimeout = 5 * time.Second

// runDaemon runs until the daemon ends; started is called once it runs, or with
// the error that kept it from it.
func (p *program) runDaemon(given *pflag.FlagSet, params []daemon.Param, reportFD int, started func(error)) (err error) {
	reported := false
	report := func(err error) {
		if !reported {
			reported = true
			started(err)
		}
	}
	defer func() {
		if err != nil {
			report(err)
		}
	}()
	path := p.configFile()
	cfg, err := daemonConfig(p.dir().ConfigFile(path), given, params)
	if err != nil {
		return err
	}
	level := slog.LevelInfo
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return usage("log_level: %v", err)
	}
	warn := func(err error) { p.tell("start the daemon: " + err.Error()) } // there is no log yet
	// What a resident daemon would read for the rules of udev may have to wait for it.
	if !p.dir().Resident() {
		if err := daemon.PrepareBoot(p.dir(), path); err != nil {
			warn(err)
		}
	}
	if err := daemon.Reexec(p.dir(), cfg, path, reportFD, warn); err != nil {
		return err
	}
	log := daemon.NewLog(daemon.Stderr(), level, daemon.ToJournal(os.Stderr))
	defer log.Flush(flushTimeout)
	return daemon.Run(daemon.Options{
		Dir: p.dir(), Config: cfg, ConfigPath: path, Log: log,
		Program: daemon.Program(), Args: daemonArgs(given),
		Ready: func() { report(nil) },
	})
}

// daemonConfig is the file's configuration, with the flags over it.
func daemonConfig(path string, given *pflag.FlagSet, params []daemon.Param) (daemon.Config, error) {
	cfg, err := readConfig(path)
	if err == nil {
		err = override(&cfg, given, params)
	}
	return cfg, err
}

// checkTakeover says whether this program, so configured, could take over.
func (p *program) checkTakeover(given *pflag.FlagSet, params []daemon.Param) error {
	if _, err := daemonConfig(p.configFile(), given, params); err != nil {
		return err
	}
	t, err := daemon.CheckTakeover(p.dir())
	if err != nil {
		return err
	}
	return p.printJSON(p.out, t)
}

// daemonArgs are the arguments with which a daemon like this one is started, from any
// directory.
func daemonArgs(given *pflag.FlagSet) []string {
	args := []string{"daemon"}
	given.Visit(func(f *pflag.Flag) {
		if f.Name != reportFlag && f.Name != daemon.CheckTakeoverFlag {
			args = append(args, "--"+f.Name+"="+f.Value.String())
		}
	})
	return args
}

// guard is the process that starts the next daemon when one has died.
func (p *program) guard() *cobra.Command {
	return &cobra.Command{
		Use:    daemon.GuardCommand + " NAMESPACE",
		Hidden: true,
		Args:   args(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := daemon.EnterGuard(args[0]); err != nil {
				return err
			}
			return daemon.Guard(p.dir(), slog.LevelInfo)
		},
	}
}

// probe is the process that a daemon starts to look into block devices.
func (p *program) probe() *cobra.Command {
	return &cobra.Command{
		Use:    daemon.ProbeCommand + " ROOT",
		Hidden: true,
		Args:   args(1, 1),
		RunE:   func(_ *cobra.Command, args []string) error { return disk.ServeProbes(3, args[0]) },
	}
}

// override puts the parameters given as flags over those of the file.
func override(cfg *daemon.Config, given *pflag.FlagSet, params []daemon.Param) error {
	for i, q := range cfg.Params() {
		if given.Changed(q.Flag()) {
			if err := q.Value.Set(params[i].Value.String()); err != nil {
				return usage("--%s: %v", q.Flag(), err)
			}
		}
	}
	if err := cfg.Validate(); err != nil {
		// The message names the key; on the command line it is a flag.
		key, what, _ := strings.Cut(err.Error(), ":")
		if given.Changed(strings.ReplaceAll(key, "_", "-")) {
			return usage("--%s:%s", strings.ReplaceAll(key, "_", "-"), what)
		}
		return err
	}
	return nil
}

// prefixed writes with something before each line of what is written, which ends
// with one.
type prefixed struct {
	io.Writer
	prefix string
}

func (w prefixed) Write(b []byte) (int, error) {
	var out []byte
	for _, line := range bytes.SplitAfter(b, []byte("\n")) {
		if len(line) > 0 {
			out = append(append(out, w.prefix...), line...)
		}
	}
	if _, err := w.Writer.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (p *program) daemonStop() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Remove all filters and end the daemon, unless one is in use",
		Long: `Remove all filters and end the daemon, unless one is mounted, open or held by a
snapshot: then nothing changes, and the status is 5. Filters under device-mapper
devices are removed whoever uses these, if no snapshot holds them. It returns when
the daemon has ended. This is the way under systemd too. "systemctl stop" is refused, because
systemd would lose hold of a daemon that has to stay for its users.`,
		Example: "  ublk-blksnap daemon stop",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return p.withDaemon(c, startNone, func(ctx context.Context, api control.API) error { return api.Stop(ctx) })
		},
	}
}

func (p *program) daemonReload() *cobra.Command {
	var r control.ReloadRequest
	c := &cobra.Command{
		Use:   "reload [flags]",
		Short: "Have a new version of the program take over, under mounted filters",
		Long: `Have the program that the daemon was started from, or another one, take over all
filters and snapshots in the daemon's process, with the configuration as it is now.
Filters may be mounted and in use: their I/O waits for the time that is printed. The
program is first asked whether it can take over. If it cannot, nothing changes.
"systemctl reload ublk-blksnap" does the same, and so may the upgrade of a package.`,
		Example: "  ublk-blksnap daemon reload\n  ublk-blksnap daemon reload --program /usr/local/sbin/ublk-blksnap",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if r.Program != "" {
				if r.Program, err = filepath.Abs(r.Program); err != nil {
					return err
				}
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				done, err := api.Reload(ctx, r)
				if err != nil {
					return err
				}
				return p.print(done, func(w io.Writer) {
					fmt.Fprintf(w, "%s %s has taken over from %s: I/O waited for %v\n", done.Program, done.To, done.From, done.Pause.Round(time.Millisecond))
				})
			})
		},
	}
	c.Flags().StringVar(&r.Program, "program", "", "path of the program (default: the one that the daemon was started from)")
	return c
}
