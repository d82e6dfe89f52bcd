package machine

import "os"

// Env returns the environment that a program of the host needs to find its things in the guest. Later entries of a
// Config.Env override earlier ones, so a caller may append to it.
func Env() []string {
	env := []string{
		"HOME=/root", "USER=root", "LOGNAME=root", "TERM=dumb", "LANG=C.UTF-8", "TMPDIR=/tmp",
		"PATH=" + os.Getenv("PATH") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"GOPROXY=off", "GOFLAGS=-buildvcs=false", "GOTELEMETRY=off", // no network there
		"UBLK_BLKSNAP_VM=1",
	}
	for _, name := range []string{"HOME", "GOCACHE", "GOPATH", "GOMODCACHE", "GOROOT", "GOTOOLCHAIN", "GOMAXPROCS", "CI"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}
