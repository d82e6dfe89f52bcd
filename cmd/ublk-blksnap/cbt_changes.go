package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

func (p *program) cbtChanges() *cobra.Command {
	var r control.ChangesRequest
	var since string
	c := &cobra.Command{
		Use:   "changes DEV --since GENERATION:N",
		Short: "List the ranges that changed between a take and the last one",
		Long: `List the ranges that changed between a take and the last one, as SECTOR:COUNT in
sectors of 512 bytes, merged and in order. The take is named by the token that
"snapshot info --field take" prints for the device. Status 6 says that its generation has ended:
everything has to be copied.`,
		Example: "  token=$(ublk-blksnap snapshot info nightly --field take)\n  ublk-blksnap cbt changes data --since $token",
		Args:    args(1, 1),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if !c.Flags().Changed("since") {
				return usage("changes: since which take? give --since GENERATION:N")
			}
			if r.Since, err = control.ParseTake(since); err != nil {
				return fmt.Errorf("changes: --since: %w", err)
			}
			if r.Device, err = devicePath(args[0]); err != nil {
				return err
			}
			return p.with(c, func(ctx context.Context, api control.API) error {
				if p.json {
					return p.changesJSON(ctx, api, r)
				}
				w := bufio.NewWriter(p.out)
				_, err := api.CBTChanges(ctx, r, func(changed control.Range) error {
					_, err := fmt.Fprintln(w, changed)
					return err
				})
				return errors.Join(err, w.Flush())
			})
		},
	}
	c.Flags().StringVar(&since, "since", "", "token of a take, GENERATION:N")
	return c
}

// changesJSON prints the ranges as they come: there may be millions.
func (p *program) changesJSON(ctx context.Context, api control.API, r control.ChangesRequest) error {
	w := bufio.NewWriter(p.out)
	start := `{"ranges":[`
	i, err := api.CBTChanges(ctx, r, func(changed control.Range) error {
		b, err := json.Marshal(changed)
		if err == nil {
			_, err = fmt.Fprintf(w, "%s\n%s", start, b)
		}
		start = ","
		return err
	})
	if err != nil {
		return errors.Join(err, w.Flush())
	}
	rest, err := json.Marshal(struct {
		control.CBTInfo
		Since control.Take `json:"since"`
	}{i, r.Since})
	if err != nil {
		return err
	}
	if start != "," {
		fmt.Fprint(w, start)
	}
	fmt.Fprintf(w, "],\n%s\n", rest[1:])
	return w.Flush()
}
