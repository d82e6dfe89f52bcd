package mutation

import "strconv"

// The bugs, by the part of the engine that has them.
const (
	// Filter.

	// ForwardEarly sends a write to the original before its copies have landed.
	ForwardEarly Bug = iota + 1
	// DropMark does not mark a WRITE_ZEROES in the change map.
	DropMark
	// MarkLate marks a write when it completes instead of before it is sent.
	MarkLate
	// OpenGateEarly does not wait for the writes in flight on the first queue.
	OpenGateEarly
	// LoseHeld forgets the second request held at the gate.
	LoseHeld
	// DiscardAll passes every discard on, needed or not.
	DiscardAll
	// ZeroesUncopied sends WRITE_ZEROES on without copying.
	ZeroesUncopied
	// ProtectFirst protects only the first chunk that a write touches.
	ProtectFirst
	// FailWithCopy fails a write whose copy failed.
	FailWithCopy
	// OneArea protects chunks in the first snapshot's area only.
	OneArea
	// CompleteTwice completes a failed request twice.
	CompleteTwice
	// DropFUA forwards a FUA write without FUA.
	DropFUA
	// FlushNothing acknowledges a FLUSH without doing it.
	FlushNothing
	// InstallLate makes the cut before the areas are there for all queues.
	InstallLate
	// FUAFirstPiece forwards only the first piece of a FUA write with FUA.
	FUAFirstPiece
	// FlushAnyway ignores errors of FLUSH.
	FlushAnyway
	// CopyDiscarded has the chunks of a discard copied as if it were a write.
	CopyDiscarded
	// ForgetOneQueue leaves the areas of a destroyed snapshot on one queue.
	ForgetOneQueue
	// ExpectAreas does not expect the last snapshot to go between two pieces of a request.
	ExpectAreas

	// Difference area.

	// WordBeforeData says IN_MEMORY before the old data is in the slot.
	WordBeforeData
	// StoredBeforeWrite says STORED before the storage has the data.
	StoredBeforeWrite
	// ReuseSlotEarly gives a slot away while it is being stored.
	ReuseSlotEarly
	// ForgetWaiter wakes all but the first of those who wait for a copy.
	ForgetWaiter
	// PassWaiter lets a writer pass that should wait for another's copy.
	PassWaiter
	// LongLastChunk copies a short last chunk as if it were whole.
	LongLastChunk
	// ShortLastChunk copies too little of a short last chunk.
	ShortLastChunk
	// StoreAnyway ignores errors of the storage.
	StoreAnyway
	// CopyAnyway ignores errors of reading the original.
	CopyAnyway
	// FollowWrong takes a small chunk's data from the start of the large one.
	FollowWrong
	// ExtentOff reads the second extent of the storage from the wrong place.
	ExtentOff
	// GrowNever does not let storage grow.
	GrowNever
	// NextUnrecorded does not record the regions handed out.
	NextUnrecorded
	// DeadUnrecorded does not record that the log is broken.
	DeadUnrecorded
	// ForgetAppend never answers an Append that comes to a dead log.
	ForgetAppend
	// ForgetMemory does not store again what the dead process had in memory.
	ForgetMemory
	// LeakRegion hands out every fifth region to nobody.
	LeakRegion
	// BreakUntold breaks a log without an event.
	BreakUntold
	// AbortUnrecorded does not record that the log was given up.
	AbortUnrecorded
	// ExtentEarly counts an extent of the storage before it says where it is.
	ExtentEarly
	// CopyTwice does not look under the lock whether a chunk has been copied.
	CopyTwice
	// StoredLate gives the slots away before the words say STORED.
	StoredLate
	// AwaitLost has a store wait for the copy of a region whose copy is lost.
	AwaitLost
	// CutUnseen stores into a file that was cut off as if it were whole.
	CutUnseen
	// KeepUnreadable does not break a snapshot whose storage cannot be read.
	KeepUnreadable

	// Images and snapshots.

	// SkipRecheck does not look again after an image read.
	SkipRecheck
	// ReadOldPlace looks again, but reads from where the chunk was.
	ReadOldPlace
	// WriteInFlight writes to a chunk of an image while it is being stored.
	WriteInFlight
	// ForgetOld does not read the old data around an image's write.
	ForgetOld
	// MarkNoImage does not mark an image's write.
	MarkNoImage
	// SwitchOneMap switches the change map of the first device only.
	SwitchOneMap
	// AnswerBroken reads images of a broken snapshot all the same.
	AnswerBroken
	// UsedShort forgets the last region when it says how much storage was used.
	UsedShort
	// CloseEarly says that a snapshot is gone while it is still in use.
	CloseEarly
	// ReinstallNot does not protect a snapshot taken over from a dead process.
	ReinstallNot

	// Change map.

	// MarkOneMap marks dirty ranges and image writes in the active map only.
	MarkOneMap
	// VoidNothing does not void a take that did not come to be.
	VoidNothing

	bugs
)

var names = [bugs]string{
	"none", "ForwardEarly", "DropMark", "MarkLate", "OpenGateEarly", "LoseHeld", "DiscardAll", "ZeroesUncopied",
	"ProtectFirst", "FailWithCopy", "OneArea", "CompleteTwice", "DropFUA", "FlushNothing", "InstallLate",
	"FUAFirstPiece", "FlushAnyway", "CopyDiscarded", "ForgetOneQueue", "ExpectAreas", "WordBeforeData",
	"StoredBeforeWrite", "ReuseSlotEarly", "ForgetWaiter", "PassWaiter", "LongLastChunk", "ShortLastChunk",
	"StoreAnyway", "CopyAnyway", "FollowWrong", "ExtentOff", "GrowNever", "NextUnrecorded", "DeadUnrecorded",
	"ForgetAppend", "ForgetMemory", "LeakRegion", "BreakUntold", "AbortUnrecorded", "ExtentEarly", "CopyTwice",
	"StoredLate", "AwaitLost", "CutUnseen", "KeepUnreadable", "SkipRecheck", "ReadOldPlace", "WriteInFlight", "ForgetOld", "MarkNoImage",
	"SwitchOneMap", "AnswerBroken", "UsedShort", "CloseEarly", "ReinstallNot", "MarkOneMap", "VoidNothing",
}

// All is every bug.
func All() (all []Bug) {
	for b := None + 1; b < bugs; b++ {
		all = append(all, b)
	}
	return all
}

func (b Bug) String() string {
	if b >= 0 && b < bugs {
		return names[b]
	}
	return "bug " + strconv.Itoa(int(b))
}
