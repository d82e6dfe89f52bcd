package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) blksnapSnapshotCreate() *cobra.Command {
	var devices []string
	var file string
	var limit sizeFlag
	c := &cobra.Command{
		Use:   "snapshot_create -d DEV... [-f FILE|DIR|BLOCKDEV [-l LIMIT]]",
		Short: "Create a snapshot and print its UUID (blksnap)",
		RunE: func(c *cobra.Command, args []string) (err error) {
			r := control.CreateRequest{Attach: true}
			if r.Devices, err = devicePaths(append(devices, args...)); err != nil {
				return err
			}
			if file != "" {
				if r.Storage, err = blksnapStorage(file, int64(limit)); err != nil {
					return err
				}
			}
			return p.start(c, func(ctx context.Context, api control.API) error {
				s, err := api.CreateSnapshot(ctx, r)
				if err != nil {
					return err
				}
				p.warn(s, r.Storage, p.say)
				return p.print(s, func(w io.Writer) { fmt.Fprintln(w, s.ID) })
			})
		},
	}
	f := c.Flags()
	f.StringArrayVarP(&devices, "device", "d", nil, "block devices")
	f.StringVarP(&file, "file", "f", "", "file, directory or block device for differences")
	f.VarP(&limit, "limit", "l", "the most that differences may take, with K, M or G")
	return c
}

// blksnapStorage is storage as blksnap takes it: a file is used whatever it
// holds, as scripts make it beforehand.
func blksnapStorage(path string, limit int64) ([]control.Storage, error) {
	return storages([]string{path}, control.Storage{Limit: limit, OverwriteFile: true})
}

func (p *program) blksnapSnapshotAdd() *cobra.Command {
	var id, device string
	c := &cobra.Command{
		Use:   "snapshot_add -i ID -d DEV",
		Short: "Add a device to a snapshot (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkID(c, id); err != nil {
				return err
			}
			path, err := devicePath(device)
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				_, err := api.AddToSnapshot(ctx, control.SnapshotDeviceRequest{ID: id, Device: path, Attach: true})
				return err
			})
		},
	}
	idOption(c, &id)
	deviceOption(c, &device)
	return c
}

func (p *program) blksnapSnapshotAppendStorage() *cobra.Command {
	var id, file string
	c := &cobra.Command{
		Use:   "snapshot_appendstorage -i ID -f FILE",
		Short: "Give a snapshot more difference storage (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkID(c, id); err != nil {
				return err
			}
			st, err := blksnapStorage(file, 0)
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				s, err := api.AppendStorage(ctx, control.StorageRequest{ID: id, Storage: st[0]})
				p.warn(s, st, p.say)
				return err
			})
		},
	}
	idOption(c, &id)
	c.Flags().StringVarP(&file, "file", "f", "", "file, directory or block device")
	require(c, "file")
	return c
}

func (p *program) blksnapSnapshotTake() *cobra.Command {
	return p.blksnapWithID("snapshot_take", "Take a snapshot (blksnap)", func(ctx context.Context, api control.API, id string) error {
		_, err := api.TakeSnapshot(ctx, control.TakeRequest{ID: id})
		return err
	})
}

func (p *program) blksnapSnapshotDestroy() *cobra.Command {
	c := p.blksnapWithID("snapshot_destroy", "Destroy a snapshot (blksnap)", func(ctx context.Context, api control.API, id string) error {
		_, err := api.DestroySnapshot(ctx, control.DestroyRequest{ID: id, Force: true}) // as blksnap does, without a word
		return err
	})
	c.Long = `Destroy a snapshot, under the users of its images too, whose I/O fails from then on:
blksnap does so. "ublk-blksnap snapshot destroy" names the users and destroys nothing.`
	return c
}

// blksnapWithID is a command that only needs a UUID and prints nothing.
func (p *program) blksnapWithID(name, short string, do func(context.Context, control.API, string) error) *cobra.Command {
	var id string
	c := &cobra.Command{
		Use:   name + " -i ID",
		Short: short,
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkID(c, id); err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error { return do(ctx, api, id) })
		},
	}
	idOption(c, &id)
	return c
}

func (p *program) blksnapSnapshotInfo() *cobra.Command {
	var device, field string
	c := &cobra.Command{
		Use:   "snapshot_info -d DEV [-f image|error_code]",
		Short: "Tell the image of a device and its error (blksnap)",
		Long: `Tell the image of a device and the error that broke its snapshot, 0 for none. With
several snapshots of one device it is the latest one that is taken.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if field != "" && field != "image" && field != "error_code" {
				return usage("snapshot_info: no field %q: use image or error_code", field)
			}
			path, err := devicePath(device)
			if err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				im, err := latestImage(ctx, api, path)
				if err != nil {
					return err
				}
				if im.Link == "" {
					im.Link = "/dev/" // and no name, as blksnap says it
				}
				v := map[string]any{"error_code": im.Errno, "image": im.Link}
				if field != "" {
					v = map[string]any{field: v[field]}
				}
				return p.print(v, func(w io.Writer) {
					if field != "" {
						fmt.Fprintln(w, v[field])
						return
					}
					fmt.Fprintf(w, "error_code=%d\nimage=%s\n", im.Errno, im.Link)
				})
			})
		},
	}
	deviceOption(c, &device)
	c.Flags().StringVarP(&field, "field", "f", "", "print only this: image or error_code")
	return c
}

// latestImage is the image of a device in the latest snapshot of it that is
// taken; none if there is no such snapshot.
func latestImage(ctx context.Context, api control.API, device string) (control.SnapshotImage, error) {
	d, err := api.DeviceStatus(ctx, device)
	if err != nil {
		return control.SnapshotImage{}, err
	}
	ss, err := api.Snapshots(ctx)
	if err != nil {
		return control.SnapshotImage{}, err
	}
	for i := len(ss) - 1; i >= 0; i-- {
		for _, im := range ss[i].Images {
			if im.Device == d.Name && im.Link != "" {
				return im, nil
			}
		}
	}
	return control.SnapshotImage{}, nil
}

func (p *program) blksnapSnapshotCollect() *cobra.Command {
	return &cobra.Command{
		Use:   "snapshot_collect",
		Short: "List the UUIDs of all snapshots, and an empty line (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			return p.with(c, func(ctx context.Context, api control.API) error {
				ss, err := api.Snapshots(ctx)
				if err != nil {
					return err
				}
				ids := []string{}
				for _, s := range ss {
					ids = append(ids, s.ID)
				}
				return p.print(ids, func(w io.Writer) {
					for _, id := range ids {
						fmt.Fprintln(w, id)
					}
					fmt.Fprintln(w)
				})
			})
		},
	}
}

func (p *program) blksnapSnapshotWaitEvent() *cobra.Command {
	var id string
	var timeout uint32
	c := &cobra.Command{
		Use:   "snapshot_waitevent -i ID -t MS",
		Short: "Wait for the next event of a snapshot (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkID(c, id); err != nil {
				return err
			}
			api, err := p.reach(c.Context(), startNext)
			if err != nil {
				return err
			}
			e, err := api.WaitEvent(c.Context(), control.WaitRequest{ID: id, Timeout: time.Duration(timeout) * time.Millisecond})
			result := "ok"
			switch control.CodeOf(err) {
			case control.Timeout:
				result = "timeout"
			case control.Interrupted:
				result = "interrupted"
			case control.NotFound:
				result = "not found"
			default:
				if err != nil {
					return err
				}
				if e.Kind == control.EventLost { // to blksnap there is no such snapshot
					result = "not found"
				}
			}
			if result != "ok" {
				return p.print(map[string]string{"result": result}, func(w io.Writer) { fmt.Fprintln(w, "result="+result) })
			}
			return p.print(map[string]any{"result": result, "event": e}, func(w io.Writer) {
				fmt.Fprintf(w, "result=ok\ntime=%d\nevent=%s\n", e.Time.UnixNano(), e.Kind)
				for _, line := range eventFields(e) {
					fmt.Fprintln(w, line)
				}
			})
		},
	}
	idOption(c, &id)
	c.Flags().Uint32VarP(&timeout, "timeout", "t", 0, "how long to wait, in milliseconds")
	require(c, "timeout")
	return c
}

// blksnapEvent says whether blksnap has the event too.
func blksnapEvent(kind string) bool {
	return kind == control.EventLowFreeSpace || kind == control.EventNoSpace || kind == control.EventCorrupted
}

// eventFields are what belongs to an event, as blksnap names it.
func eventFields(e control.Event) []string {
	var out []string
	if e.Kind == control.EventLowFreeSpace {
		out = append(out, fmt.Sprintf("requested_nr_sect=%d", e.Sectors))
	}
	if e.Kind == control.EventCorrupted {
		out = append(out, "device="+e.Device, fmt.Sprintf("error_code=%d", e.Errno))
	}
	return out
}

// inBlksnapsErrno is a negative errno in the words of the C library.
func inBlksnapsErrno(n int) string {
	text := unix.Errno(-n).Error()
	return strings.ToUpper(text[:1]) + text[1:]
}

var (
	// errWatched ends watching.
	errWatched = errors.New("watched to the end")
	// errLost is of a snapshot that a restart of the machine has ended: to blksnap there
	// is none.
	errLost = errors.New("lost")
)

func (p *program) blksnapSnapshotWatcher() *cobra.Command {
	var id string
	c := &cobra.Command{
		Use:   "snapshot_watcher -i ID",
		Short: "Print the events of a snapshot until it is corrupted or gone (blksnap)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkID(c, id); err != nil {
				return err
			}
			api, err := p.reach(c.Context(), startNext)
			if err != nil {
				return err
			}
			say := func(format string, args ...any) {
				if !p.json {
					fmt.Fprintf(p.out, format+"\n", args...)
				}
			}
			say("Start snapshot watcher.")
			err = api.Watch(c.Context(), control.WatchRequest{ID: id}, func(e control.Event) error {
				if e.Kind == control.EventLost {
					return errLost
				}
				if !blksnapEvent(e.Kind) {
					return nil
				}
				if p.json {
					// One line an event, for readers by the line.
					if err := json.NewEncoder(p.out).Encode(e); err != nil {
						return err
					}
				}
				if e.Kind == control.EventCorrupted {
					say("%d - The snapshot was corrupted for device [%s] with error %q.", e.Time.UnixNano(), e.Device, inBlksnapsErrno(e.Errno))
					return errWatched
				}
				say("%d - %s", e.Time.UnixNano(), strings.Join(append([]string{e.Kind}, eventFields(e)...), " "))
				return nil
			})
			switch {
			case errors.Is(err, errWatched):
			case err == nil, errors.Is(err, errLost), control.CodeOf(err) == control.NotFound:
				say("The snapshot no longer exists.")
			default:
				return watched(c.Context(), err)
			}
			say("Snapshot watcher finished.")
			return nil
		},
	}
	idOption(c, &id)
	return c
}
