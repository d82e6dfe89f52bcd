// Package snapshots puts the engine's snapshot on this machine. It gives that
// snapshot its memory and its storage, freezes filesystems for it, and lets the
// daemon wait for it.
//
//	daemon ──> Snapshot ── tasks to the control queue ──> snapimage.Snapshot
//	              ├ state:    a directory of mapped files on a tmpfs
//	              ├ storage:  files and block devices, claimed
//	              └ take:     freeze ──> the cut, within a limit ──> thaw
//
// # Concurrency
//
// The engine's snapshot belongs to the thread of the control queue. So every
// method of [Snapshot] that needs it posts a task there, and waits until the task
// has called back. A Snapshot has one owner, who calls one method at a time. Only
// the methods that look, and Break, may be called on any thread.
//
// Storage may hang for as long as a disk or a file server does not answer. So it
// is opened and given back on goroutines of their own. A caller that appends
// storage waits no longer than [Config].StorageTimeout. A filesystem that freezes
// too late is thawed at once. If a filesystem does not thaw in time, nobody waits
// for it any longer, and it thaws when its disk answers.
//
// # Storage
//
// A storage holds data of the original disks, which nobody else may read. So the
// data goes to a file that was made for it, or to a block device that nobody else
// holds, and the storage is emptied before it is given back. See storage.
//
// # What outlives the daemon
//
//	StateDir/UUID/record.json  what the snapshot is: devices, storage, images
//	StateDir/UUID/log          the log's state     diffarea
//	StateDir/UUID/pool         its pool            diffarea
//	StateDir/UUID/words-N      words of device N   diffarea
//	StateDir/UUID/key          the key of what is stored, if that is encrypted
//	StateDir/UUID/take         the take, whose one store says that it was made
//	StateDir/UUID/storage-N    where storage N is mounted, which keeps it
//
// StateDir is on a tmpfs: all of this outlives the process, and a power failure
// loses it. The daemon may be killed at any instruction. The next one finds the
// snapshots with [LeftBehind], and [Left] says what can be done with each. Storage
// itself has no format: without the state nobody can tell what it holds.
//
// # What outlives a loss of power
//
// A note of each snapshot that has storage, which Config.Keep puts on stable storage. By
// it what was stored is found and cleared in another boot: see [Lost].
package snapshots
