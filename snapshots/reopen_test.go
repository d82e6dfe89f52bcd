package snapshots

import (
	"fmt"
	"os"
	"slices"
	"testing"
)

var lifeKinds = []string{"new", "directory", "lender", "device"}

// TestReopen kills a process after each of its steps, with storage of each kind and
// with all of them. The next one takes over what there is, and is killed too, before
// a third does the rest.
func TestReopen(t *testing.T) {
	for _, kinds := range [][]string{lifeKinds, {"new"}, {"directory"}, {"lender"}, {"device"}, append([]string{"own"}, lifeKinds...)} {
		for until, stage := range map[string]string{
			"new": "created", "add": "created", "append": "created", "take": "taken", "image": "taken", "write": "taken", "written": "taken",
			"abort": "destroying", "destroy": "destroying", "gone": "unknown",
		} {
			t.Run(kinds[0]+" "+until, func(t *testing.T) {
				var l life
				if kinds[0] == "own" {
					l = ownNamespace(newLife(t, kinds[1:]...))
				} else {
					l = newLife(t, kinds...)
				}
				l.Until = until
				if steps, _ := l.live(t, "run"); !slices.Contains(steps, until) {
					t.Fatalf("it came to %v", steps)
				}
				l.Until = "over"
				if steps, _ := l.live(t, "serve"); !slices.Contains(steps, stage) {
					t.Errorf("what is taken over is %v, not %s", steps, stage)
				}
				l.Until = "served"
				l.live(t, "serve")
				l.Until = ""
				steps, _ := l.live(t, "serve")
				if !slices.Contains(steps, "over") {
					t.Errorf("the last came to %v", steps)
				}
				l.checkGone(t)
				b, err := os.ReadFile(l.path("disk"))
				if err != nil {
					t.Fatal(err)
				}
				if (until == "write" || until == "written") && (b[0] != 'A' || b[lifeSize/2] != 'B') {
					t.Errorf("the disk holds %q and %q", b[0], b[lifeSize/2])
				}
			})
		}
	}
}

// ownNamespace has the processes live in mount namespaces of their own. This one
// plays process 1.
func ownNamespace(l life) life {
	l.Root = fmt.Sprintf("/proc/%d/root", os.Getpid())
	return l
}
