# Shell functions: apt on another suite, with a configuration and state of its own. To be sourced.

# private_apt DIR SUITE STATUS makes apt and its tools use DIR and the package lists of SUITE, from the mirrors that
# the system's own Debian entries name; an empty SUITE means the system's entries as they are. STATUS is the list of
# installed packages to go by. The system's own lists and sources are neither used nor changed.
private_apt() {
	local dir=$1 suite=$2 status=$3 etc=${APT_ETC:-/etc/apt} codename file
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	rm -rf "$dir"
	mkdir -p "$dir/sources" "$dir/lists/partial" "$dir/cache/archives/partial"
	for file in "$etc/sources.list" "$etc"/sources.list.d/*.list; do
		[ ! -f "$file" ] || move_lines "$suite" "$codename" <"$file" >"$dir/sources/${file##*/}.list"
	done
	for file in "$etc"/sources.list.d/*.sources; do
		[ ! -f "$file" ] || move_stanzas "$suite" "$codename" <"$file" >"$dir/sources/${file##*/}"
	done
	# The cache may lie where apt's own user cannot go: no sandbox.
	cat >"$dir/apt.conf" <<-END
		Dir::Etc::SourceList "/dev/null";
		Dir::Etc::SourceParts "$dir/sources";
		Dir::State::Lists "$dir/lists";
		Dir::State::status "$status";
		Dir::Cache "$dir/cache";
		Acquire::Languages "none";
		APT::Sandbox::User "root";
	END
	export APT_CONFIG=$dir/apt.conf
	apt-get -q update
}

# move_stanzas reads a deb822 file. The security suites have a tree of their own, without the other suites.
move_stanzas() {
	awk -v RS= -v ORS='\n\n' -v suite="$1" -v ours="Suites:([^\n]* )?($2|stable|oldstable)([ \n]|$)" '
		suite == "" { print }
		suite != "" && $0 ~ ours { sub(/Suites:[^\n]*/, "Suites: " suite); print }'
}

# move_lines reads a file of one-line entries.
move_lines() {
	if [ -z "$1" ]; then
		cat
	else
		sed -nE "s,^deb +((\[[^]]*\] +)?[^ ]+) +($2|stable|oldstable) +(.*)$,deb \1 $1 \4,p"
	fi
}
