package control

import "time"

// Storage is where a snapshot keeps differences.
type Storage struct {
	Path string `json:"path"` // a file, a directory or a block device
	// Limit is the most it may take, in bytes; 0: all there is, but for what a file leaves
	// of its filesystem.
	Limit int64 `json:"limit,omitempty"`
	// Overwrite uses a file or a block device whatever it holds, which is lost. A
	// file that was there stays, empty.
	Overwrite bool `json:"overwrite,omitempty"`
	// Reserve is how many percent of its filesystem a file leaves to others, up to 99; 0:
	// without a Limit the last 5, but 1 GiB at most, and with one nothing.
	Reserve int `json:"reserve_percent,omitempty"`
	// OverwriteFile is Overwrite if the path leads to a file, as the daemon sees
	// it: a block device is still used only if it holds nothing.
	OverwriteFile bool `json:"overwrite_file,omitempty"`
	// Warning, in an answer, is what could not be found out about the place.
	Warning string `json:"warning,omitempty"`
	// Most, in an answer, is the most it will take in bytes, as its filesystem is now; 0:
	// nobody knows. Spare is how much of its filesystem stays free.
	Most  int64 `json:"most,omitempty"`
	Spare int64 `json:"spare,omitempty"`
	// Auto, in an answer: the daemon appended it, see AutoAppend.
	Auto bool `json:"auto,omitempty"`
}

// AutoAppend has a snapshot get more storage by itself when it runs low: a file in a
// directory, as long as so much of its filesystem stays free.
type AutoAppend struct {
	Path    string `json:"path"`                      // of the directory; empty: it gets none
	Reserve int    `json:"reserve_percent,omitempty"` // 0: as configured
}

// StorageRequest gives a snapshot storage.
type StorageRequest struct {
	ID string `json:"id"`
	Storage
}

// SnapshotUsage is what a snapshot takes up, in bytes.
type SnapshotUsage struct {
	Copied   int64 `json:"copied"`   // old data copied so far
	Stored   int64 `json:"stored"`   // of it in the storage
	Capacity int64 `json:"capacity"` // of the storage as grown so far
	// Limit is all that its storage can ever hold, as things are; 0: nobody knows. Need is
	// the most that the snapshot can come to need: its disks as a whole.
	Limit int64 `json:"limit,omitempty"`
	Need  int64 `json:"need"`
	// Percent is how much is copied of Limit, or of Need if that is less.
	Percent int `json:"percent"`
	// Rate is what was copied in the last minute, in bytes a second, and Left how long the
	// storage lasts at this rate; 0: for ever.
	Rate int64         `json:"bytes_per_second"`
	Left time.Duration `json:"time_left_ns,omitempty"`
}
