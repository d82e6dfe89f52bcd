package control

import (
	"context"
	"io"
	"time"
)

// API is what the daemon can do. [Client] asks for it over the socket, the daemon
// does it. Every error is an *[Error] that says what was being done to what.
//
// A device is named by the name it was added under, by the path of its original
// disk, or by the path of its filter device; any path of the same block device
// will do. Paths are absolute.
//
// A snapshot is named by its UUID, by a beginning of it that no other one has, by the
// name that it was given, by the path of one of its images, or as [Latest].
type API interface {
	// Info says who the daemon is and what it is doing.
	Info(ctx context.Context) (Info, error)
	// Stop removes every device and ends the daemon; or, if one is in use or its
	// disk does not answer, does neither: [Busy], [Timeout]. A device that comes into
	// use while others are being removed stays, and so does the daemon; those removed
	// until then were idle, and are gone.
	Stop(ctx context.Context) error

	// Reload has a program, the same one or a newer, take over all devices and
	// snapshots in the daemon's process. Users of the devices notice a pause. An error
	// of the check that comes first changes nothing. The daemon answers before the
	// program begins; a Client waits until it serves.
	Reload(ctx context.Context, r ReloadRequest) (Reloaded, error)

	// AddDevice puts a filter over a disk. [Exists] if there is one.
	AddDevice(ctx context.Context, r AddRequest) (Device, error)
	// RemoveDevice syncs and removes a filter. [Busy] if it is mounted, open or
	// held by a snapshot, unless forced: then the answer is what that broke.
	RemoveDevice(ctx context.Context, r RemoveRequest) (CutOff, error)
	Devices(ctx context.Context) ([]Device, error)
	DeviceStatus(ctx context.Context, device string) (DeviceStatus, error)

	CBTInfo(ctx context.Context, device string) (CBTInfo, error)
	// CBTMap writes one byte per block: the number of the take since which it
	// changed. The map is at least as new as the returned info. After an error what
	// was written is not whole.
	CBTMap(ctx context.Context, device string, w io.Writer) (CBTInfo, error)
	// CBTChanges calls each for the ranges that changed since a take, merged and in
	// order, up to the take of the returned info at least. It ends with each's error
	// if that fails. [GenerationEnded] if only a full copy helps, [NotFound] if there
	// was no such take.
	CBTChanges(ctx context.Context, r ChangesRequest, each func(Range) error) (CBTInfo, error)
	// MarkDirty counts ranges as changed: all of them or none.
	MarkDirty(ctx context.Context, r MarkRequest) error

	// CreateSnapshot makes a snapshot, taken only if asked for.
	CreateSnapshot(ctx context.Context, r CreateRequest) (Snapshot, error)
	// AddToSnapshot adds a device to a snapshot not yet taken. [Exists] if it is
	// in it.
	AddToSnapshot(ctx context.Context, r SnapshotDeviceRequest) (Snapshot, error)
	// AppendStorage gives a snapshot more difference storage, taken or not.
	AppendStorage(ctx context.Context, r StorageRequest) (Snapshot, error)
	// TakeSnapshot cuts all devices of the snapshot at one instant and makes
	// their images: all or nothing.
	TakeSnapshot(ctx context.Context, r TakeRequest) (Snapshot, error)
	// DestroySnapshot removes images and differences. [Busy] if an image is mounted or
	// open, unless forced: then the answer is who was cut off. With [Timeout] because
	// the storage does not answer, the rest goes by itself when it does.
	DestroySnapshot(ctx context.Context, r DestroyRequest) (CutOff, error)
	// SetSnapshot changes when a snapshot ends.
	SetSnapshot(ctx context.Context, r SetRequest) (Snapshot, error)
	Snapshots(ctx context.Context) ([]Snapshot, error)
	Snapshot(ctx context.Context, id string) (Snapshot, error)
	// WaitEvent takes the snapshot's next event that no WaitEvent has had,
	// waiting for it if need be. [Timeout], or [NotFound] once the snapshot is
	// gone and its events were had, as far as they are kept.
	WaitEvent(ctx context.Context, r WaitRequest) (Event, error)
	// Watch calls each for every event of a snapshot, from its first on, or for the
	// events of everything, if no snapshot is named: first for those that the daemon
	// told while it started, when nobody could watch it, and then for those from now
	// on. With Since it is those after that number. Watching a snapshot ends without
	// an error when the snapshot is gone and all its events were seen. Of a snapshot
	// that is gone already they are the ones that are kept: the latest 1024 of
	// everything are, until the machine is restarted; [NotFound] without any. It ends
	// with each's error if that fails. A [Client] goes on with the next daemon.
	Watch(ctx context.Context, r WatchRequest, each func(Event) error) error
}

// Info says who a daemon is.
type Info struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	RunDir  string    `json:"run_dir"`
	Config  string    `json:"config"` // the file it was configured from; empty: defaults
	// Activity is what is going on at this moment, empty when nothing is.
	Activity string `json:"doing,omitempty"`
	// LogLinesLost are the lines of the log that were dropped, as nobody took them.
	LogLinesLost uint64 `json:"log_lines_lost,omitempty"`
	// LastEvent is the number of the latest event.
	LastEvent uint64 `json:"last_event,omitempty"`
	// Reloaded is the last reload in the life of the process.
	Reloaded *Reloaded `json:"reloaded,omitempty"`
	// Recovered is set if this daemon has taken over from one that died.
	Recovered *Recovered `json:"recovered,omitempty"`
	// Lost is what this daemon could not take over, or not yet.
	Lost *Lost `json:"lost,omitempty"`
	// Unfiltered are the disks that the configuration names and that have no filter
	// yet. Each gets it as soon as it can be had.
	Unfiltered []Unfiltered `json:"unfiltered,omitempty"`
}

// Unfiltered is a disk that shall have a filter, and has none.
type Unfiltered struct {
	Name   string `json:"name"` // of the filter
	Path   string `json:"path"` // of the disk
	Reason string `json:"reason"`
}

// Recovered is how a daemon took over from one that died. I/O waited for as long as Pause
// says, and before that from the death to the start of the process, of which nobody knows
// when it was. A daemon that systemd or a guard starts begins within about 100 ms.
type Recovered struct {
	At      time.Time     `json:"at"`
	Count   int           `json:"count"`           // how often that has happened since the devices were first added
	Pause   time.Duration `json:"pause_ns"`        // from the start of its process to the last filter that was served again
	Images  time.Duration `json:"images_pause_ns"` // the same, to the last image
	Devices int           `json:"devices"`         // filters and images
}

// ReloadRequest asks for another program, or the same once more.
type ReloadRequest struct {
	Program string `json:"program,omitempty"` // absolute path; default: the one that the daemon was started from
}

// Reloaded is a reload.
type Reloaded struct {
	At      time.Time `json:"at"`      // when it was asked for
	Program string    `json:"program"` // its path
	From    string    `json:"from"`    // version
	To      string    `json:"to"`      // version; empty: not done yet
	// Pause and Images are how long I/O of filters and of images waited at most: from
	// when the devices were given up until all were served again.
	Pause  time.Duration `json:"pause_ns"`
	Images time.Duration `json:"images_ns"`
	Began  time.Time     `json:"began"` // of the pause
	// Quiesced is how many filters and images the driver has had wait by its own command,
	// which Linux 6.16 has. The end of the program has the others wait.
	Quiesced int `json:"quiesced"`
	// Error says why the program could not take over after all: the old one did.
	Error string `json:"error,omitempty"`
}

// AddRequest asks for a filter. Zero values mean the configured ones.
type AddRequest struct {
	Path   string `json:"path"`           // of the original disk
	Name   string `json:"name,omitempty"` // default: the disk's own
	Queues int    `json:"queues,omitempty"`
	Depth  int    `json:"depth,omitempty"` // requests in flight per queue
	Mode   Mode   `json:"mode,omitempty"`
	// IntentLog is whether the change map shall go on after a power failure; nil: as
	// configured. IntentLogZone is the size of a zone of the log, in bytes, a power
	// of two.
	IntentLog     *bool `json:"intent_log,omitempty"`
	IntentLogZone int64 `json:"intent_log_zone,omitempty"`
	// Attach is whether the filter comes under a device of device-mapper, whose users
	// notice nothing and whose path stays as it is, or in its place.
	Attach AttachMode `json:"attach,omitempty"`
	// DryRun: everything is checked and nothing done. The answer is the device as it would
	// be, with a Plan, and without what only the kernel decides.
	DryRun bool `json:"dry_run,omitempty"`
}

// AttachMode says when a filter comes under a device of device-mapper.
type AttachMode string

// The modes.
const (
	AttachInUse    AttachMode = ""         // if the device is in use
	AttachAlways   AttachMode = "always"   // or fail
	AttachPossible AttachMode = "possible" // if it can, in use or not
	AttachNever    AttachMode = "never"
)

// RemoveRequest asks to remove a filter.
type RemoveRequest struct {
	Device string `json:"device"`
	// Force removes it under its users, whose I/O fails; what was not yet
	// written is lost.
	Force bool `json:"force,omitempty"`
}

// Device is a filter over a disk.
type Device struct {
	Name              string    `json:"name"`
	Original          string    `json:"original"`
	OriginalNumber    string    `json:"original_number"` // major:minor
	Path              string    `json:"path"`            // /dev/ublkbN
	Link              string    `json:"link"`            // /dev/ublk-blksnap/NAME
	Number            string    `json:"number"`
	ID                uint32    `json:"id"`   // of the ublk device
	Size              int64     `json:"size"` // bytes
	LogicalBlockSize  int       `json:"logical_block_size"`
	PhysicalBlockSize int       `json:"physical_block_size"`
	Queues            int       `json:"queues"`
	Depth             int       `json:"depth"`
	Mode              Mode      `json:"mode"`
	Added             time.Time `json:"added"`
	Snapshots         []string  `json:"snapshots"` // that hold it
	// Attached: it lies under the original's own path. Link is that path then.
	Attached bool `json:"attached,omitempty"`
	// History is whether its change map goes on where the last one ended, as in [CBTInfo].
	History History `json:"history"`
	// OriginalSize is the size of the original in bytes, if that is another one than Size by
	// now. 0: it is not.
	OriginalSize int64 `json:"original_size,omitempty"`
	// Attention is what somebody should know or do about it, for people; mostly empty.
	Attention string `json:"attention,omitempty"`
	// Plan is there with DryRun only.
	Plan *AddPlan `json:"plan,omitempty"`
}

// The kinds of requests, as keys of [DeviceStatus].Operations.
const (
	OpRead        = "read"
	OpWrite       = "write"
	OpFlush       = "flush"
	OpDiscard     = "discard"
	OpWriteZeroes = "write-zeroes"
)

// DeviceStatus is a device and what it has done since it was added.
type DeviceStatus struct {
	Device
	State      string               `json:"state"`      // of the ublk device: live, quiesced, dead
	Operations map[string]Operation `json:"operations"` // by kind
	Errors     uint64               `json:"errors"`
	InFlight   int64                `json:"in_flight"`
	// Unregistered counts the requests that failed because the kernel did not
	// register their payload, however often it was asked.
	Unregistered uint64 `json:"unregistered"`
	// DiscardsSkipped counts the bytes of discards that were not passed on
	// because a snapshot needs them.
	DiscardsSkipped uint64   `json:"discards_skipped"`
	CBT             *CBTInfo `json:"cbt,omitempty"`
}

// Operation counts the requests of one kind.
type Operation struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
}

// CBTInfo describes the readable change map of a device.
type CBTInfo struct {
	DeviceCapacity int64  `json:"device_capacity"` // bytes
	BlockSize      int64  `json:"block_size"`      // bytes
	BlockCount     int64  `json:"block_count"`
	GenerationID   string `json:"generation_id"`
	ChangesNumber  uint8  `json:"changes_number"` // of the last take
	Take           Take   `json:"take"`           // the last take: both of the above
	// History is what became of what was known before the filter was added, or before
	// the last take that had to begin a new generation. In the answer to a question about
	// a map or about changes it is empty.
	History History `json:"history"`
	// PowerFailure is whether the map would go on after one at this moment; empty as
	// History is.
	PowerFailure PowerFailure `json:"power_failure"`
}

// PowerFailure says whether a change map goes on after a power failure: as it was, but for
// the zones of the disk that the log has, all of which count as changed.
type PowerFailure struct {
	Covered bool `json:"covered"`
	// Reason is why it is not, for people.
	Reason    string `json:"reason,omitempty"`
	ZoneSize  int64  `json:"zone_size,omitempty"` // bytes
	ZoneCount int64  `json:"zone_count,omitempty"`
	// Logged are the zones that the log has now.
	Logged int64 `json:"logged_zones,omitempty"`
}

// History says whether a change map goes on where the filter before it ended, or if not, why
// it has begun a new generation.
type History struct {
	Continued bool `json:"continued"`
	// Reason is why it does not: one of the constants.
	Reason string `json:"reason,omitempty"`
	Text   string `json:"text,omitempty"` // the same for people
	// AfterPowerFailure: what was kept of the disk is of a filter that had no clean end,
	// whether it goes on or not.
	AfterPowerFailure bool `json:"after_power_failure,omitempty"`
}

// The reasons of a History that is not continued.
const (
	HistoryNone        = "no-state"      // nothing was kept of this disk
	HistoryUnclean     = "unclean"       // the last filter had no clean end
	HistoryUsed        = "used"          // what was kept was used before
	HistoryOtherDisk   = "other-disk"    // what was kept under the name is of another disk
	HistoryOtherHost   = "other-machine" // what was kept is of another machine, of which this one may be a copy
	HistoryOtherSize   = "size"          // the disk has another size, or has grown
	HistoryOtherBlock  = "block-size"    // change tracking has another block size
	HistoryWritten     = "written"       // the disk was written to while it had no filter
	HistoryDamaged     = "damaged"       // what was kept, or the map itself, is not whole
	HistoryVersion     = "version"       // another version of the program kept it
	HistoryUntrusted   = "untrusted"     // somebody else can write to where it was kept
	HistoryUnavailable = "unavailable"   // the state directory cannot be used now
	HistoryUnknown     = "unknown"       // the disk cannot be known again, or not be looked at
	HistoryNumbers     = "numbers"       // the numbers of takes have run out
	HistoryAttached    = "attached"      // the filter came under a volume that was in use
)

// ChangesRequest asks what changed between a take and the last one.
type ChangesRequest struct {
	Device string `json:"device"`
	Since  Take   `json:"since"`
}

// MarkRequest asks to count ranges as changed.
type MarkRequest struct {
	Device string  `json:"device"`
	Ranges []Range `json:"ranges"`
}

// CreateRequest asks for a snapshot.
type CreateRequest struct {
	Devices []string  `json:"devices,omitempty"`
	Storage []Storage `json:"storage,omitempty"`
	// ChunkSize in bytes, a power of two; 0: chosen from the devices' sizes.
	ChunkSize int64 `json:"chunk_size,omitempty"`
	// Attach adds a filter over a device that has none.
	Attach bool `json:"attach,omitempty"`
	// Take takes it at once, with NoFreeze as in TakeRequest. If that fails, or
	// the caller is gone, no snapshot is left.
	Take     bool `json:"take,omitempty"`
	NoFreeze bool `json:"no_freeze,omitempty"`
	NoHooks  bool `json:"no_hooks,omitempty"`
	// Encrypt says whether what is stored is encrypted, with a key that is in memory
	// only, and gone with the snapshot; nil: as configured.
	Encrypt *bool `json:"encrypt,omitempty"`
	// AutoAppend says where the snapshot gets more storage when it runs low; nil: as
	// configured.
	AutoAppend *AutoAppend `json:"auto_append,omitempty"`
	// Name, if any, is one that no other snapshot has: [Exists]. It may not look like a
	// UUID or the beginning of one, nor be [Latest].
	Name string `json:"name,omitempty"`
	// Labels are kept with the snapshot, for whoever made it.
	Labels map[string]string `json:"labels,omitempty"`
	// TTL is how long the snapshot lives from now on, 0: until it is destroyed. Then the
	// daemon destroys it as soon as nobody uses its images.
	TTL time.Duration `json:"ttl_ns,omitempty"`
}

// SnapshotDeviceRequest names a snapshot and a device.
type SnapshotDeviceRequest struct {
	ID     string `json:"id"`
	Device string `json:"device"`
	Attach bool   `json:"attach,omitempty"` // as in CreateRequest
}

// TakeRequest asks to take a snapshot.
type TakeRequest struct {
	ID string `json:"id"`
	// NoFreeze leaves mounted filesystems unfrozen: the image is as after a
	// power failure.
	NoFreeze bool `json:"no_freeze,omitempty"`
	// NoHooks runs no programs around it.
	NoHooks bool `json:"no_hooks,omitempty"`
}

// Snapshot is a snapshot of one or more devices.
type Snapshot struct {
	ID        string     `json:"id"`
	Name      string     `json:"name,omitempty"`
	State     string     `json:"state"` // created, taken, corrupted, destroying
	Created   time.Time  `json:"created"`
	Taken     *time.Time `json:"taken,omitempty"`
	ChunkSize int64      `json:"chunk_size"`
	Encrypted bool       `json:"encrypted"` // what is stored
	// Frozen is how long filesystems stood still for the take, in nanoseconds.
	Frozen time.Duration   `json:"frozen_ns"`
	Errno  int             `json:"error_code"` // negative; 0 while it is whole
	Images []SnapshotImage `json:"images"`
	// Storage as given, in the order of giving.
	Storage    []Storage         `json:"storage"`
	AutoAppend *AutoAppend       `json:"auto_append,omitempty"`
	Usage      SnapshotUsage     `json:"usage"`
	Labels     map[string]string `json:"labels,omitempty"`
	// Expires is when its time is over, by the clock as it is set now; nil: never.
	Expires *time.Time `json:"expires,omitempty"`
	// Warnings are hooks that have failed around the take and did not keep it, as long as the
	// daemon lives.
	Warnings []string `json:"warnings,omitempty"`
	// Overdue says who uses the snapshot although its time is over: it is destroyed when
	// nobody does.
	Overdue string `json:"overdue,omitempty"`
}

// SnapshotImage is one device of a snapshot and its image.
type SnapshotImage struct {
	Device   string `json:"device"`         // the filter's name
	Original string `json:"original"`       // path of the original disk
	Path     string `json:"path,omitempty"` // /dev/ublkbM, once taken
	Link     string `json:"link,omitempty"` // /dev/ublk-blksnap/images/…
	Errno    int    `json:"error_code"`     // negative
	// Take names this take in the device's change map.
	Take *Take `json:"take,omitempty"`
}

// The states of a snapshot.
const (
	SnapshotCreated   = "created"
	SnapshotTaken     = "taken"
	SnapshotCorrupted = "corrupted"
	// SnapshotDestroying: its images are gone or about to go, and its storage is
	// on its way back, if that answers.
	SnapshotDestroying = "destroying"
)

// WaitRequest asks for a snapshot's next event.
type WaitRequest struct {
	ID      string        `json:"id"`
	Timeout time.Duration `json:"timeout_ns"` // 0: do not wait
}

// WatchRequest asks for events.
type WatchRequest struct {
	ID string `json:"id,omitempty"` // of a snapshot; empty: everything
	// Since is the number of an event: those after it are asked for. 0: none.
	Since uint64 `json:"since,omitempty"`
}

// Event is something that happened to a snapshot, or to a device.
type Event struct {
	// Seq is above those of all events before, also over the daemon's death and a
	// restart of the machine.
	Seq      uint64    `json:"seq"`
	Time     time.Time `json:"time"`
	Snapshot string    `json:"snapshot"`
	Name     string    `json:"name,omitempty"` // of the snapshot, if it has one
	Kind     string    `json:"event"`
	// Sectors asked for, with low_free_space: it comes when four fifths are used
	// of all the storage that the snapshot will have, and it could need more.
	Sectors int64 `json:"requested_sectors,omitempty"`
	// Percent of the storage is used then. Rate and Left are as in [SnapshotUsage].
	Percent int           `json:"percent,omitempty"`
	Rate    int64         `json:"bytes_per_second,omitempty"`
	Left    time.Duration `json:"time_left_ns,omitempty"`
	// Device (major:minor of the original) and Errno (negative) with corrupted.
	Device string `json:"device,omitempty"`
	Errno  int    `json:"error_code,omitempty"`
	// Text says why, with new_generation, uncovered, grown, shrunk, gone and removed, and with corrupted if the snapshot
	// could not be taken over from a daemon that died; and more, with lost.
	Text string `json:"text,omitempty"`
}

// The kinds of events.
const (
	// EventNewGeneration belongs to a device and no snapshot: the history of its changes
	// ends, because what was kept is not believed, or for another reason of a [History].
	EventNewGeneration = "new_generation"
	// EventUncovered and EventCovered belong to a device too: from now on a power
	// failure costs the history of its changes, as the text says, or does not any more.
	EventUncovered = "uncovered"
	EventCovered   = "covered"
	// EventGrown and EventShrunk belong to a device: its original has another size. The text
	// says whether the filter has followed.
	EventGrown  = "grown"
	EventShrunk = "shrunk"
	// EventGone belongs to a device: its original is gone. EventRemoved too: its filter was
	// removed, because of that, and by nobody.
	EventGone    = "gone"
	EventRemoved = "removed"
	// EventLost: the snapshot was lost in a restart of the machine or a loss of power;
	// Text names its devices. When what it stored is cleared, EventDestroyed follows.
	EventLost    = "lost"
	EventCreated = "created"
	EventTaken   = "taken"
	// EventHookFailed: a hook has failed and did not keep the take; Text says which and why.
	EventHookFailed = "hook_failed"
	// EventExpired: the snapshot's time is over. EventDestroyed follows, at once or, if Text
	// says who uses an image, when nobody does.
	EventExpired      = "expired"
	EventDestroyed    = "destroyed"
	EventLowFreeSpace = "low_free_space"
	// EventAppended: the snapshot ran low and got more storage by itself, see AutoAppend;
	// EventNotAppended: it did not, and Text says why. It is tried again.
	EventAppended    = "appended"
	EventNotAppended = "not_appended"
	EventNoSpace     = "no_space"
	EventCorrupted   = "corrupted"
)
