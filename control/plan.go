package control

// AddPlan is what a filter would take.
type AddPlan struct {
	// Memory is what it would lock, in bytes: its change map, and in copy mode the buffers of
	// its queues.
	Memory int64 `json:"memory"`
	// PowerFailure is whether the change map would go on after one.
	PowerFailure PowerFailure `json:"power_failure"`
}
