#!/bin/bash
# copyright.sh prints the package's copyright file, in Debian's format: dist/package/copyright, and a paragraph for each
# module that the program for GOARCH has linked in, with what its own files say. It fails at a license that it does not
# know, because somebody has to look at that first.
set -euo pipefail
export LC_ALL=C

die() { echo "copyright.sh: $*" >&2; exit 1; }

# field indents a text as the value of a field.
field() { sed -E 's/[[:space:]]+$//; s/^$/./; s/^/ /' "$@"; }

# name_of is the short name of the license in a file.
name_of() {
	local words
	words=$(tr -s '[:space:]' ' ' <"$1")
	case $words in
	*"Apache License Version 2.0, January 2004"*) echo Apache-2.0 ;;
	*"Permission is hereby granted, free of charge, to any person obtaining a copy"*) echo Expat ;;
	*"Redistributions in binary form must reproduce"*"Neither the name"*) echo BSD-3-Clause ;;
	*) die "$1 is a license of a kind that is not known here" ;;
	esac
}

# paragraph says what module $1 in folder $2 is under. The other arguments are the folders of its packages.
paragraph() {
	local module=$1 top=$2 folder file name names="" licenses=() notices=()
	shift 2
	# A package may have a license of its own.
	while read -r folder; do
		for file in "$folder"/{LICEN[CS]E,COPYING,NOTICE}*; do
			case $file in
			*'*') ;;
			*/NOTICE*) notices+=("$file") ;;
			*)
				name=$(name_of "$file")
				licenses+=("$file")
				[[ $names == *"$name"* ]] || names+="${names:+ and }$name"
				;;
			esac
		done
	done < <(for folder; do
		while echo "$folder" && [ "$folder" != "$top" ]; do folder=${folder%/*}; done
	done | sort -u)
	[ ${#licenses[@]} -gt 0 ] || die "$module has no license"

	echo
	echo "Files: $module/*"
	echo "Copyright:"
	# Where the text of the license names nobody, the sources do.
	{ grep -hE '^ *Copyright ' "${licenses[@]}" "${notices[@]}" | grep -v '[[{]yyyy' ||
		grep -hoE --include='*.go' -r 'Copyright .*' "$top"; } | sed 's/^ *//' | sort -u | field || die "$module names no author"
	echo "License: $names"
	for file in "${licenses[@]}"; do
		if [ "$(name_of "$file")" = Apache-2.0 ]; then
			echo " The whole text of the license is in /usr/share/common-licenses/Apache-2.0"
			echo " on Debian systems, and in the file LICENSE beside this one on others."
		else
			field "$file"
		fi
		[ "$file" = "${licenses[-1]}" ] || echo " ."
	done
	[ ${#notices[@]} = 0 ] || {
		echo "Comment:"
		field "${notices[@]}"
	}
}

cd "$(dirname "$0")/../.."
cat dist/package/copyright
packages=$(go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}} {{$.Dir}}{{end}}{{end}}' ./cmd/ublk-blksnap)
while read -r module top; do
	# shellcheck disable=SC2046 # one word a folder
	paragraph "$module" "$top" $(awk -v module="$module" '$1 == module { print $3 }' <<<"$packages")
	# Go's own library is under the same license, by the same authors, and not every Go has that file beside it.
	[ "$module" != golang.org/x/sys ] || paragraph go "$top" "$top"
done < <(cut -d ' ' -f 1,2 <<<"$packages" | sort -u)
