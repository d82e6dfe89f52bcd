// Command ublk-blksnap makes block-device snapshots and tracks changed blocks,
// as a userspace driver on Linux ublk.
//
// Each file holds one command, or a few small ones that belong together. Most
// commands only ask the daemon, through package control. The commands doctor,
// config and daemon do their work here, with package daemon. If the program is
// called as "blksnap", it offers only blksnap's own commands.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/daemon"
)

// The main goroutine keeps the first thread, whose name is that of the process,
// from others that name theirs.
func init() { runtime.LockOSThread() }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	p := &program{out: os.Stdout, err: os.Stderr, terminal: isTerminal, driver: daemon.CheckDriver}
	p.connect = func(ctx context.Context, start starts) (control.API, error) {
		s := daemon.Starter{Dir: p.dir(), ConfigPath: p.configPath, Starting: func(lost *control.Lost) {
			p.sayLost(lost)
			p.say("starting the daemon")
		}}
		switch start {
		case startNone:
			return s.Ask(ctx)
		case startFirst:
			return s.Start(ctx)
		case startNext:
		}
		return s.Connect(ctx)
	}
	os.Exit(p.run(ctx, os.Args))
}
