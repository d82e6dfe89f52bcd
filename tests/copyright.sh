#!/bin/bash
# copyright.sh DEB… fails unless the copyright file in each package names every module that the program in it has.
set -euo pipefail
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
for deb; do
	dpkg-deb -x "$deb" "$tree/$(basename "$deb")"
	cd "$tree/$(basename "$deb")"
	modules=$(go version -m usr/sbin/ublk-blksnap | awk '$1 == "dep" { print $2 }')
	[ -n "$modules" ] || { echo "$deb: which modules are in the program is not known" >&2; exit 1; }
	for module in go $modules; do
		grep -A 4 -xF "Files: $module/*" usr/share/doc/ublk-blksnap/copyright | grep -qE '^ Copyright .*[0-9]{4}' ||
			{ echo "$deb: its copyright does not say whose $module is" >&2; exit 1; }
	done
	cd "$OLDPWD"
done
