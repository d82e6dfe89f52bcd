package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// print writes the rows, and how they stand to each other and to the targets.
func (rs results) print(w io.Writer, kernel string, zeroCopy bool, chunks []int64) {
	fmt.Fprintf(w, "\nkernel %s; figures are medians, ratios those of neighbouring turns\n", kernel)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	workload := ""
	for _, r := range rs {
		if r.Workload != workload {
			workload = r.Workload
			fmt.Fprintf(t, "\n%s\tchunk KiB\tIOPS\tMB/s\tmean µs\tp99 µs\tCPU µs/IO\tspread\t/ raw\t/ loop\t/ filter\t/ dm\t/ snapshot\t\n", workload)
		}
		chunk := ""
		if r.ChunkKiB != 0 {
			chunk = fmt.Sprint(r.ChunkKiB)
		}
		fmt.Fprintf(t, "%s\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.1f\t%.0f%%\t", r.System, chunk, r.IOPS, r.MBps, r.LatMeanUS, r.LatP99US, r.CPUUSPerIO, 100*r.Spread)
		for _, base := range []*row{
			rs.find("raw", workload, 0), rs.find("loop", workload, 0), rs.find("filter", workload, 0),
			rs.find("dm-snapshot", workload, r.ChunkKiB), rs.find("snapshot", workload, r.ChunkKiB),
		} {
			cell := ""
			if base != nil && base != r {
				cell = fmt.Sprintf("%.2f", ratio(r, base))
			}
			fmt.Fprintf(t, "%s\t", cell)
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush()

	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t)
	for _, g := range targets(zeroCopy, chunks) {
		a, b := rs.find(g.system, g.workload, g.chunk), rs.find(g.base, g.workload, g.baseChunk)
		if a == nil || b == nil {
			continue
		}
		verdict := "ok"
		is := ratio(a, b)
		if is < g.want {
			verdict = "MISSED"
		}
		fmt.Fprintf(t, "%s\t%s / %s\t%.2f\twant %.2f\t%s\n", g.workload, named(g.system, g.chunk), named(g.base, g.baseChunk), is, g.want, verdict)
	}
	_ = t.Flush()
}

func named(system string, chunk int64) string {
	if chunk == 0 {
		return system
	}
	return fmt.Sprintf("%s %d KiB", system, chunk)
}
