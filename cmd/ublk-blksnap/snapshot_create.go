package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) snapshotCreate() *cobra.Command {
	var (
		storage      []string
		limit, chunk sizeFlag
		take         bool
		noFreeze     bool
		noHooks      bool
		overwrite    bool
		encrypt      bool
		name         string
		labels       []string
		ttl          ttlFlag
		auto         string
		reserve      percentFlag
	)
	c := &cobra.Command{
		Use:   "create [DEV...]",
		Short: "Create a snapshot of one or several filters",
		Long: `Create a snapshot of one or several filters and print its UUID. Nothing is kept
until it is taken: by "snapshot take", or at once with --take. Then the path of the
image of each device is printed instead, one a line. If the take fails, no snapshot
is left.

With --name the snapshot can be called so wherever a UUID is asked for, and its
images are /dev/ublk-blksnap/images/NAME/DEV. No other snapshot may have the name,
and it may not look like the beginning of a UUID.

With --ttl the snapshot is destroyed when its time is over, with an event. If an
image is mounted or open then, an event and "snapshot list" say so, and it is
destroyed when nobody uses it. The time counts from now on, also while the machine
sleeps; "snapshot set --ttl" changes it.

What the filters' disks held at the take and is overwritten later goes to the
difference storage: a file, a directory (a nameless file in it) or a whole block
device. It must not lie on any of the disks, through no stack of devices.

A file that is there has to be the superuser's and empty, sparse or only
allocated, and a block device unused, unless --overwrite is given. What is stored
goes to a nameless file beside it that takes over its space, and may grow beyond
its size, up to --limit; at the end the file has its space back.

With --auto-append a snapshot whose storage runs low, as "low_free_space" tells, gets
a file in that directory too, once. It grows as long as the reserve of its filesystem
stays free. An event tells of it, or why it could not be.

With --encrypt nobody can read what is stored, neither now nor later: the key is
in memory only, and gone with the snapshot, or if the machine loses power. The
images then copy each payload, and one thread encrypts what all snapshots store.`,
		Example: `  ublk-blksnap snapshot create vdb vdc --storage /var/tmp --limit 20G --take
  ublk-blksnap snapshot create data --name nightly --ttl 12h --storage /var/tmp --take
  mount -o ro /dev/ublk-blksnap/images/nightly/data /mnt`,
		Args: args(0, -1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			for flag, given := range map[string]bool{"no-freeze": noFreeze, "no-hooks": noHooks} {
				if given && !take {
					return usage("create: --%s is for the take: give --take too", flag)
				}
			}
			if take && len(storage) == 0 {
				return usage("create: --take needs a place for what is overwritten: give --storage too")
			}
			r := control.CreateRequest{ChunkSize: int64(chunk), Take: take, NoFreeze: noFreeze, NoHooks: noHooks, Name: name, TTL: time.Duration(ttl)}
			if r.Labels, err = parseLabels("create", labels); err != nil {
				return err
			}
			if c.Flags().Changed("encrypt") {
				r.Encrypt = &encrypt
			}
			if r.AutoAppend, err = autoAppend(c, auto, reserve); err != nil {
				return err
			}
			if r.Devices, err = devicePaths(args); err != nil {
				return err
			}
			if r.Storage, err = storages(storage, control.Storage{Limit: int64(limit), Overwrite: overwrite}); err != nil {
				return err
			}
			return p.start(c, func(ctx context.Context, api control.API) error {
				s, err := api.CreateSnapshot(ctx, r)
				if err != nil {
					return err
				}
				p.warn(s, r.Storage, p.tell)
				p.tellWarnings(s)
				for _, st := range s.Storage {
					p.say("storage " + storageText(st))
				}
				return p.print(s, func(w io.Writer) {
					if take {
						writeImages(w, s)
					} else {
						fmt.Fprintln(w, s.ID)
					}
				})
			})
		},
	}
	f := c.Flags()
	f.StringVar(&auto, "auto-append", "", "directory in which it gets more storage by itself when it runs low; \"\": none (default: as configured)")
	f.Var(&reserve, "reserve", "with --auto-append: how much of the directory's filesystem stays free (default: as configured)")
	f.StringArrayVar(&storage, "storage", nil, "file, directory or block device for differences; may be given again")
	f.Var(&limit, "limit", "the most that each storage may take (default: all but the last 5% of its filesystem, or the last 1G)")
	f.BoolVar(&overwrite, "overwrite", false, "use a storage file or block device whatever it holds, which is lost")
	f.BoolVar(&encrypt, "encrypt", false, "encrypt what is stored (default: as configured)")
	f.Var(&chunk, "chunk-size", "4K to 64M, a power of two (default: from the disks' sizes, as configured)")
	f.StringVar(&name, "name", "", "name of the snapshot (default: none)")
	f.StringArrayVar(&labels, "label", nil, "KEY=VALUE to keep with it; may be given again")
	f.Var(&ttl, "ttl", "destroy it after this time: 45m, 12h, 7d (default: keep it)")
	f.BoolVar(&take, "take", false, "take it at once, and print the images")
	f.BoolVar(&noFreeze, "no-freeze", false, "with --take: leave mounted filesystems unfrozen")
	f.BoolVar(&noHooks, "no-hooks", false, "with --take: run no programs around it (see snapshot take)")
	return c
}

func devicePaths(args []string) ([]string, error) {
	var out []string
	for _, a := range args {
		d, err := devicePath(a)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

// autoAppend is what the flags ask for; nil if there are none.
func autoAppend(c *cobra.Command, dir string, reserve percentFlag) (a *control.AutoAppend, err error) {
	if !c.Flags().Changed("auto-append") {
		if reserve != 0 {
			return nil, usage("create: --reserve is for storage that is appended: give --auto-append too")
		}
		return nil, nil
	}
	a = &control.AutoAppend{Reserve: int(reserve)}
	if dir != "" {
		a.Path, err = filepath.Abs(dir)
	}
	return a, err
}

// percentFlag is a flag that holds a percentage.
type percentFlag int

func (p *percentFlag) String() string { return fmt.Sprintf("%d%%", int(*p)) }
func (p *percentFlag) Type() string   { return "percentage" }
func (p *percentFlag) Set(text string) error {
	v, err := control.ParsePercent(text)
	*p = percentFlag(v)
	return err
}

// storages are the paths, each as like says.
func storages(paths []string, like control.Storage) ([]control.Storage, error) {
	var out []control.Storage
	for _, path := range paths {
		var err error
		if like.Path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
		out = append(out, like)
	}
	return out, nil
}

// parseLabels reads KEY=VALUE.
func parseLabels(command string, texts []string) (map[string]string, error) {
	var labels map[string]string
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if _, twice := labels[key]; !ok || twice {
			return nil, usage("%s: --label %s: write KEY=VALUE, and each key once", command, text)
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
	}
	return labels, nil
}

// writeImages writes the path of each image.
func writeImages(w io.Writer, s control.Snapshot) {
	for _, im := range s.Images {
		fmt.Fprintln(w, im.Link)
	}
}

// warn says what is uncertain about storage that has just been given to a snapshot.
func (p *program) warn(s control.Snapshot, given []control.Storage, say func(string)) {
	var said []string // of storage that was given before by the same path
	for _, st := range s.Storage {
		text := "warning: storage " + st.Path + ": " + st.Warning
		if st.Warning != "" && !slices.Contains(said, text) && slices.ContainsFunc(given, func(g control.Storage) bool { return g.Path == st.Path }) {
			say(text)
			said = append(said, text)
		}
	}
}

// sizeFlag is a flag that holds a size in bytes.
type sizeFlag int64

func (s *sizeFlag) String() string { return control.FormatSize(int64(*s)) }
func (s *sizeFlag) Type() string   { return "size" }
func (s *sizeFlag) Set(text string) error {
	v, err := control.ParseSize(text)
	if err == nil && v == 0 {
		err = fmt.Errorf("%q: zero", text)
	}
	*s = sizeFlag(v)
	return err
}

// ttlFlag is a flag that holds how long a snapshot shall live; 0: for ever.
type ttlFlag time.Duration

func (t *ttlFlag) String() string { return time.Duration(*t).String() }
func (t *ttlFlag) Type() string   { return "time" }
func (t *ttlFlag) Set(text string) error {
	v, err := control.ParseTTL(text)
	*t = ttlFlag(v)
	return err
}
