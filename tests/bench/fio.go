package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// job is one run of fio.
type job struct {
	rw    string // fio's: read, randwrite, …
	block int    // bytes
	depth int
	from  int64 // bytes: the part of the disk
	size  int64
	// Either so many bytes, no block twice, or for so long, after as long again
	// divided by rampPart that does not count.
	bytes    int64
	duration time.Duration
}

const rampPart = 4

// figures are what one run yields.
type figures struct {
	IOPS, MBps          float64
	LatMeanUS, LatP99US float64
	CPUUSPerIO          float64
	ios                 int64
}

func (j job) args(path string) []string {
	args := []string{
		"--output-format=json", "--ioengine=io_uring", "--direct=1", "--thread", "--name=bench",
		"--filename=" + path, "--rw=" + j.rw, "--bs=" + strconv.Itoa(j.block), "--iodepth=" + strconv.Itoa(j.depth),
		"--offset=" + strconv.FormatInt(j.from, 10), "--size=" + strconv.FormatInt(j.size, 10),
	}
	if j.bytes > 0 {
		return append(args, "--io_size="+strconv.FormatInt(j.bytes, 10))
	}
	ms := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) + "ms" }
	return append(args, "--time_based", "--norandommap", "--runtime="+ms(j.duration), "--ramp_time="+ms(j.duration/rampPart))
}

// run runs the job on the disk at path. overhead is processor time that is
// fio's own and not to be counted.
func (j job) run(ctx context.Context, path string, overhead time.Duration) (figures, error) {
	cmd := exec.CommandContext(ctx, "fio", j.args(path)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	before, err := busy()
	if err != nil {
		return figures{}, err
	}
	if err := cmd.Run(); err != nil {
		return figures{}, fmt.Errorf("%s: %w: %s%s", cmd, err, said.Bytes(), out.Bytes())
	}
	after, err := busy()
	if err != nil {
		return figures{}, err
	}
	f, err := parseFio(out.Bytes())
	if err != nil {
		return figures{}, fmt.Errorf("%s: %w", cmd, err)
	}
	ios := f.ios
	if j.bytes == 0 {
		ios += ios / rampPart
	}
	f.CPUUSPerIO = max(0, float64((after-before-overhead).Microseconds())/float64(ios))
	return f, nil
}

// parseFio reads the report of a run with one job, which reads or writes.
func parseFio(b []byte) (figures, error) {
	type direction struct {
		IOPS  float64 `json:"iops"`
		Bytes float64 `json:"bw_bytes"`
		IOs   int64   `json:"total_ios"`
		Lat   struct {
			Mean float64 `json:"mean"`
		} `json:"lat_ns"`
		Clat struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write direction
		} `json:"jobs"`
	}
	// Notes of fio's may come before the report.
	if i := bytes.IndexByte(b, '{'); i > 0 {
		b = b[i:]
	}
	if err := json.Unmarshal(b, &report); err != nil {
		return figures{}, fmt.Errorf("read fio's report: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return figures{}, errors.New("read fio's report: the job failed")
	}
	d := report.Jobs[0].Read
	if d.IOs == 0 {
		d = report.Jobs[0].Write
	}
	if d.IOs == 0 || d.IOPS == 0 {
		return figures{}, errors.New("read fio's report: no I/O was done")
	}
	return figures{
		IOPS: d.IOPS, MBps: d.Bytes / 1e6, ios: d.IOs,
		LatMeanUS: d.Lat.Mean / 1e3, LatP99US: d.Clat.Percentile["99.000000"] / 1e3,
	}, nil
}
