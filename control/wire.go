package control

// What travels beside the requests and answers that [API] names, for who serves
// one or asks without [Client].

// none is the body of a call that has nothing to say.
type none struct{}

// DeviceRef is the request of calls that are about a device.
type DeviceRef struct {
	Device string `json:"device"`
}

// SnapshotRef is the request of calls that are about a snapshot.
type SnapshotRef struct {
	ID string `json:"id"`
}

// A long answer is one line of JSON after the other. Each holds a piece.

// MapLine is a line of a change map.
type MapLine struct {
	Map []byte `json:"map,omitempty"`
	LastLine
}

// RangeLine is a line of what changed.
type RangeLine struct {
	*Range
	LastLine
}

// EventLine is a line of what happens.
type EventLine struct {
	*Event
	LastLine
}

// LastLine is what the last line of a long answer holds: the description of the
// change map, or the error with which an answer ends that is not whole.
type LastLine struct {
	Info  *CBTInfo `json:"info,omitempty"`
	Error *Error   `json:"error,omitempty"`
}
