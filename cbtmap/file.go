package cbtmap

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// newSuffix names a file that is not yet what its name says. No device's name
// has a blank, so that no other map's file is called so.
const newSuffix = " new"

// Create makes a map for a device of size bytes in a file of its own, replacing
// any at path. Its memory is allocated at once: marking cannot fail later for
// want of it. The file lives as long as its file system; its directory must not
// be open to others.
func Create(path string, size int64, p Params) (*Map, error) {
	m, err := create(path, size, p, 0)
	if err != nil {
		return nil, fmt.Errorf("create change map: %w", err)
	}
	return m, nil
}

// Open takes over the map at path, whose process has died. See [Adopt].
func Open(path string) (*Map, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open change map: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open change map: %w", err)
	}
	if st.Size() < headerSize {
		return nil, fmt.Errorf("open change map %s: %w: only %d bytes", path, ErrForeign, st.Size())
	}
	memory, err := mapShared(f, st.Size())
	if err != nil {
		return nil, fmt.Errorf("open change map: %w", err)
	}
	m, err := Adopt(memory)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, errors.Join(err, unix.Munmap(memory)))
	}
	m.path = path
	return m, nil
}

// Close ends the use of the map in this process; the file keeps it for [Open].
// Nothing but Close may be called afterwards. Closing again, or a map without a
// file, does nothing.
func (m *Map) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unmapLocked()
}

func (m *Map) unmapLocked() error {
	memory := m.memory
	if m.path == "" || memory == nil {
		return nil
	}
	m.layout = layout{}
	if err := unix.Munmap(memory); err != nil {
		return fmt.Errorf("unmap change map %s: %w", m.path, err)
	}
	return nil
}

// create makes a map whose active bytes are all start, in memory if path is
// empty. A file gets its name when it is whole.
func create(path string, size int64, p Params, start byte) (*Map, error) {
	m, err := prepare(path, size, p, start)
	if err != nil {
		return nil, err
	}
	if err := m.nameNew(); err != nil {
		_ = unix.Munmap(m.memory)
		m.removeNew()
		return nil, err
	}
	return m, nil
}

// prepare is create of a map whose file does not have its name yet.
func prepare(path string, size int64, p Params, start byte) (*Map, error) {
	if path == "" {
		m, err := NewMemory(size, p)
		if err == nil {
			m.fill(m.active, start)
		}
		return m, err
	}
	n, err := MemorySize(size, p)
	if err != nil {
		return nil, err
	}
	// What a dead process left is unlinked, never written to: memory of a map in
	// use must not change under it.
	if err := os.Remove(path + newSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path+newSuffix, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := allocate(f, n); err != nil {
		return nil, errors.Join(fmt.Errorf("allocate %d bytes for %s: %w", n, path, err), os.Remove(f.Name()))
	}
	memory, err := mapShared(f, n)
	if err != nil {
		return nil, errors.Join(err, os.Remove(f.Name()))
	}
	m, err := Format(memory, size, p)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(memory), os.Remove(f.Name()))
	}
	m.fill(m.active, start)
	m.path = path
	return m, nil
}

// nameNew gives a prepared map's file its name.
func (m *Map) nameNew() error {
	if m.path == "" {
		return nil
	}
	return os.Rename(m.path+newSuffix, m.path)
}

// removeNew removes the file of a prepared map.
func (m *Map) removeNew() {
	if m.path != "" {
		_ = os.Remove(m.path + newSuffix)
	}
}

// allocate gives f n bytes of memory: on a tmpfs that is full a store into a hole
// would kill the process.
func allocate(f *os.File, n int64) error {
	for {
		// The signals of the Go scheduler interrupt it, too.
		if err := unix.Fallocate(int(f.Fd()), 0, 0, n); err != unix.EINTR {
			return err
		}
	}
}

func mapShared(f *os.File, n int64) ([]byte, error) {
	memory, err := unix.Mmap(int(f.Fd()), 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of %s: %w", n, f.Name(), err)
	}
	return memory, nil
}
