package main

import (
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseFio(t *testing.T) {
	const report = `note: something
{"jobs": [{"error": 0,
 "read": {"total_ios": 0, "iops": 0},
 "write": {"total_ios": 4096, "iops": 2048.5, "bw_bytes": 8390656,
  "lat_ns": {"mean": 15000}, "clat_ns": {"percentile": {"50.000000": 1, "99.000000": 42000}}}}]}`
	f, err := parseFio([]byte(report))
	if err != nil {
		t.Fatal(err)
	}
	want := figures{IOPS: 2048.5, MBps: 8.390656, LatMeanUS: 15, LatP99US: 42, ios: 4096}
	if f != want {
		t.Errorf("got %+v, want %+v", f, want)
	}
	for _, bad := range []string{
		``, `{"jobs": []}`,
		`{"jobs": [{"error": 5, "read": {"total_ios": 1, "iops": 1}}]}`,
		`{"jobs": [{"error": 0, "read": {"total_ios": 0, "iops": 0}}]}`,
	} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("no error for %q", bad)
		}
	}
}

func TestParseStat(t *testing.T) {
	idle, cpus, err := parseStat("cpu  10 20 30 400 50 6 7 8 9 0\ncpu0 1 1 1 200 1 0 0 0 0 0\ncpu1 1 1 1 200 1 0 0 0 0 0\nintr 1\n")
	if err != nil || idle != 4500*time.Millisecond || cpus != 2 {
		t.Errorf("got %v idle on %d processors, error %v", idle, cpus, err)
	}
	if _, _, err := parseStat("intr 1\n"); err == nil {
		t.Error("no error without processors")
	}
}

func TestSummary(t *testing.T) {
	turns := func(iops ...float64) *row {
		r := &row{}
		for _, v := range iops {
			r.turns = append(r.turns, figures{IOPS: v, LatMeanUS: 2 * v})
		}
		r.summarize()
		return r
	}
	a := turns(100, 400, 200)
	if a.IOPS != 200 || a.LatMeanUS != 400 || a.Runs != 3 || a.Spread != 1.5 {
		t.Errorf("got %+v", *a)
	}
	// Turn by turn 2, 8 and 1: not the ratio of the medians.
	b := turns(50, 50, 200)
	if got := ratio(a, b); got != 2 {
		t.Errorf("ratio %v, want 2", got)
	}
	if got := median([]float64{1, 4, 2, 3}); got != 2.5 {
		t.Errorf("median %v, want 2.5", got)
	}
}

// TestChoose: the rows that a pattern selects are measured, what they stand on
// is prepared, and nothing else is done.
func TestChoose(t *testing.T) {
	all := plan(time.Second, []int64{4 << 10, 64 << 10})
	describe := func(pattern string) string {
		var out []string
		for _, sc := range choose(all, regexp.MustCompile(pattern)) {
			var systems, steps []string
			for _, s := range sc.systems {
				systems = append(systems, s.key())
			}
			for _, st := range sc.steps {
				steps = append(steps, st.workload)
			}
			out = append(out, strings.Join(systems, " ")+": "+strings.Join(steps, " "))
		}
		return strings.Join(out, "\n")
	}
	for pattern, want := range map[string]string{
		`^(loop|filter)/randread-4k-qd1/`: "loop/0 filter/0: randread-4k-qd1",
		`^snapshot/second-.*/4$`:          "snapshot/4: first-write-128k-qd8 second-randwrite-4k-qd32",
		`^dm-snapshot/image-read.*half`: "dm-snapshot/4 dm-snapshot/64: image-read-128k-qd8-cold image-randread-4k-qd32-cold  " +
			"image-read-128k-qd8-half",
		`nothing`: "",
	} {
		if got := describe(pattern); got != want {
			t.Errorf("%s: got\n%s\nwant\n%s", pattern, got, want)
		}
	}
}

// TestTargets: every target compares rows that are measured.
func TestTargets(t *testing.T) {
	chunks := []int64{4 << 10, 64 << 10, 256 << 10}
	var names []string
	for _, sc := range plan(time.Second, chunks) {
		for _, st := range sc.steps {
			for _, s := range sc.systems {
				names = append(names, rowName(s, st))
			}
		}
	}
	for _, zeroCopy := range []bool{false, true} {
		ts := targets(zeroCopy, chunks)
		if len(ts) != 8+6+3*len(chunks) {
			t.Errorf("%d targets", len(ts))
		}
		for _, g := range ts {
			for _, s := range []system{{name: g.system, chunk: g.chunk << 10}, {name: g.base, chunk: g.baseChunk << 10}} {
				if name := rowName(s, step{workload: g.workload}); !slices.Contains(names, name) {
					t.Errorf("target %+v: nothing measures %s", g, name)
				}
			}
			if g.want < 0.5 || math.IsNaN(g.want) {
				t.Errorf("target %+v: wants nothing", g)
			}
		}
	}
}

func TestParseChunks(t *testing.T) {
	got, err := parseChunks("4,256")
	if err != nil || !slices.Equal(got, []int64{4 << 10, 256 << 10}) {
		t.Errorf("got %v, error %v", got, err)
	}
	for _, bad := range []string{"", "3", "2", "4k", "4,,8"} {
		if _, err := parseChunks(bad); err == nil {
			t.Errorf("no error for %q", bad)
		}
	}
}
