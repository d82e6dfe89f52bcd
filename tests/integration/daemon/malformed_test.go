package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/ublk-blksnap/ublk-blksnap/control"
	"github.com/ublk-blksnap/ublk-blksnap/control/controltest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/program"
)

// TestMalformedRequests: a daemon with a filter and a snapshot refuses requests, many of them,
// that mean nothing, half of them at the socket of those who may only look. Nothing of it
// changes, nothing is left of them, and it serves on.
func TestMalformedRequests(t *testing.T) {
	guest.NeedEither(t)
	program.LeakTest(t)
	disk := guest.RAMDisks(t, 1, 64<<20)[0]
	d := program.Start(t, "group=4242")
	sockets := []string{d.RunDir.Socket(), d.RunDir.ReadSocket()}
	dev := d.Add(disk)
	d.Destroy(d.Take(0, dev).ID)
	s := d.Take(0, dev)
	take := s.Images[0].Take
	known := controltest.Known{Device: dev.Name, Path: disk, Snapshot: s.ID, Generation: take.Generation.String(), Sectors: uint64(dev.Size / 512), Snapshots: true}
	if uuid.Validate(known.Generation) != nil {
		t.Fatalf("%+v", known)
	}
	send := func(first uint64, n int) {
		var wg sync.WaitGroup
		for seed := first; seed < first+4; seed++ {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r, socket := rand.New(rand.NewPCG(seed, 12)), sockets[seed%2]
				for range n / 4 {
					if err := controltest.Try(socket, controltest.Malformed(r, known), guest.Patience); err != nil {
						t.Errorf("seed %d: %v", seed, err)
					}
				}
			}()
		}
		wg.Wait()
	}
	send(0, 40) // so that the daemon has all the threads that it needs for them
	before, held, memory := stateOf(t, d, dev, s.ID), d.Held(), d.Memory()
	n := 200
	if guest.Long() {
		n = 10_000
	}
	// Some never send the end of theirs, and keep the connection.
	var silent []net.Conn
	for i := range 20 {
		conn, err := net.Dial("unix", sockets[i%2])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /v1/device/%s HTTP/1.1\r\nHost: d\r\nContent-Length: 99\r\n\r\n{\"device\":%q", []string{"remove", "status"}[i%2], dev.Name)
		silent = append(silent, conn)
	}
	send(100, n)
	for _, conn := range silent {
		_ = conn.SetReadDeadline(time.Now().Add(guest.Patience))
		for err := error(nil); err == nil; {
			if _, err = conn.Read(make([]byte, 4096)); isTimeout(err) {
				t.Fatal("the daemon waits for ever for the end of a request")
			}
		}
	}
	// The callers of some have left, and these may take their time.
	now := ""
	for end := time.Now().Add(guest.Patience); now != before; time.Sleep(50 * time.Millisecond) {
		if now = stateOf(t, d, dev, s.ID); now != before && time.Now().After(end) {
			t.Errorf("was\n%s\nis\n%s", before, now)
			break
		}
	}
	reader := control.NewClient(sockets[1])
	if list, err := reader.Devices(guest.Context(t)); err != nil || len(list) != 1 {
		t.Errorf("asked by a reader: %+v, %v", list, err)
	}
	reader.Close()
	d.Settled(held, 8)
	if now := d.Memory(); now > memory+16<<20 {
		t.Errorf("%d MiB of memory, %d before", now>>20, memory>>20)
	}
	d.Destroy(s.ID)
	d.Remove(dev)
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// stateOf is all that a daemon with one filter tells and keeps, as text.
func stateOf(t *testing.T, d *program.Daemon, dev control.Device, id string) string {
	t.Helper()
	status, err := d.DeviceStatus(guest.Context(t), dev.Name)
	if err != nil {
		t.Fatal(err)
	}
	devices, err := d.Devices(guest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	s := d.Show(id)
	s.Images[0].Take, s.Taken = nil, nil                   // pointers
	s.Usage.Limit, s.Usage.Percent, s.Usage.Left = 0, 0, 0 // as the filesystem has room at this moment
	status.CBT.History, devices[0].Snapshots, status.Snapshots = control.History{}, nil, nil
	status.Operations[control.OpRead] = control.Operation{} // udev looks at the disk
	cbt := *status.CBT
	status.CBT = nil
	var files []string
	for _, dir := range []string{string(d.RunDir), d.StateDir} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(files)
	return fmt.Sprintf("%+v\n%+v\n%+v\n%+v\n%q\n%v\n%v\n%x", status, cbt, devices, s, program.SnapshotIDs(t, d), guest.UblkDevices(), files, d.Map(dev))
}
