package main

import (
	"errors"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// blksnapCommands are blksnap's own commands with its options and output, for
// scripts that were written for it. An option that takes several values may be
// given several times, or once with the values behind it.
func (p *program) blksnapCommands() []*cobra.Command {
	cs := []*cobra.Command{
		p.blksnapAttach(), p.blksnapDetach(),
		p.blksnapCBTInfo(), p.blksnapReadCBTMap(), p.blksnapMarkDirtyBlock(),
		p.blksnapSnapshotCreate(), p.blksnapSnapshotAdd(), p.blksnapSnapshotAppendStorage(),
		p.blksnapSnapshotTake(), p.blksnapSnapshotDestroy(),
		p.blksnapSnapshotInfo(), p.blksnapSnapshotCollect(),
		p.blksnapSnapshotWaitEvent(), p.blksnapSnapshotWatcher(),
	}
	for _, c := range cs {
		asBoost(c.Flags())
		c.Annotations = map[string]string{blksnapVerb: c.Name()}
		c.PreRunE = func(c *cobra.Command, _ []string) error {
			if err := c.ValidateRequiredFlags(); err != nil {
				return usage("%s: %v", c.Name(), err)
			}
			return nil
		}
	}
	return cs
}

// asBoost reads options as blksnap does, which has them read by
// boost::program_options: a long one may be shortened as long as it is the only
// one that begins so, and one that takes a single value is given once.
func asBoost(flags *pflag.FlagSet) {
	names := []string{"help", "json"}
	flags.VisitAll(func(f *pflag.Flag) {
		names = append(names, f.Name)
		if _, several := f.Value.(pflag.SliceValue); !several {
			f.Value = &once{Value: f.Value}
		}
	})
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		meant := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !strings.HasPrefix(n, name) })
		if len(meant) == 1 {
			name = meant[0]
		}
		return pflag.NormalizedName(name)
	})
}

// once is an option that can be given once.
type once struct {
	pflag.Value
	given bool
}

func (o *once) Set(s string) error {
	if o.given {
		return errors.New("given more than once")
	}
	o.given = true
	return o.Value.Set(s)
}

// blksnapVerb marks blksnap's own commands.
const blksnapVerb = "blksnap"

// Options that several of blksnap's commands share.

func deviceOption(c *cobra.Command, v *string) {
	c.Flags().StringVarP(v, "device", "d", "", "block device")
	require(c, "device")
}

func idOption(c *cobra.Command, v *string) {
	c.Flags().StringVarP(v, "id", "i", "", "UUID of the snapshot")
	require(c, "id")
}

func require(c *cobra.Command, flag string) {
	if err := c.MarkFlagRequired(flag); err != nil {
		panic(err)
	}
}

// checkID refuses what is no UUID before the daemon is asked.
func checkID(c *cobra.Command, id string) error {
	if _, err := uuid.Parse(id); err != nil {
		return usage("%s: --id %s: not a UUID", c.Name(), id)
	}
	return nil
}

// inBlksnapsWords has an error of the daemon's name the commands that blksnap's
// users have.
func inBlksnapsWords(e *control.Error) {
	for _, w := range blksnapsWords {
		e.Message = w.ours.ReplaceAllString(e.Message, w.blksnaps)
		e.Fix = w.ours.ReplaceAllString(e.Fix, w.blksnaps)
	}
}

var blksnapsWords = []struct {
	ours     *regexp.Regexp
	blksnaps string
}{
	{regexp.MustCompile(`^add (\S+): `), "attach $1: "},
	{regexp.MustCompile(`^remove (\S+): `), "detach $1: "},
	{regexp.MustCompile(`add it first: ublk-blksnap add `), "attach it first: blksnap attach -d "},
	{regexp.MustCompile(`add it again: ublk-blksnap add (\S+) --name \S+`), "attach it again: blksnap attach -d $1"},
	{regexp.MustCompile(`\bublk-blksnap add or `), "blksnap attach or "},
	{regexp.MustCompile(`\bublk-blksnap remove ([^-\s]\S*)`), "blksnap detach -d $1"},
	{regexp.MustCompile(`\bublk-blksnap snapshot destroy (\S+)`), "blksnap snapshot_destroy -i $1"},
	// blksnap has no names, no force, and nothing for the boot.
	{regexp.MustCompile(`\badd it with --boot\b`), "add it with ublk-blksnap add --boot"},
	{regexp.MustCompile(`\badd it, without --attach; with --boot\b`), "attach it; with ublk-blksnap add --boot"},
	{regexp.MustCompile(`choose another with --name`), "choose another, with ublk-blksnap add --name"},
}
