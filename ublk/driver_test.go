package ublk

import (
	"errors"
	"strings"
	"testing"
)

func TestNoDriver(t *testing.T) {
	cases := []struct {
		release string
		exists  bool
		out     string
		want    string
	}{
		{"6.1.0-31-amd64", false, "", "kernel 6.1.0-31-amd64 is too old: Linux 6.5 or newer"},
		{"5.10.0", false, "", "too old"},
		{"6.12.9", false, "", "no module ublk_drv: install a kernel built with CONFIG_BLK_DEV_UBLK"},
		{"6.12.9", true, "modprobe: ERROR: key was rejected", "key was rejected"},
		{"6.12.9", true, "", "exit status 1"},
	}
	for _, c := range cases {
		err := noDriver(c.release, c.exists, []byte(c.out), errors.New("exit status 1"))
		if !errors.Is(err, ErrNoDriver) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", c.release, err, c.want)
		}
	}
}

func TestOlderThan(t *testing.T) {
	for release, want := range map[string]bool{
		"6.4.16": true, "5.19": true, "6.5.0-rc1": false, "6.12.117+deb12-cloud-amd64": false, "7.2.12": false, "strange": false,
	} {
		if got := OlderThan(release, "6.5"); got != want {
			t.Errorf("%s older than 6.5: %v", release, got)
		}
	}
}
