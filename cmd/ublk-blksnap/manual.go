package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

// The manual pages are what the commands say of themselves, and what the table of parameters says of the configuration.
// "make install" has the program that it installs write them, so that they are never older than the program.

// manual is the command that writes the pages.
func (p *program) manual() *cobra.Command {
	return &cobra.Command{
		Use:    "manual DIR",
		Hidden: true,
		Args:   args(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			for name, text := range manualPages() {
				if err := os.WriteFile(filepath.Join(args[0], name), []byte(text), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// manualPages are the pages by their files' names: one for the program, one for each of its commands, one for all of
// blksnap's, and one for the configuration.
func manualPages() map[string]string {
	pages := map[string]string{"ublk-blksnap.conf.5": configPage()}
	root := (&program{name: "ublk-blksnap"}).root()
	pages["ublk-blksnap.8"] = rootPage(root)
	for _, c := range commandsBelow(root) {
		pages[pageName(c)+".8"] = commandPage(c)
	}
	pages["blksnap.8"] = blksnapPage((&program{name: "blksnap"}).root())
	return pages
}

// pageName is the name of a command's page: git has made that a custom.
func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// commandsBelow are our own commands, at any depth, that have a page.
func commandsBelow(c *cobra.Command) (all []*cobra.Command) {
	for _, sub := range c.Commands() {
		if hasPage(sub) {
			all = append(append(all, sub), commandsBelow(sub)...)
		}
	}
	return all
}

func hasPage(c *cobra.Command) bool {
	return !c.Hidden && c.Name() != "help" && c.Annotations[blksnapVerb] == ""
}

// isGroup says whether a command only holds others.
func isGroup(c *cobra.Command) bool { return c.HasSubCommands() && !c.HasLocalFlags() }

func rootPage(root *cobra.Command) string {
	r := newPage(root.Name(), 8, root.Short)
	r.section("SYNOPSIS")
	r.item(bold(root.Name())+" "+italic("command")+" ["+italic("argument")+"...] ["+italic("option")+"...]", "")
	r.section("DESCRIPTION")
	var description, examples []string
	for _, paragraph := range strings.Split(root.Long, "\n\n") {
		switch {
		case paragraph == root.Short || paragraph == statusHelp: // have their own sections
		case strings.HasPrefix(paragraph, "  "):
			examples = append(examples, paragraph)
		default:
			description = append(description, paragraph)
		}
	}
	r.text(strings.Join(description, "\n\n"))
	r.section("COMMANDS")
	for _, g := range root.Groups() {
		r.subsection(strings.TrimSuffix(g.Title, ":"))
		if g.ID == blksnapVerb {
			r.text("The commands of blksnap, for scripts that were written for it. See blksnap(8).")
			continue
		}
		for _, c := range commandsBelow(root) {
			top := c
			for top.Parent() != root {
				top = top.Parent()
			}
			if top.GroupID == g.ID && !isGroup(c) {
				r.item(bold(c.CommandPath())+"(8)", c.Short)
			}
		}
	}
	r.section("OPTIONS")
	r.text("Every command has these:")
	r.options(root.PersistentFlags())
	r.item(bold("-h")+", "+bold("--help"), "help for a command")
	r.text("The program alone has one more:")
	r.item(bold("-v")+", "+bold("--version"), "print the version, and the commit it was built from")
	r.section("EXAMPLES")
	r.text(strings.Join(examples, "\n\n"))
	r.statuses()
	r.section("FILES")
	for _, f := range [][2]string{
		{"/dev/ublk-blksnap/NAME", "the filter device of that name"},
		{"/dev/ublk-blksnap/images/…", "the images of snapshots"},
		{daemon.DefaultConfigPath, "the configuration: see ublk-blksnap.conf(5)"},
		{daemon.DropInDir(daemon.DefaultConfigPath) + "/NAME.conf", "disks that have their filters at every boot, as \"add --boot\" writes them"},
		{daemon.RulesPath, "the rules of udev for these disks, which the program writes"},
		{daemon.DefaultConfig().HookDir, "programs that are run before and after each take: see ublk-blksnap-snapshot-take(8)"},
		{daemon.RunDir(daemon.DefaultRunDir).Socket(), "the daemon's socket"},
		{daemon.RunDir(daemon.DefaultRunDir).ReadSocket(), "the same for the group that may look, if the configuration names one"},
		{daemon.DefaultConfig().StateDir, "what is kept of change maps and snapshots over a restart of the machine"},
	} {
		r.item(italic(f[0]), f[1])
	}
	r.seeAlso("ublk-blksnap.conf(5)", "blksnap(8)", "systemd(1)", "fstab(5)")
	return r.String()
}

func commandPage(c *cobra.Command) string {
	r := newPage(pageName(c), 8, c.Short)
	r.section("SYNOPSIS")
	if !isGroup(c) {
		r.synopsis(c)
	}
	for _, sub := range c.Commands() {
		r.synopsis(sub)
	}
	r.section("DESCRIPTION")
	r.text(cmp.Or(c.Long, c.Short+"."))
	if c.HasSubCommands() {
		r.section("COMMANDS")
		for _, sub := range c.Commands() {
			r.item(bold(sub.CommandPath())+"(8)", sub.Short)
		}
	}
	r.section("OPTIONS")
	r.options(c.LocalNonPersistentFlags())
	r.text("The options of every command are in ublk-blksnap(8).")
	r.section("EXAMPLES")
	r.text(examplesOf(c))
	r.statuses()
	also := []string{"ublk-blksnap(8)"}
	if parent := c.Parent(); parent.HasParent() {
		also = append(also, pageName(parent)+"(8)")
	}
	for _, sibling := range append(c.Commands(), c.Parent().Commands()...) {
		if sibling != c && hasPage(sibling) && c.Parent().HasParent() {
			also = append(also, pageName(sibling)+"(8)")
		}
	}
	if c.Name() == "daemon" || c.Name() == "config" || c.Parent().Name() == "config" {
		also = append(also, "ublk-blksnap.conf(5)")
	}
	r.seeAlso(also...)
	return r.String()
}

// examplesOf are those of a command; a group has one of each of its commands.
func examplesOf(c *cobra.Command) string {
	if c.Example != "" {
		return c.Example
	}
	var all []string
	for _, sub := range c.Commands() {
		lines := strings.Split(sub.Example, "\n")
		i := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, "  "+sub.CommandPath()) })
		all = append(all, lines[max(i, 0)])
	}
	return strings.Join(all, "\n")
}

func blksnapPage(root *cobra.Command) string {
	r := newPage("blksnap", 8, "the commands of blksnap, as ublk-blksnap has them")
	r.section("SYNOPSIS")
	var verbs []*cobra.Command
	for _, c := range root.Commands() {
		if c.Annotations[blksnapVerb] != "" || c.Name() == "version" {
			verbs = append(verbs, c)
			r.synopsis(c)
		}
	}
	r.section("DESCRIPTION")
	r.text(`Scripts that were written for the kernel module blksnap run unchanged: under this name ublk-blksnap(8) has the commands
of that module's tool, with its options, its output and its exit statuses. Both names work with the same daemon, disks and
snapshots.

A disk gets a filter by "attach". A volume of device-mapper (LVM, LUKS) may be mounted meanwhile, and keeps its path. Any
other disk must not be in use then, and is used as /dev/ublk-blksnap/NAME from then on.`)
	r.section("COMMANDS")
	for _, c := range verbs {
		r.subsection(c.Name())
		r.text(cmp.Or(c.Long, strings.TrimSuffix(c.Short, " (blksnap)")+"."))
		r.options(c.LocalNonPersistentFlags())
	}
	r.section("EXAMPLES")
	r.text("  blksnap attach -d /dev/vdb\n  id=$(blksnap snapshot_create -d /dev/vdb -f /var/tmp)\n  blksnap snapshot_take -i $id\n" +
		"  mount -o ro $(blksnap snapshot_info -d /dev/vdb -f image) /mnt\n  umount /mnt\n  blksnap snapshot_destroy -i $id\n  blksnap detach -d /dev/vdb")
	r.section("EXIT STATUS")
	r.item(bold("0"), "done")
	r.item(bold("1"), "failed")
	r.seeAlso("ublk-blksnap(8)")
	return r.String()
}

func configPage() string {
	r := newPage("ublk-blksnap.conf", 5, "configuration of ublk-blksnap")
	r.section("SYNOPSIS")
	r.item(italic(daemon.DefaultConfigPath), "")
	r.item(italic(daemon.DropInDir(daemon.DefaultConfigPath)+"/*.conf"), "")
	r.section("DESCRIPTION")
	r.text(`The configuration is a file in TOML: lines of the form "key = value". There need be none. Each parameter has a default, and
each is also an option of "ublk-blksnap daemon", with dashes for underscores, which wins over the file. The daemon reads
the file when it starts and when another program takes over ("ublk-blksnap daemon reload").

"ublk-blksnap config check" says what is wrong with a file, "ublk-blksnap config show" what holds.`)
	r.section("PARAMETERS")
	defaults := daemon.DefaultConfig()
	for _, q := range defaults.Params() {
		value := q.Value.String()
		if t := q.Value.Type(); t != "number" && t != "bool" {
			value = `"` + value + `"`
		}
		r.item(bold(q.Key)+" = "+italic(q.Value.Type()), strings.ToUpper(q.Doc[:1])+q.Doc[1:]+". Default: "+value+".")
	}
	r.text(`A size is a number of bytes, or a string with K, M, G or T. A duration is a string such as "500ms" or "30s".`)
	r.section("DISKS OF THE BOOT")
	r.text(`A table [[device]] names a disk that gets its filter whenever the daemon starts, before filesystems are mounted.
"ublk-blksnap add --boot" writes such a table, to a file of its own in the directory. Tables that a person writes may be in
either place; after a change by hand "ublk-blksnap config apply" tells udev of it.`)
	for _, k := range [][2]string{
		{"name", "The name of the filter."},
		{"path", "The disk, by a path that leads to the same disk after every boot: below /dev/disk/by-id, by-path or by-partuuid, or /dev/mapper."},
		{"queues, queue_depth, mode, intent_log, intent_log_zone", "As the parameters above, for this disk."},
	} {
		r.item(bold(k[0]), k[1])
	}
	r.section("EXAMPLES")
	r.text("  state_size = \"4G\"\n  storage_timeout = \"1m\"\n  log_level = \"warn\"\n\n  [[device]]\n  name = \"data\"\n  path = \"/dev/disk/by-id/virtio-data\"\n  queues = 2")
	r.seeAlso("ublk-blksnap(8)", "ublk-blksnap-config(8)", "ublk-blksnap-daemon(8)", "udev(7)")
	return r.String()
}

// page is a manual page in the making, in the language of troff's macros man.
type page struct{ strings.Builder }

func newPage(name string, section int, what string) *page {
	r := &page{}
	// No date and no version: what says the same is the same.
	fmt.Fprintf(r, ".TH %s %d \"\" \"ublk-blksnap\" \"System Administration\"\n", strings.ToUpper(name), section)
	r.section("NAME")
	what = strings.ToLower(what[:1]) + what[1:]
	fmt.Fprintf(r, "%s \\- %s\n", troff(name), troff(what))
	return r
}

func (r *page) section(name string)    { fmt.Fprintf(r, ".SH %s\n", troff(name)) }
func (r *page) subsection(name string) { fmt.Fprintf(r, ".SS %s\n", troff(name)) }

// item is a tagged paragraph, the tag of which is marked up already.
func (r *page) item(tag, text string) {
	if text == "" {
		fmt.Fprintf(r, ".PP\n%s\n", tag)
		return
	}
	fmt.Fprintf(r, ".TP\n%s\n%s\n", tag, troff(text))
}

// text is prose as help has it: paragraphs, and indented lines that stay as they are.
func (r *page) text(s string) {
	literal, begun := false, false
	for _, line := range append(strings.Split(strings.Trim(s, "\n"), "\n"), "") {
		indented := strings.HasPrefix(line, "  ")
		switch {
		case line == "" && literal:
			r.WriteString(".fi\n.RE\n")
			literal = false
		case line == "":
			begun = false
		case indented && !literal:
			r.WriteString(".PP\n.RS 4\n.nf\n")
			literal = true
		case !indented && literal:
			r.WriteString(".fi\n.RE\n")
			literal = false
		}
		if line != "" && !literal && !begun {
			r.WriteString(".PP\n")
			begun = true
		}
		if line != "" {
			r.WriteString(troff(strings.TrimPrefix(line, "  ")) + "\n")
		}
	}
}

func (r *page) synopsis(c *cobra.Command) {
	path := c.CommandPath()
	use := troff(strings.TrimSpace(strings.TrimPrefix(strings.TrimSuffix(c.UseLine(), " [flags]"), path)))
	options := false
	c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) { options = options || !f.Hidden && f.Name != "help" })
	if options && c.Annotations[blksnapVerb] == "" {
		use = strings.TrimSpace(use + " [" + italic("option") + "...]")
	}
	r.item(strings.TrimSpace(bold(path)+" "+use), "")
}

func (r *page) options(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" || f.Name == "version" {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		tag := bold("--" + f.Name)
		if f.Shorthand != "" {
			tag = bold("-"+f.Shorthand) + ", " + tag
		}
		if value != "" {
			tag += " " + italic(strings.TrimSuffix(value, "Array"))
		}
		if d := f.DefValue; d != "" && d != "0" && d != "false" && d != "[]" && !strings.Contains(usage, "default") {
			usage += fmt.Sprintf(" (default %s)", d)
		}
		r.item(tag, usage)
	})
}

func (r *page) statuses() {
	r.section("EXIT STATUS")
	for _, s := range statuses {
		r.item(bold(fmt.Sprint(s.status)), s.meaning)
	}
}

func (r *page) seeAlso(pages ...string) {
	r.section("SEE ALSO")
	slices.Sort(pages)
	var all []string
	for _, name := range slices.Compact(pages) {
		title, section, _ := strings.Cut(name, "(")
		all = append(all, bold(title)+"("+section)
	}
	r.WriteString(strings.Join(all, ",\n") + "\n")
}

func bold(s string) string   { return `\fB` + troff(s) + `\fR` }
func italic(s string) string { return `\fI` + troff(s) + `\fR` }

// troff has nothing in s mean more than itself: what looks like a command, escapes, and hyphens, which people copy.
func troff(s string) string {
	var b strings.Builder
	for i, line := range strings.Split(s, "\n") {
		if i > 0 {
			b.WriteByte('\n')
		}
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			b.WriteString(`\&`)
		}
		for _, c := range line {
			switch {
			case c == '\\':
				b.WriteString(`\e`)
			case c == '-':
				b.WriteString(`\-`)
			case c == '\'':
				b.WriteString(`\(aq`)
			case c == '^' || c == '~' || c == '`':
				b.WriteString(map[rune]string{'^': `\(ha`, '~': `\(ti`, '`': `\(ga`}[c])
			case c > 126:
				fmt.Fprintf(&b, `\[u%04X]`, c)
			default:
				b.WriteRune(c)
			}
		}
	}
	return b.String()
}
