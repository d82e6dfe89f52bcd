#!/bin/bash
# run.sh MINUTES BINARIES REGEXP runs the test binaries in a directory one after the other, each in the folder here that it
# is built of, and fails if any fails. The minutes are for all of them; a binary that is still running then tells where it
# hangs.
cd "$(dirname "$0")/../.." || exit
limit=$(($1 * 60)) binaries=$(realpath "$2") status=0
for binary in "$binaries"/*.test; do
	folder=$(basename "$binary" .test)
	echo "# $folder"
	left=$((limit - SECONDS))
	((left > 0)) || { echo "no time is left"; exit 1; }
	(cd "tests/integration/$folder" && exec "$binary" -test.v -test.timeout "${left}s" -test.run "$3") || status=1
done
exit $status
