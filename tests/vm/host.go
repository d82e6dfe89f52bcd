package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/ublk-blksnap/ublk-blksnap/tests/vm/machine"
)

// hasUblk says whether this machine's own kernel can do it.
func hasUblk() bool {
	if _, err := os.Stat("/dev/ublk-control"); err == nil {
		return true
	}
	return exec.Command("modprobe", "ublk_drv").Run() == nil
}

// runHere runs the command without a machine.
func runHere(ctx context.Context, cfg machine.Config) (status int, err error) {
	words := cfg.Command
	if len(words) == 1 {
		words = []string{"bash", "-c", words[0]}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.Timeout, machine.ErrTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Env = cfg.Env
	cmd.Stdout, cmd.Stderr = cfg.Stdout, cfg.Stderr
	// The whole group ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.Is(context.Cause(ctx), machine.ErrTimeout):
		return statusTimeout, fmt.Errorf("%w after %v", machine.ErrTimeout, cfg.Timeout)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	case ctx.Err() != nil:
		return statusInterrupted, errors.New("interrupted")
	}
	return statusBroken, err
}
