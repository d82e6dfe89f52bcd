package daemon

import (
	"errors"
	"slices"
	"testing"
)

func TestMoveToRoots(t *testing.T) {
	const v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
	const v1 = `30 23 0:26 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,name=systemd
31 23 0:27 /docker/1 /mnt/part rw - cgroup cgroup rw,cpu,cpuacct
32 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 23 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
`
	for _, c := range []struct {
		name, own, mounts string
		want              []string
		failures          int
	}{
		{"version 2", "0::/user.slice/session-1.scope\n", v2, []string{"/sys/fs/cgroup"}, 0},
		{"at the root", "0::/\n", v2, nil, 0},
		{"version 1", "3:cpu,cpuacct:/job\n2:pids:/\n1:name=systemd:/job\n0::/\n", v1, []string{"/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/systemd"}, 0},
		{"not mounted", "3:memory:/job\n0::/job\n", v1, nil, 2},
		{"refused", "0::/refused\n", v2, []string{"/sys/fs/cgroup"}, 1},
	} {
		var got []string
		failed := moveToRoots(c.own, c.mounts, func(dir string) error {
			got = append(got, dir)
			if c.name == "refused" {
				return errors.New("no")
			}
			return nil
		})
		if !slices.Equal(got, c.want) || len(failed) != c.failures {
			t.Errorf("%s: moved to %q, failed %v", c.name, got, failed)
		}
	}
}
