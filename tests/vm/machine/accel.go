package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// trialTimeout bounds the trial boot. One that works takes two or three seconds.
const trialTimeout = 20 * time.Second

// chooseAccel returns KVM if a machine boots with it here, else TCG. That /dev/kvm exists proves little: nested or
// restricted, it may hang or abort a stock kernel. The answer is kept in the cache, for this kernel of the host and
// that of the guest.
func chooseAccel(ctx context.Context, cfg Config) (string, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return TCG, nil
	}
	kvm.Close()
	kernel, err := Fetch(ctx, cfg.Cache, cfg.Kernel)
	if err != nil {
		return "", err
	}
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		return "", fmt.Errorf("read host's kernel release: %w", err)
	}
	file := filepath.Join(cfg.Cache, "accel", unix.ByteSliceToString(host.Release[:])+"+"+kernel.Release)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", fmt.Errorf("create accelerator cache: %w", err)
	}
	unlock, err := lockFile(file + ".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if known, err := os.ReadFile(file); err == nil {
		return strings.TrimSpace(string(known)), nil
	}

	m, err := start(ctx, Config{
		Accel: KVM, MemMiB: 512, CPUs: 1, Command: []string{"exit 0"},
		Env: Env(), Timeout: trialTimeout,
	}, kernel)
	if err != nil {
		return "", err
	}
	accel := KVM
	status, err := m.Wait()
	if errors.Is(err, ErrKilled) {
		return "", err
	}
	if err != nil || status != 0 {
		accel = TCG
	}
	return accel, os.WriteFile(file, []byte(accel+"\n"), 0o644)
}
