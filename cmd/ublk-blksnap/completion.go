package main

import (
	"context"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// What the shell completes: names of filters and snapshots, which a daemon that runs is asked for. None is started for it,
// and none is waited for long.

// completionLimit is how long a person who has pressed a key waits for a daemon that does not answer.
const completionLimit = 2 * time.Second

// completer gives the words for the next argument: words that are always the same, or what the daemon is asked for.
type completer struct {
	fixed []cobra.Completion
	ask   func(ctx context.Context, api control.API) ([]cobra.Completion, error)
}

var (
	filterNames   = completer{ask: askFilterNames}
	originals     = completer{ask: askOriginals}
	snapshotNames = completer{ask: askSnapshotNames}
	snapshotIDs   = completer{ask: askSnapshotIDs}
	nothing       = completer{fixed: []cobra.Completion{}}
	files         = completer{}
)

// completedArgs are the commands' arguments, one after the other. A last one that is repeated stands for all that follow.
// Others are completed with files.
var completedArgs = map[string][]completer{
	"remove":           {filterNames},
	"status":           {filterNames},
	"cbt info":         {filterNames},
	"cbt map":          {filterNames},
	"cbt changes":      {filterNames},
	"cbt mark":         {filterNames, nothing},
	"snapshot create":  {filterNames, filterNames},
	"snapshot add":     {snapshotNames, filterNames},
	"snapshot append":  {snapshotNames, files},
	"snapshot take":    {snapshotNames},
	"snapshot info":    {snapshotNames},
	"snapshot watch":   {snapshotNames},
	"snapshot set":     {snapshotNames},
	"snapshot destroy": {snapshotNames, snapshotNames},
}

// completedFlags are the flags with words of their own, of any command or of one. Others are completed with files.
var completedFlags = map[string]completer{
	"--mode":                words("auto", "copy", "zerocopy"),
	"--log-level":           words("debug", "info", "warn", "error"),
	"--id":                  snapshotIDs,
	"--device":              originals,
	"snapshot info --field": words(slices.Sorted(maps.Keys(snapshotFields))...),
	"snapshot_info --field": words("image", "error_code"),
}

// shells are those that a script can be had for.
var shells = map[string]func(root *cobra.Command, w io.Writer) error{
	"bash": func(root *cobra.Command, w io.Writer) error { return root.GenBashCompletionV2(w, true) },
	"fish": func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) },
	"zsh":  (*cobra.Command).GenZshCompletion,
}

func (p *program) completion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion {bash|fish|zsh}",
		Short: "Print the script by which a shell completes commands and names",
		Long: `Print the script by which a shell completes commands and options, the names of
filters, and the names and UUIDs of snapshots, which it asks the daemon for. The
package and "make install" put these scripts where the shells look for them. What
bash needs besides is the package bash-completion.`,
		Example:   "  source <(ublk-blksnap completion bash)",
		Args:      args(1, 1),
		ValidArgs: slices.Sorted(maps.Keys(shells)),
		RunE: func(c *cobra.Command, args []string) error {
			script := shells[args[0]]
			if script == nil {
				return usage("completion: no shell %q: use %s", args[0], strings.Join(c.ValidArgs, ", "))
			}
			return script(c.Root(), p.out)
		},
	}
}

// complete gives the commands below c what they complete.
func (p *program) complete(c *cobra.Command) {
	for _, sub := range c.Commands() {
		p.complete(sub)
	}
	_, path, _ := strings.Cut(c.CommandPath(), " ")
	if completers := completedArgs[path]; completers != nil {
		c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			i := len(args)
			if last := len(completers) - 1; i > last {
				if last == 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				i = last
			}
			found, directive := p.words(c, completers[i])
			return slices.DeleteFunc(found, func(word cobra.Completion) bool {
				name, _, _ := strings.Cut(word, "\t")
				return slices.Contains(args, name)
			}), directive
		}
	}
	c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		completer, ok := completedFlags[path+" --"+f.Name]
		if !ok {
			completer, ok = completedFlags["--"+f.Name]
		}
		if !ok {
			return
		}
		err := c.RegisterFlagCompletionFunc(f.Name, func(c *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			found, directive := p.words(c, completer)
			if f.Name == "device" {
				directive = cobra.ShellCompDirectiveDefault // it may be any other path too
			}
			return found, directive
		})
		if err != nil {
			panic(err)
		}
	})
}

// words are those of a completer.
func (p *program) words(c *cobra.Command, from completer) ([]cobra.Completion, cobra.ShellCompDirective) {
	switch {
	case from.fixed != nil:
		return slices.Clone(from.fixed), cobra.ShellCompDirectiveNoFileComp
	case from.ask == nil:
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(c.Context(), completionLimit)
	defer cancel()
	var found []cobra.Completion
	if api, err := p.connect(ctx, startNone); err == nil { // no daemon, no names
		found, _ = from.ask(ctx, api)
	}
	return found, cobra.ShellCompDirectiveNoFileComp
}

func askFilterNames(ctx context.Context, api control.API) (names []cobra.Completion, err error) {
	all, err := api.Devices(ctx)
	for _, d := range all {
		names = append(names, cobra.CompletionWithDesc(d.Name, d.Original))
	}
	return names, err
}

// originals are what blksnap's commands take.
func askOriginals(ctx context.Context, api control.API) (paths []cobra.Completion, err error) {
	all, err := api.Devices(ctx)
	for _, d := range all {
		paths = append(paths, cobra.CompletionWithDesc(d.Original, d.Name))
	}
	return paths, err
}

// snapshotNames are all by which a snapshot may be called.
func askSnapshotNames(ctx context.Context, api control.API) (names []cobra.Completion, err error) {
	all, err := api.Snapshots(ctx)
	if len(all) > 0 {
		names = append(names, control.Latest)
	}
	for _, s := range all {
		if s.Name != "" {
			names = append(names, described(s.Name, s))
		}
		names = append(names, described(s.ID, s))
	}
	return names, err
}

// snapshotIDs are what blksnap's commands take.
func askSnapshotIDs(ctx context.Context, api control.API) (ids []cobra.Completion, err error) {
	all, err := api.Snapshots(ctx)
	for _, s := range all {
		ids = append(ids, described(s.ID, s))
	}
	return ids, err
}

// described is a name of a snapshot, with what the snapshot is.
func described(name string, s control.Snapshot) cobra.Completion {
	text := s.State
	for _, i := range s.Images {
		text += " " + i.Original
	}
	return cobra.CompletionWithDesc(name, text)
}

func words(all ...cobra.Completion) completer { return completer{fixed: all} }
