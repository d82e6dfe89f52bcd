package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

func (p *program) add() *cobra.Command {
	var r control.AddRequest
	var mode, zone string
	var boot, logged, attach bool
	c := &cobra.Command{
		Use:   "add DEV [flags]",
		Short: "Put a filter over a disk",
		Long: `Put a filter over a disk and print the path of the filter device, which is to be
used in the disk's place from now on: format it, mount it, put volumes on it.

DEV is a whole disk, a partition or a device-mapper device that nobody uses: not
mounted, no swap space, not part of an array, volume group or loop device. It is
opened exclusively, so that nobody can mount it beside the filter.

If DEV is a device-mapper device that is in use, as a logical or an encrypted volume
is when it is mounted, the filter comes under it: its users notice no more than a
pause, and its own path, which is printed, is used as before. "remove" takes the
filter away in the same way. That does not outlive a restart of the machine. With
--attach it is so also for a device that is not in use. A program that gives the
device another table later, as lvextend does, ends its snapshots. The filter then
comes under it anew, with a new generation of changes.

With --dry-run everything is checked as it would be, and nothing is done: the filter
that would be made is told, what it would take, and whether change tracking would go
on. The disk is claimed for a moment. "add" may fail all the same if something has
changed by then. The daemon has to look at it, and is not started for that: if none
runs the command ends with status 4.

The content stays where it is: after "remove" the disk is used directly again.

With --boot the disk gets its filter at every boot too, before filesystems are
mounted, and is not used without it: fstab names it by UUID, by label or by
/dev/ublk-blksnap/NAME, and by no path of the disk. Lines that do are told. The disk
is kept in mind by a link that stays, in a file of its own beside the configuration.
"remove --boot" ends that. A device that a filter came under while it was in use has
to be unmounted first, and its filter removed.`,
		Example: "  ublk-blksnap add /dev/vdb\n  ublk-blksnap add /dev/vdb --name data --boot\n  ublk-blksnap add /dev/vg0/data --name data --queues 4",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if r.Path, err = devicePath(args[0]); err != nil {
				return err
			}
			if mode != "" {
				if r.Mode, err = control.ParseMode(mode); err != nil {
					return usage("add %s: %v", args[0], err)
				}
			}
			if c.Flags().Changed("intent-log") {
				r.IntentLog = &logged
			}
			if zone != "" {
				if r.IntentLogZone, err = control.ParseSize(zone); err != nil {
					return usage("add %s: --intent-log-zone: %v", args[0], err)
				}
			}
			for flag, v := range map[string]int{"queues": r.Queues, "depth": r.Depth} {
				if c.Flags().Changed(flag) && v < 1 {
					return usage("add %s: --%s %d: must be at least 1", args[0], flag, v)
				}
			}
			switch {
			case attach && boot:
				return usage("add %s: --attach --boot: a disk that has its filter at the boot has it before it is in use", args[0])
			case attach:
				r.Attach = control.AttachAlways
			case boot:
				r.Attach = control.AttachNever
			}
			remember := func(context.Context, control.Device) error { return nil }
			if boot {
				if remember, err = p.rememberer(r); err != nil {
					return err
				}
			}
			start := startFirst
			if r.DryRun {
				start = startNone // it would put filters over the disks that the configuration names
			}
			err = p.withDaemon(c, start, func(ctx context.Context, api control.API) error {
				d, err := addDevice(ctx, api, r)
				if boot && errno(err, unix.EALREADY) {
					d, err = addedBefore(ctx, api, r, err)
				}
				if err != nil {
					return err
				}
				if r.DryRun {
					if err := p.print(d, func(w io.Writer) { writePlan(w, d) }); err != nil {
						return err
					}
					return remember(ctx, d)
				}
				// A disk that cannot be known again begins anew each time: "cbt info" says so.
				if h := d.History; h.Reason != "" && h.Reason != control.HistoryNone && (h.Reason != control.HistoryUnknown || h.AfterPowerFailure) {
					p.tell(fmt.Sprintf("%s: change tracking begins anew, the next backup copies everything: %s", d.Name, h.Text))
				}
				if err := p.print(d, func(w io.Writer) { fmt.Fprintln(w, d.Link) }); err != nil {
					return err
				}
				return remember(ctx, d)
			})
			if r.DryRun && errno(err, unix.ECONNREFUSED) {
				err = p.notLookedAt(args[0], err)
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&r.Name, "name", "", "name of the filter (default: the disk's)")
	f.IntVar(&r.Queues, "queues", 0, "queues, each with a thread of its own (default: as configured)")
	f.IntVar(&r.Depth, "depth", 0, "requests in flight per queue, 1 to 4096 (default: as configured)")
	f.BoolVar(&attach, "attach", false, "come under the device, a device of device-mapper, also if it is not in use")
	f.BoolVar(&r.DryRun, "dry-run", false, "check everything, do nothing, and tell what would be made")
	f.BoolVar(&boot, "boot", false, "also at every boot")
	f.BoolVar(&logged, "intent-log", true, "log which zones are written to, so that change tracking goes on after a power failure (default: as configured)")
	f.StringVar(&zone, "intent-log-zone", "", "size of a zone of that log, a power of two (default: as configured)")
	f.StringVar(&mode, "mode", "", "how payloads travel: auto, copy or zerocopy (default: as configured)")
	return c
}

// notLookedAt is the error of a dry run without a daemon: err says that none runs.
func (p *program) notLookedAt(disk string, err error) error {
	e := &control.Error{Code: control.Unavailable, Errno: unix.ECONNREFUSED, Fix: "start it first: systemctl start ublk-blksnap, or ublk-blksnap daemon"}
	why := err.Error()
	if within := new(control.Error); errors.As(err, &within) {
		why = within.Message
	}
	e.Message = fmt.Sprintf("add %s: nothing was looked at: %s, and --dry-run starts none", disk, why)
	var names []string
	if boot, err := daemon.ReadBootDevices(p.configFile()); err == nil {
		for _, b := range boot {
			names = append(names, b.Name)
		}
	}
	if len(names) > 0 {
		e.Fix += "; that gives the disks that the configuration names their filters: " + strings.Join(names, ", ")
	}
	return e
}

// writePlan tells what would be made.
func writePlan(w io.Writer, d control.Device) {
	if d.Plan == nil {
		fmt.Fprintf(w, "%s has its filter already, %s\n", d.Original, d.Name)
		return
	}
	line := func(key string, v any) { fmt.Fprintf(w, "%-16s %v\n", key+":", v) }
	line("name", d.Name)
	line("original", d.Original+" ("+d.OriginalNumber+")")
	line("size", fmt.Sprintf("%d bytes (%s)", d.Size, control.HumanSize(d.Size)))
	line("queues", fmt.Sprintf("%d of depth %d", d.Queues, d.Depth))
	line("mode", d.Mode)
	if d.Attached {
		line("attached", attachedText)
	}
	line("memory", control.HumanSize(d.Plan.Memory))
	history := "goes on"
	if !d.History.Continued {
		history = "begins anew: " + d.History.Text
	}
	line("change tracking", history)
	failure := "it goes on"
	if !d.Plan.PowerFailure.Covered {
		failure = "it begins anew: " + d.Plan.PowerFailure.Reason
	}
	line("power failure", failure)
}

// rememberer gives what writes down that a disk has its filter at every boot, or with
// DryRun says so.
func (p *program) rememberer(r control.AddRequest) (func(context.Context, control.Device) error, error) {
	config := p.configFile()
	cfg, err := readConfig(config)
	if err != nil {
		return nil, err
	}
	path, err := daemon.StableLink(r.Path)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, d control.Device) error {
		b := daemon.BootDevice{Name: d.Name, Path: path, Queues: r.Queues, Depth: r.Depth, Mode: r.Mode, IntentLog: r.IntentLog, IntentLogZone: r.IntentLogZone}
		if r.DryRun {
			file, err := daemon.CheckBootDevice(config, b)
			if err != nil {
				return fmt.Errorf("%s would get its filter, but not at the next boot: %w", d.Name, err)
			}
			p.tell(fmt.Sprintf("%s: %s would have it for the boot", d.Name, file))
		} else if err := daemon.AddBootDevice(config, b); err != nil {
			return fmt.Errorf("%s has its filter, but not at the next boot: %w", d.Name, err)
		}
		if path != r.Path {
			p.tell(fmt.Sprintf("%s: at the boot the disk is %s, which stays the same disk", d.Name, path))
		}
		for _, warning := range daemon.BootWarnings(ctx, cfg, b) {
			p.tell(fmt.Sprintf("%s: %s", d.Name, warning))
		}
		return nil
	}, nil
}

// addDevice adds a disk. If no disk has the name that is given, the daemon is asked for what
// has it in the working directory: it knows what to do with a file.
func addDevice(ctx context.Context, api control.API, r control.AddRequest) (control.Device, error) {
	d, err := api.AddDevice(ctx, r)
	if control.CodeOf(err) != control.NotFound || r.Path == "" || strings.Contains(r.Path, "/") {
		return d, err
	}
	path, e := filepath.Abs(r.Path)
	if e == nil {
		_, e = os.Lstat(path)
	}
	if e != nil {
		return d, err
	}
	r.Path = path
	return api.AddDevice(ctx, r)
}

// addedBefore is the filter that a disk has already, if it is the one that is asked
// for; otherwise err. One that came under its disk has users who know the disk's own path,
// which the rules of the boot would take from systemd.
func addedBefore(ctx context.Context, api control.API, r control.AddRequest, err error) (control.Device, error) {
	s, e := api.DeviceStatus(ctx, r.Path)
	if e != nil || r.Name != "" && r.Name != s.Name {
		return control.Device{}, err
	}
	if s.Attached {
		return control.Device{}, &control.Error{Code: control.Busy, Errno: unix.EBUSY,
			Message: fmt.Sprintf("add %s: the filter %s came under it, for users of its own path; at the boot a filter takes its place", r.Path, s.Name),
			Fix:     fmt.Sprintf("ublk-blksnap remove %s, unmount it, add it with --boot, and name its UUID or /dev/ublk-blksnap/%[1]s in fstab", s.Name)}
	}
	return s.Device, nil
}
