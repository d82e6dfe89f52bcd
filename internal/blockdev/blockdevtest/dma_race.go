//go:build race

package blockdevtest

// dma copies as a disk does, without regard to Go's memory model. The engine may read
// what is being overwritten, and find that out afterwards. The race detector watches
// the builtin copy even here, but not a loop.
//
//go:norace
func dma(dst, src []byte) int {
	n := min(len(dst), len(src))
	for i := 0; i < n; i++ {
		dst[i] = src[i]
	}
	return n
}
