// Package deathpoint lets a test kill the daemon at any step after which a death
// must be harmless: between two steps of a record, or between a command to the
// driver and the note of it.
//
// A build with the tag deathpoints counts the calls of [Point]. At the call whose
// number is in the environment variable [DieAt], from 1, the process kills itself
// with SIGKILL. If [DieFile] names a file, calls count only while that file is
// there, so that a test can begin to count when the daemon is where it wants it.
// A test repeats an operation for the numbers 1, 2, 3 and so on, until the process
// lives through it.
//
// In every other build Point is empty.
package deathpoint

// The environment variables.
const (
	DieAt   = "UBLK_BLKSNAP_DIE_AT"
	DieFile = "UBLK_BLKSNAP_DIE_FILE"
)
