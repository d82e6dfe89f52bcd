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
		Long:  "Check a configuration file: syntax, names, values and combinations. Nothing is\nstarted or changed.",
		Args:  args(0, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := p.configFile()
			if len(args) == 1 {
				path = args[0]
			}
			if _, err := readConfig(path); err != nil {
				return err
			}
			text := path + ": ok"
			if _, err := os.Stat(path); err != nil {
				text = path + ": not there, the defaults hold"
			}
			return p.print(map[string]any{"file": path, "ok": true}, func(w io.Writer) { fmt.Fprintln(w, text) })
		},
	}, &cobra.Command{
		Use:   "show [FILE]",
		Short: "Show every parameter with its value, as a configuration file",
		Args:  args(0, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			path := p.configFile()
			if len(args) == 1 {
				path = args[0]
			}
			cfg, err := readConfig(path)
			if err != nil {
				return err
			}
			values := map[string]string{}
			for _, q := range cfg.Params() {
				values[q.Key] = q.Value.String()
			}
			return p.print(values, func(w io.Writer) { writeConfig(w, &cfg) })
		},
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
