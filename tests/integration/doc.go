// Package integration holds the tests that need ublk, one folder for each subject:
// make integration runs them in the machine of tests/vm, which sets
// UBLK_BLKSNAP_VM; elsewhere they are skipped. What they stand on:
//
//	guest    the machine: commands, disks and filesystems to destroy, waiting
//	program  a daemon and its commands, as its users have them
//	direct   reading and writing disks past the page cache
//	stamp    contents that tell who wrote them; says whether an image is a cut
//
// A new folder has a TestMain that calls guest.Main, and run.sh finds it. The
// tests load and unload kernel modules and count what is left behind, so that no
// two of them can run at a time: go test needs -p 1 where there is ublk.
package integration
