package disk

import (
	"fmt"
	"slices"
	"testing"
)

// TestPrivate: the private device of a volume has the volume's identity, whoever attached it,
// and is nobody else's.
func TestPrivate(t *testing.T) {
	const owner = 0x1234abcd
	for _, public := range []string{"LVM-abc", "CRYPT-LUKS2-0123-safe", "UBLKBLKSNAP-", ""} {
		uuid := PrivateUUID(owner, public, Num{Major: 254, Minor: 3})
		if got, ok := publicUUID(uuid); !ok || got != public {
			t.Errorf("%q: the public UUID of %s is %q, %v", public, uuid, got, ok)
		}
		if !IsPrivate(owner, uuid) || IsPrivate(owner+1, uuid) {
			t.Errorf("%s: whose it is", uuid)
		}
	}
	if PrivateUUID(owner, "", Num{Major: 254, Minor: 3}) == PrivateUUID(owner, "", Num{Major: 254, Minor: 4}) {
		t.Error("two volumes without UUIDs have the same private one")
	}
	for _, uuid := range []string{"", "LVM-abc", "UBLKBLKSNAP-12"} {
		if public, ok := publicUUID(uuid); ok || IsPrivate(owner, uuid) {
			t.Errorf("%q counts as that of a private device of %q", uuid, public)
		}
	}
}

// TestAttached: of each volume that a filter was attached to sysfs tells what became of it.
func TestAttached(t *testing.T) {
	m := newMachine(t)
	volume := func(minor int, name, uuid string) string {
		t.Helper()
		kernel := fmt.Sprintf("dm-%d", minor)
		m.disk(kernel, fmt.Sprintf("252:%d", minor), "")
		m.set(kernel, "dm/name", name)
		m.set(kernel, "dm/uuid", uuid)
		m.set(kernel, "dm/suspended", "0")
		return kernel
	}
	private := func(minor, public int, uuid string) {
		t.Helper()
		n := Num{Major: 252, Minor: uint32(public)}
		volume(minor, PrivateName(n), PrivateUUID(1, uuid, n))
	}
	for i := range 3 {
		m.disk(fmt.Sprintf("ublkb%d", i), fmt.Sprintf("259:%d", i), "")
	}
	m.disk("vdb", "254:16", "")
	m.stack(volume(0, "vg-through", "LVM-a"), "ublkb0")
	private(10, 0, "LVM-a")
	m.stack(volume(1, "vg-waits", "LVM-b"), "ublkb1")
	m.set("dm-1", "dm/suspended", "1")
	private(11, 1, "LVM-b")
	m.stack(volume(2, "vg-past", "LVM-c"), "vdb")
	private(12, 2, "LVM-c")
	m.stack(volume(3, "plain", ""), "ublkb2")
	private(13, 3, "")
	volume(4, "taken", "LVM-its-number-is-anothers-now")
	private(14, 4, "LVM-e")
	m.stack(volume(5, "nothing to do with it", ""), "vdb")
	var got []string
	for _, a := range m.Attached() {
		text := a.Private.Name
		if a.Public != nil {
			text += " " + a.Public.DMName
		}
		if a.Filter != nil {
			text += " " + a.Filter.Name
		}
		if a.Suspended {
			text += " suspended"
		}
		got = append(got, text)
	}
	if want := []string{"dm-10 vg-through ublkb0", "dm-11 vg-waits ublkb1 suspended", "dm-12 vg-past", "dm-13 plain ublkb2", "dm-14"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
