package ublk

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/internal/uapi"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

// TestUblkCutShort: a server dies while it takes a device over, when it has only claimed it (-1),
// and when it has fetched none, some or all of the queues. The next one goes on. Linux 6.12
// crashes if START_USER_RECOVERY is given for a device of which some queues are fetched.
func TestUblkCutShort(t *testing.T) {
	ctl := openControl(t)
	const path = "/dev/shm/cutshort"
	for _, queues := range slices.Compact([]int{1, min(2, ublk.MaxQueues())}) {
		t.Run(fmt.Sprint(queues, "queues"), func(t *testing.T) {
			makeDisk(t, path)
			t.Setenv("UBLK_TEST_QUEUES", fmt.Sprint(queues))
			s := startServer(t, -1, path, ublk.ModeCopy)
			f := openDisk(t, fmt.Sprintf("/dev/ublkb%d", s.id), 0)
			defer f.Close()
			s.kill()
			buf, back := direct.Pages(t, 4096), direct.Pages(t, 4096)
			for mask := -1; mask < 1<<queues; mask++ {
				// Each round a request waits.
				written := make(chan error, 1)
				for i := range buf {
					buf[i] = byte(mask + 2)
				}
				go func() {
					_, err := f.WriteAt(buf, int64(mask+1)*4096)
					written <- err
				}()
				for range 2 { // and it may happen again
					half, _ := guest.StartChild(t, "TestUblkHalfServer", fmt.Sprintf("UBLK_TEST_HALF=%d %d %d", s.id, queues, mask), "half serving")
					half.Process.Kill()
					half.Wait()
				}
				s = startServer(t, s.id, path, ublk.ModeCopy)
				if err := guest.Await(t, "a write that waited", written); err != nil {
					t.Fatalf("fetched %b: %v", mask, err)
				}
				if _, err := f.ReadAt(back, int64(mask+1)*4096); err != nil || !bytes.Equal(back, buf) {
					t.Fatalf("fetched %b: read back %v, %v", mask, back[:8], err)
				}
				s.kill()
			}
			deleteLeft(t, ctl, s.id)
		})
	}
}

// TestUblkHalfServer is a server for the test above. It takes a device over as far as to fetch
// the queues whose bits are set. It does nothing unless that test starts it.
func TestUblkHalfServer(t *testing.T) {
	var id, queues, mask int
	if _, err := fmt.Sscan(os.Getenv("UBLK_TEST_HALF"), &id, &queues, &mask); err != nil {
		return
	}
	ctx := guest.Context(t)
	if _, err := ublk.Claim(ctx, openControl(t), id); err != nil {
		t.Fatal(err)
	}
	if mask < 0 {
		halfServes()
		return
	}
	path := fmt.Sprintf("/dev/ublkc%d", id)
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The driver keeps in mind whose memory this is.
	if _, err := unix.Mmap(fd, uapi.UBLKSRV_CMD_BUF_OFFSET, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		t.Fatal(err)
	}
	const depth = 32 // as fileConfig has it
	payload := direct.Pages(t, 128<<10)
	for q := range queues {
		if mask>>q&1 == 0 {
			continue
		}
		ring, err := blockdev.NewRingQueue(blockdev.RingConfig{
			Name: "half", Depth: 1, Commands: depth, Files: []*blockdev.OSFile{blockdev.NewOSFile(fd, path)},
			OnCommand: func(tag uint32, res int32) { t.Errorf("queue %d, tag %d: %d", q, tag, res) },
		})
		if err != nil {
			t.Fatal(err)
		}
		ring.Post(&blockdev.Task{Run: func() {
			for tag := range uint32(depth) {
				sqe := ring.Command(tag)
				sqe.PrepCommand(0, uapi.UBLK_U_IO_FETCH_REQ)
				sqe.SetFixedFile()
				cmd := (*uapi.UblksrvIOCmd)(unsafe.Pointer(sqe.Cmd()))
				cmd.QID, cmd.Tag = uint16(q), uint16(tag)
				cmd.Addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(payload))))
			}
		}})
		for range 2 { // by the second answer the kernel has them
			if err := ring.Answers(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if t.Failed() {
		return
	}
	halfServes()
}

func halfServes() {
	fmt.Print("\nhalf serving\n")
	time.Sleep(time.Hour)
}
