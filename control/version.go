package control

import "runtime/debug"

// Version is the program's version, of three numbers. That of a package may be another: the linker sets it (make deb).
var Version = "0.1.0"

// commit is set by the linker where the program is built apart from its repository.
var commit string

// Commit is the commit that the program was built from, with a + if there were changes to it. It is empty if nobody
// knows.
func Commit() string {
	if commit != "" {
		return commit
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var revision, changed string
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(len(s.Value), commitLength)]
		case s.Key == "vcs.modified" && s.Value == "true":
			changed = "+"
		}
	}
	if revision == "" {
		return ""
	}
	return revision + changed
}

// commitLength is how much of a commit's name is shown.
const commitLength = 12
