//go:build !nextformat

package daemon

// stateFormat is the format that this program writes.
const stateFormat = 4

// devicesName is the directory of the records of devices.
const devicesName = "devices"
