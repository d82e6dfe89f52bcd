package blockdev

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/internal/uring"
)

// BenchmarkRing is Submit to Done of 4 KiB random reads, each submitted from
// inside the Done before it. A file in the page cache never blocks, that is
// the cost of the queue alone (where the file system can tell: a tmpfs cannot,
// and its reads take the detour over a kernel worker). What the raw wait is
// worth shows on a device that does block: BLOCKDEV_BENCH_DISK names one.
func BenchmarkRing(b *testing.B) {
	type target struct {
		name string
		file *OSFile
	}
	cached := diskFile(b, b.TempDir(), 0, 0)
	if _, err := unix.Pwrite(cached.Fd(), make([]byte, 16<<20), 0); err != nil {
		b.Fatal(err)
	}
	targets := []target{{"cached", cached}}
	if f := shmFile(b, 16<<20); f != nil {
		targets = append(targets, target{"tmpfs", f})
	}
	if path := os.Getenv("BLOCKDEV_BENCH_DISK"); path != "" {
		f, err := openFile(path, unix.O_RDONLY|unix.O_DIRECT)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		targets = append(targets, target{"disk", f})
	}
	for _, tg := range targets {
		size, err := tg.file.Size()
		if err != nil {
			b.Fatal(err)
		}
		for _, depth := range []int{1, 32} {
			for _, raw := range []bool{false, true} {
				b.Run(fmt.Sprintf("%s/%s/depth=%d/raw=%v", uring.Build, tg.name, depth, raw), func(b *testing.B) {
					q := startQueue(b, RingConfig{Name: "bench", Depth: depth, Files: []*OSFile{tg.file}})
					mem := mapped(b, depth*4096)
					ops := make([]Op, depth)
					rng := rand.New(rand.NewPCG(1, 1))
					left, flying := b.N, 0
					done := make(chan struct{})
					next := func(op *Op) {
						left--
						flying++
						op.Off = rng.Int64N(size>>12) << 12
						q.Submit(op)
					}
					for i := range ops {
						ops[i] = Op{Kind: Read, File: tg.file, Len: 4096, Buf: MemBuf(mem[i*4096:])}
						ops[i].Done = func(op *Op) {
							if op.Err != 0 {
								panic(op.Err)
							}
							if flying--; left > 0 {
								next(op)
							} else if flying == 0 {
								close(done)
							}
						}
					}
					before := cpuTime(b)
					b.ResetTimer()
					q.Post(&Task{Run: func() {
						if !raw {
							q.maxRaw = 0
						}
						for i := range min(depth, left) {
							next(&ops[i])
						}
					}})
					<-done
					b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
				})
			}
		}
	}
}

// BenchmarkPost is a task from another goroutine and its answer by channel.
func BenchmarkPost(b *testing.B) {
	q := startQueue(b, RingConfig{Name: "bench", Depth: 1})
	ran := make(chan struct{})
	task := &Task{Run: func() { ran <- struct{}{} }}
	for range b.N {
		q.Post(task)
		<-ran
	}
}

// cpuTime is the processor time of the process so far, in nanoseconds.
func cpuTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
