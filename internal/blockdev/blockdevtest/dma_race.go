//go:build race

package blockdevtest

// dma copies as a disk does, past all that Go knows of memory: the engine may
// have read what is being overwritten, and find out afterwards. The race
// detector watches copy even here, but not a loop.
//
//go:norace
func dma(dst, src []byte) int {
	n := min(len(dst), len(src))
	for i := 0; i < n; i++ {
		dst[i] = src[i]
	}
	return n
}
