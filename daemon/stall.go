package daemon

// stall says for how long a log has not got on while somebody waits for it. It counts looks,
// not time, because a process that somebody has stopped for a while finds at its next look
// that time has gone.
type stall struct {
	done  uint64 // how far the log was when it last got on, or when nobody waited
	still int    // looks since then
}

// look is told what a look has shown, as Waiting of the log says it, and counts it.
func (s *stall) look(waits bool, done uint64) (still int) {
	if !waits || done != s.done {
		*s = stall{done: done}
		return 0
	}
	s.still++
	return s.still
}
