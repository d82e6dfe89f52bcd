package main

import (
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) daemon() *cobra.Command {
	// The flags have a configuration of their own: which of them were given is
	// known only after the file has been read over the defaults.
	flags := control.DefaultConfig()
	var reportFD int
	c := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Run the daemon in the foreground",
		Long: `Run the daemon in the foreground, logging to standard error. Usually systemd or
the first command that needs it does this.

SIGTERM and SIGINT stop it if no filter is mounted, open or held by a snapshot:
the filters are synced and removed. Otherwise it logs which one is used by whom,
removes nothing and keeps running.

Parameters come from the configuration file, and from flags, which win:`,
		Args: args(0, 0),
	}
	params := flags.Params()
	for _, q := range params {
		f := c.Flags().VarPF(q.Value, q.Flag(), "", q.Doc)
		if b, ok := q.Value.(interface{ IsBoolFlag() bool }); ok && b.IsBoolFlag() {
			f.NoOptDefVal = "true"
		}
	}
	c.Flags().IntVar(&reportFD, "report-fd", 0, "file descriptor to report the start to")
	if err := c.Flags().MarkHidden("report-fd"); err != nil {
		panic(err)
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		err := p.runDaemon(c.Flags(), params, func(err error) { control.ReportStart(reportFD, err) })
		return err
	}
	return c
}

// runDaemon runs until the daemon ends; started is called once it runs, or with
// the error that kept it from it.
func (p *program) runDaemon(given *pflag.FlagSet, params []control.Param, started func(error)) (err error) {
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
	cfg, err := readConfig(path)
	if err != nil {
		return err
	}
	if err := override(&cfg, given, params); err != nil {
		return err
	}
	level := slog.LevelInfo
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return usage("log_level: %v", err)
	}
	log := slog.New(slog.NewTextHandler(p.err, &slog.HandlerOptions{Level: level}))
	if err := control.EnterNamespace(p.dir(), cfg); err != nil {
		return err
	}
	return control.Run(control.Options{
		Dir: p.dir(), Config: cfg, ConfigPath: path, Log: log,
		Ready: func() { report(nil) },
	})
}

// override puts the parameters given as flags over those of the file.
func override(cfg *control.Config, given *pflag.FlagSet, params []control.Param) error {
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
