package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
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
	// noWatchdog is the watchdog's time of a reload: longer than any takes, so that only
	// a program that hangs in it is killed.
	noWatchdog = time.Hour
)

// extendStart asks systemd to wait for a start that goes on, until stop is called.
func extendStart() (stop func()) {
	if !Supervised() {
		return func() {}
	}
	ask := func() { notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", startStep.Microseconds())) }
	ask()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(startStep / 3):
				ask()
			}
		}
	}()
	return cancel
}

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
