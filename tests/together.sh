#!/bin/bash
# together.sh COMMAND… runs shell commands at the same time, because most tests in a machine wait more than they compute. It
# prints the output of each as a whole when it has ended, the first one's as it comes, and fails if any of them fails.
out=$(mktemp -d) status=0 jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null; wait; rm -rf "$out"' EXIT
trap exit INT TERM
for command in "${@:2}"; do
	bash -c "$command" >"$out/${#jobs[@]}" 2>&1 &
	jobs+=($!)
done
ended() { (($2 == 0)) && echo "# ended: $1" || { echo "# failed with status $2: $1"; status=1; }; }
echo "# at the same time: $*"
first=0
bash -c "$1" || first=$?
ended "$1" $first
for n in "${!jobs[@]}"; do
	code=0
	wait "${jobs[n]}" || code=$?
	cat "$out/$n"
	ended "${*:n+2:1}" $code
done
exit $status
