package disk

import "testing"

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
