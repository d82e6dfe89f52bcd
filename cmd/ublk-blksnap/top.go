package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ublk-blksnap/ublk-blksnap/control"
)

// What a terminal is told: every terminal of today knows these, also behind ssh.
const (
	otherScreen = "\x1b[?1049h\x1b[?25l" // without a cursor
	firstScreen = "\x1b[?25h\x1b[?1049l"
	topLeft     = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
)

func (p *program) top() *cobra.Command {
	every := defaultInterval
	c := &cobra.Command{
		Use:   "top",
		Short: "Show live what filters and snapshots do",
		Long: `Show on the terminal what each filter does, those with the most writing first, how full
each snapshot is, and above that what needs attention. The key q ends it. Where there
is no terminal, "status --watch" tells as much.`,
		Example: "  ublk-blksnap top\n  ublk-blksnap top --interval 10s",
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkInterval(c, every, true); err != nil {
				return err
			}
			in, out := os.Stdin, p.out
			if p.in != nil {
				in = p.in
			}
			screen, ok := out.(*os.File)
			if p.json || !ok || !term.IsTerminal(int(screen.Fd())) || !term.IsTerminal(int(in.Fd())) {
				return usage("top: needs a terminal: use status --watch, with --json if a program is to read it")
			}
			api, err := p.reach(c.Context(), startNext)
			if err != nil {
				return err
			}
			return live(c.Context(), api, in, screen, every)
		},
	}
	c.Flags().DurationVar(&every, "interval", every, "how often it is looked at")
	return c
}

// live shows what goes on until the key q.
func live(ctx context.Context, api control.API, in, screen *os.File, every time.Duration) error {
	before, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("top: prepare the terminal: %w", err)
	}
	defer func() { _ = term.Restore(int(in.Fd()), before) }()
	fmt.Fprint(screen, otherScreen)
	defer fmt.Fprint(screen, firstScreen)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	keys := make(chan byte)
	go readKeys(ctx, in, keys)
	// The daemon may take its time. So somebody else asks it, and keys are heard meanwhile.
	type looked struct {
		overview
		err error
	}
	looks := make(chan looked)
	go func() {
		for {
			var l looked
			l.overview, l.err = look(ctx, api)
			select {
			case looks <- l:
			case <-ctx.Done():
				return
			}
			select {
			case <-time.After(every):
			case <-ctx.Done():
				return
			}
		}
	}()
	var last overview
	for {
		select {
		case <-ctx.Done():
			return silentError(statusInterrupted)
		case key := <-keys:
			switch key {
			case 'q', 'Q':
				return nil
			case 3, 4: // ^C, ^D
				return silentError(statusInterrupted)
			}
		case l := <-looks:
			width, height, err := term.GetSize(int(screen.Fd()))
			if err != nil || width <= 0 || height <= 0 {
				width, height = 80, 24
			}
			draw(screen, topLines(l.overview, last, l.err), width, height)
			if l.err == nil {
				last = l.overview
			}
		}
	}
}

func readKeys(ctx context.Context, in io.Reader, keys chan<- byte) {
	b := make([]byte, 1)
	for {
		n, err := in.Read(b)
		if err != nil {
			b[0] = 4 // the terminal is gone
		} else if n == 0 {
			continue
		}
		select {
		case keys <- b[0]:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// topLines are what is shown: now, compared with before.
func topLines(now, before overview, err error) []string {
	var b bytes.Buffer
	if err != nil {
		fmt.Fprintf(&b, "%s: %v   q: quit\n", time.Now().Format(time.TimeOnly), err)
		now = before
	} else {
		fmt.Fprintf(&b, "%s: ublk-blksnap %s, process %d, up %s   q: quit\n", now.Time.Format(time.TimeOnly), now.Daemon.Version,
			now.Daemon.PID, now.Time.Sub(now.Daemon.Started).Round(time.Second))
	}
	writeAttention(&b, now)
	was := map[string]control.DeviceStatus{}
	for _, d := range before.Devices {
		was[d.Name] = d
	}
	seconds := now.Time.Sub(before.Time).Seconds()
	// rate is how fast a number rose. It begins anew with another filter of the same name.
	rate := func(d control.DeviceStatus, of func(control.DeviceStatus) uint64) int64 {
		old, ok := was[d.Name]
		if !ok || !old.Added.Equal(d.Added) || of(d) < of(old) || seconds <= 0 {
			return 0
		}
		return int64(float64(of(d)-of(old)) / seconds)
	}
	bytesOf := func(op string) func(control.DeviceStatus) uint64 {
		return func(d control.DeviceStatus) uint64 { return d.Operations[op].Bytes }
	}
	requestsOf := func(op string) func(control.DeviceStatus) uint64 {
		return func(d control.DeviceStatus) uint64 { return d.Operations[op].Requests }
	}
	devices := slices.Clone(now.Devices)
	slices.SortStableFunc(devices, func(a, b control.DeviceStatus) int {
		return cmp.Compare(rate(b, bytesOf(control.OpWrite)), rate(a, bytesOf(control.OpWrite)))
	})
	t := newTable(&b, "FILTER", "ORIGINAL", "WRITE/s", "READ/s", "WRITES/s", "READS/s", "IN FLIGHT", "ERRORS", "SNAPSHOTS")
	for _, d := range devices {
		t.row(d.Name, d.Original, control.HumanSize(rate(d, bytesOf(control.OpWrite))), control.HumanSize(rate(d, bytesOf(control.OpRead))),
			rate(d, requestsOf(control.OpWrite)), rate(d, requestsOf(control.OpRead)), d.InFlight, d.Errors, len(d.Snapshots))
	}
	fmt.Fprintln(&b)
	_ = t.w.Flush()
	s := snapshotTable(&b, now.Snapshots)
	if s.head == nil {
		fmt.Fprintln(&b)
	}
	_ = s.w.Flush()
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// draw puts as much of the lines on the screen as it has room for, in one write.
func draw(screen io.Writer, lines []string, width, height int) {
	var b strings.Builder
	b.WriteString(topLeft)
	for i, line := range lines[:min(len(lines), height)] {
		if i > 0 {
			b.WriteString("\r\n")
		}
		runes := []rune(line)
		b.WriteString(string(runes[:min(len(runes), width-1)])) // in the last column the cursor would stand on what is cleared
		b.WriteString(clearLine)
	}
	b.WriteString(clearBelow)
	fmt.Fprint(screen, b.String())
}
