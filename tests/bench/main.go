package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ublk-blksnap/ublk-blksnap/ublk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	file := flag.String("json", "", "file for the rows")
	pattern := flag.String("bench", os.Getenv("BENCH"), "rows to measure: a regular expression on SYSTEM/WORKLOAD/CHUNK (BENCH)")
	rounds := flag.Int("rounds", 5, "turns of each system")
	duration := flag.Duration("duration", time.Second, "of each run that has no end of its own")
	binary := flag.String("binary", "bin/ublk-blksnap", "the program to measure")
	chunkList := flag.String("chunks", "4,64,256", "chunk sizes in KiB")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	re, err := regexp.Compile(*pattern)
	if err != nil {
		return err
	}
	chunks, err := parseChunks(*chunkList)
	if err != nil {
		return err
	}
	scenes := choose(plan(*duration, chunks), re)
	if len(scenes) == 0 {
		return fmt.Errorf("no row matches %q", *pattern)
	}
	kernel, err := output(ctx, "uname", "-r")
	if err != nil {
		return err
	}
	zeroCopy, err := hasZeroCopy()
	if err != nil {
		return err
	}

	e := &env{binary: *binary}
	var unload func()
	if e.orig, e.cow, unload, err = ramDisks(ctx); err != nil {
		return err
	}
	defer unload()
	defer func() {
		if e.daemon != nil {
			err = errors.Join(err, e.daemon.stop())
		}
	}()
	// What the systems are made of; a module may also be built in.
	for _, module := range []string{"loop", "dm_snapshot"} {
		if err := command(ctx, "modprobe", module); err != nil {
			return err
		}
	}
	overhead, err := fioOverhead(ctx, e.orig)
	if err != nil {
		return err
	}
	var rs results
	for i, sc := range scenes {
		fmt.Fprintf(os.Stderr, "%s  %d of %d: %s, %d systems × %d\n",
			time.Now().Format(time.TimeOnly), i+1, len(scenes), sc.steps[0].workload, len(sc.systems), *rounds)
		got, err := sc.measure(ctx, e, re, *rounds, overhead)
		if err != nil {
			return err
		}
		rs = append(rs, got...)
	}
	for _, r := range rs {
		r.Kernel = kernel
		r.summarize()
	}
	rs.print(os.Stdout, kernel, zeroCopy, chunks)
	if *file == "" {
		return nil
	}
	b, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*file, append(b, '\n'), 0o644)
}

// measure runs the scene on each of its systems in turn, again and again. Its
// rows are in the order of workloads.
func (sc scene) measure(ctx context.Context, e *env, pattern *regexp.Regexp, rounds int, overhead time.Duration) (results, error) {
	rows := make(results, 0, len(sc.steps)*len(sc.systems))
	place := map[string]*row{}
	for _, st := range sc.steps {
		for _, s := range sc.systems {
			if st.workload != "" && pattern.MatchString(rowName(s, st)) {
				r := &row{System: s.name, Workload: st.workload, ChunkKiB: s.chunk >> 10}
				rows = append(rows, r)
				place[rowName(s, st)] = r
			}
		}
	}
	for range rounds {
		for _, s := range sc.systems {
			if err := sc.turn(ctx, e, s, place, overhead); err != nil {
				return nil, fmt.Errorf("%s: %w", s.key(), err)
			}
		}
	}
	return rows, nil
}

// turn runs the scene once on a fresh instance of s.
func (sc scene) turn(ctx context.Context, e *env, s system, place map[string]*row, overhead time.Duration) (err error) {
	in, err := s.start(ctx, e, s.chunk)
	if err != nil {
		return err
	}
	defer func() {
		// Also after an interrupt: nothing of ours shall stay.
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, in.stop(limited))
	}()
	for _, st := range sc.steps {
		r := place[rowName(s, st)]
		if r == nil && st.workload != "" {
			// Not wanted. What comes later may still need what it writes.
			if st.onImage || st.job.bytes == 0 {
				continue
			}
		}
		path := in.disk
		if st.onImage {
			path = in.image
		}
		f, err := st.job.run(ctx, path, overhead)
		if err != nil {
			return fmt.Errorf("%s: %w", st.workload, err)
		}
		if r != nil {
			r.turns = append(r.turns, f)
		}
	}
	return nil
}

func parseChunks(list string) ([]int64, error) {
	var out []int64
	for _, s := range strings.Split(list, ",") {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 4 || n&(n-1) != 0 {
			return nil, fmt.Errorf("chunk size %q: want a power of two of KiB, 4 or more", s)
		}
		out = append(out, n<<10)
	}
	return out, nil
}

// hasZeroCopy says which targets apply.
func hasZeroCopy() (bool, error) {
	probes, err := ublk.ProbeFeatures()
	if err != nil {
		return false, err
	}
	for _, p := range probes {
		if p.Name == "AUTO_BUF_REG" {
			return p.Answer == ublk.Yes, nil
		}
	}
	return false, errors.New("no probe for AUTO_BUF_REG")
}
