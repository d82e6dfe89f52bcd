package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

func (p *program) config() *cobra.Command {
	c := &cobra.Command{
		Use:   "config",
		Short: "Check or show the configuration",
		Args:  noCommand,
		RunE:  p.whichCommand,
	}
	c.AddCommand(&cobra.Command{
		Use:   "check [FILE]",
		Short: "Check a configuration file",
		Long: `Check a configuration file: syntax, names, values and combinations, and the disks
that it and the files of its directory (` + daemon.DropInDir(daemon.DefaultConfigPath) + `/*.conf) name. Notes tell what
is not as it must be at the boot. Nothing is started or changed.`,
		Example: "  ublk-blksnap config check\n  ublk-blksnap config check ./new.conf",
		Args:    args(0, 1),
		RunE: func(c *cobra.Command, args []string) error {
			path := p.configFile()
			if len(args) == 1 {
				path = args[0]
			}
			cfg, err := readConfig(path)
			if err != nil {
				return err
			}
			disks, notes, err := daemon.CheckBoot(c.Context(), path, cfg)
			if err != nil {
				return err
			}
			notes = append(notes, daemon.GroupNotes(cfg)...)
			text := path + ": ok"
			if _, err := os.Stat(path); err != nil {
				text = path + ": not there, the defaults hold"
			}
			answer := map[string]any{"file": path, "ok": true}
			if len(disks) > 0 {
				answer["devices"] = disks
			}
			if len(disks)+len(notes) > 0 {
				answer["notes"] = notes
			}
			return p.print(answer, func(w io.Writer) {
				fmt.Fprintln(w, text)
				for _, note := range notes {
					fmt.Fprintln(w, "note:", note)
				}
			})
		},
	}, &cobra.Command{
		Use:     "show [FILE]",
		Short:   "Show every parameter with its value, as a configuration file",
		Example: "  ublk-blksnap config show >/etc/ublk-blksnap.conf",
		Args:    args(0, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := p.configFile()
			if len(args) == 1 {
				path = args[0]
			}
			cfg, err := readConfig(path)
			if err != nil {
				return err
			}
			disks, err := daemon.ReadBootDevices(path)
			if err != nil {
				return err
			}
			values := map[string]any{}
			for _, q := range cfg.Params() {
				values[q.Key] = q.Value.String()
			}
			if len(disks) > 0 {
				values["device"] = disks
			}
			return p.print(values, func(w io.Writer) {
				writeConfig(w, &cfg)
				for _, b := range disks {
					fmt.Fprintf(w, "\n# %s:%d\n", b.File, b.Line)
					b.Write(w)
				}
			})
		},
	}, &cobra.Command{
		Use:   "apply",
		Short: "Give udev the disks that the configuration names",
		Long: `Write the rules of udev for the disks that the configuration names, so that none of
them is used without its filter. "add --boot", "remove --boot" and each start of the
daemon do that too. So it is needed only after [[device]] tables were changed by hand.`,
		Example: "  ublk-blksnap config apply",
		Args:    args(0, 0),
		RunE:    func(*cobra.Command, []string) error { return daemon.UpdateRules(p.configFile()) },
	})
	return c
}

func (p *program) configFile() string {
	if p.configPath != "" {
		return p.configPath
	}
	return daemon.DefaultConfigPath
}

func readConfig(path string) (daemon.Config, error) {
	cfg := daemon.DefaultConfig()
	return cfg, cfg.ReadConfig(path)
}

// writeConfig writes cfg as a configuration file that reads back as cfg.
func writeConfig(w io.Writer, cfg *daemon.Config) {
	for i, q := range cfg.Params() {
		if i > 0 {
			fmt.Fprintln(w)
		}
		for _, line := range wrap(q.Doc, 76) {
			fmt.Fprintln(w, "#", line)
		}
		value := q.Value.String()
		if t := q.Value.Type(); t != "number" && t != "bool" {
			value = `"` + value + `"`
		}
		fmt.Fprintf(w, "%s = %s\n", q.Key, value)
	}
}

// wrap breaks text into lines of at most n characters.
func wrap(text string, n int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		if k := len(lines) - 1; k >= 0 && len(lines[k])+1+len(word) <= n {
			lines[k] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}
