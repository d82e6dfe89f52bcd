package storage

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/blockdev"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/direct"
	"github.com/ublk-blksnap/ublk-blksnap/tests/integration/guest"
)

// A daemon that takes over must know when the last one's I/O is over. These
// tests show what it can go by: a file stays claimed for as long as I/O on it is
// under way, even if its process is dead and gone.

// claimWrites is how many writes of a MiB the child leaves behind.
const claimWrites = 4

// claim opens a device or a file as storage is opened, if nobody has.
func claim(path string) (*blockdev.OSFile, error) {
	if strings.HasPrefix(path, "/dev/") {
		return blockdev.OpenExclusive(path, path, unix.O_RDWR|unix.O_DIRECT)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := blockdev.NewOSFile(fd, path)
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// TestClaimChild claims what it is told to, and writes to it until it is killed.
// It does nothing unless TestClaimOutlivesProcess starts it.
func TestClaimChild(t *testing.T) {
	args := strings.Fields(os.Getenv("CLAIM_TEST_CHILD")) // path, what to fill it with
	if len(args) != 2 {
		return
	}
	file, err := claim(args[0])
	if err != nil {
		t.Fatal(err)
	}
	q, err := blockdev.NewRingQueue(blockdev.RingConfig{Name: "claim", Depth: claimWrites})
	if err != nil {
		t.Fatal(err)
	}
	mem := direct.Pages(t, claimWrites<<20)
	for i := range mem {
		mem[i] = args[1][0]
	}
	q.Post(&blockdev.Task{Run: func() {
		for i := range int64(claimWrites) {
			q.Submit(&blockdev.Op{
				Kind: blockdev.Write, File: file, Off: i << 20, Len: 1 << 20, Buf: blockdev.MemBuf(mem[i<<20 : (i+1)<<20]),
				Done: func(*blockdev.Op) {},
			})
		}
		fmt.Println("\nwriting")
	}})
	time.Sleep(time.Hour)
}

// TestClaimOutlivesProcess kills a process whose writes take two seconds: what
// it had claimed can be claimed again only when they have ended.
func TestClaimOutlivesProcess(t *testing.T) {
	guest.Need(t)
	const size = 64 << 20
	guest.Run(t, "modprobe", "dm-delay")
	for _, kind := range []string{"device", "file"} {
		t.Run(kind, func(t *testing.T) {
			guest.NeedEither(t)
			ram := guest.RAMDisks(t, 1, size)[0]
			plain := fmt.Sprintf("0 %d delay %s 0 0", size>>9, ram)
			path := guest.DMDisk(t, "late", plain)
			if kind == "file" {
				guest.Ext4.Make(t, path)
				path = filepath.Join(guest.Mount(t, path), "file")
				if err := os.WriteFile(path, make([]byte, claimWrites<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				unix.Sync()
			}
			guest.Run(t, "dmsetup", "suspend", "late")
			guest.Run(t, "dmsetup", "load", "late", "--table", fmt.Sprintf("%s %s 0 2000", plain, ram))
			guest.Run(t, "dmsetup", "resume", "late")
			// Below the delay.
			f := direct.MustOpen(t, ram, unix.O_RDONLY)
			defer f.Close()
			written := func(fill byte) (sectors int) {
				buf := direct.Pages(t, 1<<20)
				for off := int64(0); off < size; off += 1 << 20 {
					if err := f.ReadAt(buf, off); err != nil {
						t.Fatal(err)
					}
					sectors += bytes.Count(buf, bytes.Repeat([]byte{fill}, 512))
				}
				return sectors
			}
			for fill := byte('a'); ; fill++ {
				child, _ := guest.StartChild(t, "TestClaimChild", fmt.Sprintf("CLAIM_TEST_CHILD=%s %c", path, fill), "writing")
				time.Sleep(300 * time.Millisecond)
				before := written(fill)
				child.Process.Kill()
				child.Wait()
				refused := 0
				guest.WaitFor(t, "the end of what was under way", func() bool {
					f, err := claim(path)
					if err != nil {
						refused++
						return false
					}
					f.Close()
					return true
				})
				after := written(fill)
				time.Sleep(time.Second)
				later := written(fill) // the filesystem itself may write at any time
				t.Logf("%d sectors written when it was killed, %d when it could be claimed, after %d refusals", before, after, refused)
				if later != after {
					t.Fatal("a write of the dead process came after its claim had ended")
				}
				if before == 0 && after > 0 {
					return
				}
				// It was killed too early or too late to show anything.
				if fill == 'z' {
					t.Fatal("never killed with writes under way")
				}
			}
		})
	}
}
