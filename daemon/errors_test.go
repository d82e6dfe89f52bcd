package daemon

import (
	"context"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/internal/disk"
)

func TestFail(t *testing.T) {
	for _, c := range []struct {
		err  error
		code control.Code
		text string
	}{
		{&disk.Error{Kind: disk.ErrInUse, Path: "/dev/vdb", What: "mounted on /mnt", Fix: "unmount it first"}, control.Busy, "add /dev/vdb: mounted on /mnt: unmount it first"},
		{&disk.Error{Kind: disk.ErrNotFound, Path: "/dev/vdb", What: "no such device"}, control.NotFound, "add /dev/vdb: no such device"},
		{&disk.Error{Kind: disk.ErrNotBlock, Path: "/dev/vdb", What: "a directory"}, control.Invalid, "add /dev/vdb: a directory"},
		{&disk.Error{Kind: disk.ErrReadOnly, Path: "/dev/vdb", What: "read-only"}, control.ReadOnly, "add /dev/vdb: read-only"},
		{&disk.Error{Kind: unix.EIO, Path: "/dev/vdb", What: "open: input/output error"}, control.Internal, "add /dev/vdb: open: input/output error"},
		{&control.Error{Code: control.Exists, Message: "there", Fix: "go"}, control.Exists, "add /dev/vdb: there: go"},
		{fmt.Errorf("queue 3: %w", &control.Error{Code: control.Exists, Message: "there"}), control.Exists, "add /dev/vdb: queue 3: there"},
		{fmt.Errorf("open it: %w", unix.EBUSY), control.Busy, "add /dev/vdb: open it: device or resource busy"},
		{os.ErrNotExist, control.NotFound, "add /dev/vdb: file does not exist"},
		{context.DeadlineExceeded, control.Timeout, "add /dev/vdb: took too long"},
		{context.Canceled, control.Interrupted, "add /dev/vdb: interrupted"},
		{fmt.Errorf("odd"), control.Internal, "add /dev/vdb: odd"},
		// The object is named once, and by a path that everybody knows.
		{&control.Error{Code: control.Busy, Message: "/dev/vdb: held by snapshot 7", Fix: "destroy it"}, control.Busy, "add /dev/vdb: held by snapshot 7: destroy it"},
		{fmt.Errorf("/proc/1/root/dev/vdb: %w", unix.EBUSY), control.Busy, "add /dev/vdb: device or resource busy"},
		{&os.PathError{Op: "open", Path: "/proc/1/root/var/tmp/x", Err: unix.EACCES}, control.Denied, "add /dev/vdb: open /var/tmp/x: permission denied"},
	} {
		e := fail(c.err, "add %s", "/dev/vdb")
		if e.Code != c.code || e.Error() != c.text {
			t.Errorf("fail(%v) = %s %q, want %s %q", c.err, e.Code, e, c.code, c.text)
		}
	}
}
