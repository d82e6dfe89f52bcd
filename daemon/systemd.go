package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

// What the daemon tells systemd, if it runs under it: sd_notify(3).

// notify tells systemd the state of the daemon, if systemd wants to know
// (sd_notify(3)). It does not wait for systemd.
func notify(state string) {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	c, err := net.Dial("unixgram", name)
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = io.WriteString(c, state)
}

const (
	// startStep is for how long more systemd is asked to wait for the start, again and
	// again: what a dead daemon left may be much, and on disks that take their time.
	startStep = time.Minute
	// stopStep is the same for what is done at the end of the machine.
	stopStep = 10 * time.Second
	// startPatience is how long a start, and what follows a reload, may make no progress. No
	// step of a start that does its work takes as long: serving a device again may take
	// serveTimeout, and all else less.
	startPatience = serveTimeout + 5*time.Minute
)

// progress counts the steps of a start.
type progress struct{ steps atomic.Uint64 }

// made counts a step.
func (p *progress) made() {
	if p != nil {
		p.steps.Add(1)
	}
}

// watched returns a function that says whether a step was made within patience.
func (p *progress) watched(patience time.Duration) func() bool {
	seen, last := p.steps.Load(), time.Now()
	return func() bool {
		if now := p.steps.Load(); now != seen {
			seen, last = now, time.Now()
		}
		return time.Since(last) < patience
	}
}

// extend asks systemd to wait for step more, again and again, until stop is called or
// goesOn says that nothing is to be waited for any more. It says more with it.
func extend(step time.Duration, more string, goesOn func() bool) (stop func()) {
	if !Supervised() {
		return func() {}
	}
	ask := func() { notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d%s", step.Microseconds(), more)) }
	ask()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(step / 3):
			}
			if !goesOn() {
				return
			}
			ask()
		}
	}()
	return cancel
}

// extendStart asks systemd to wait for a start that makes progress, until stop is
// called. One that hangs is killed, and the next daemon tries (TimeoutStartFailureMode).
// After a reload it is the watchdog that waits, because the unit is running.
func extendStart(p *progress, patience time.Duration, reloaded bool) (stop func()) {
	alive := ""
	if reloaded {
		setWatchdog(startStep)
		alive = "\nWATCHDOG=1"
	}
	return extend(startStep, alive, p.watched(patience))
}

// patience is how long a start with this configuration may make no progress.
func (c *Config) patience() time.Duration {
	return startPatience + c.StorageTimeout + c.DiskTimeout
}

// extendStop asks systemd to wait for what is done at the end of the machine, until stop
// is called.
func extendStop() (stop func()) { return extend(stopStep, "", func() bool { return true }) }

// watchdogTime is how long systemd waits for a sign of life (WatchdogSec), 0 if it
// waits for none.
func watchdogTime() time.Duration {
	usec, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || usec <= 0 {
		return 0
	}
	if pid := os.Getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return time.Duration(usec) * time.Microsecond
}

// setWatchdog tells systemd how long to wait for signs of life from now on.
func setWatchdog(t time.Duration) {
	if watchdogTime() > 0 {
		notify(fmt.Sprintf("WATCHDOG_USEC=%d", t.Microseconds()))
	}
}

// feedWatchdog gives systemd signs of life until ctx ends. A sign is given only after
// every thread that serves I/O has run a task, so that a daemon of which one hangs is
// killed, and the next one takes over what waits.
func feedWatchdog(ctx context.Context, d stopper, log *slog.Logger) {
	limit := watchdogTime()
	if limit == 0 {
		return
	}
	// After a reload it is that which was set for the time of it.
	setWatchdog(limit)
	pause := limit / 3
	for ctx.Err() == nil {
		asked, cancel := context.WithTimeout(ctx, pause)
		err := d.Answers(asked)
		cancel()
		if err == nil {
			notify("WATCHDOG=1")
		} else if ctx.Err() == nil {
			log.Error("no sign of life to the watchdog", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}
