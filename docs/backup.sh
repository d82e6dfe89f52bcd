#!/bin/bash
# backup.sh: full and incremental backups of a disk that has a filter of ublk-blksnap.
#
#	backup.sh save FILTER DIR [--full] [--check]   one more backup in DIR: what has changed, or everything if it must be
#	backup.sh restore DIR TARGET [N]               backup N, or the last one, into a file or onto an idle disk
#	backup.sh verify DIR                           are all backups as they were written?
#
# DIR/N is a backup: data has the content of all ranges, one behind the other, ranges says where they belong (sector and
# count, of 512 bytes), token names the take, size is the disk's, sums has checksums, and full is there if it needs no
# other. A backup that was not finished is in DIR/new, and the next one begins it anew. --check builds the disk from the
# backups, and compares that with the image: it reads everything.
set -euo pipefail
umask 077

die() { echo "backup.sh: $*" >&2; exit 1; }

# last is the number of the newest backup in $1, or nothing.
last() { find "$1" -maxdepth 1 -name '[0-9]*' -printf '%f\n' | sort -n | tail -n 1; }

# check says whether backup $1/$2 is as it was written.
check() { (cd "$1/$2" && sha256sum --quiet --check sums) || die "backup $1/$2 is damaged"; }

save() {
	local filter=$1 dir=$2 full= compare= name image n status=0 sector count size
	shift 2
	for option; do
		case $option in
		--full) full=yes ;;
		--check) compare=yes ;;
		*) die "no option $option" ;;
		esac
	done
	mkdir -p "$dir"
	exec 9>"$dir/lock"
	flock --nonblock 9 || die "another backup to $dir is under way"
	rm -rf "$dir/new"
	mkdir "$dir/new"

	# The snapshot ends by itself if this script cannot end it.
	name=backup-$filter-$$
	trap "ublk-blksnap snapshot destroy '$name'" EXIT
	image=$(ublk-blksnap snapshot create "$filter" --name "$name" --ttl 1d --storage "${STORAGE:-/var/tmp}" --take)
	size=$(blockdev --getsize64 "$image")
	ublk-blksnap snapshot info "$name" --field take >"$dir/new/token"
	echo "$size" >"$dir/new/size"

	n=$(last "$dir")
	[ -n "$n" ] && [ "$(<"$dir/$n/size")" = "$size" ] || full=yes
	if [ -z "$full" ]; then
		ublk-blksnap cbt changes "$filter" --since "$(<"$dir/$n/token")" >"$dir/new/ranges" || status=$?
		case $status in
		0) ;;
		6) full=yes ;; # nobody knows any more what has changed since then
		*) die "what has changed is not known" ;;
		esac
	fi
	if [ -n "$full" ]; then
		echo "0:$((size / 512))" >"$dir/new/ranges"
		touch "$dir/new/full"
		dd if="$image" of="$dir/new/data" bs=1M conv=sparse status=none
		truncate -s "$size" "$dir/new/data"
	else
		while IFS=: read -r sector count; do
			dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip=$((sector * 512)) count=$((count * 512)) status=none
		done <"$dir/new/ranges" >"$dir/new/data"
	fi
	# Whatever broke the snapshot meanwhile, such as lvextend on a volume that was attached while in use.
	[ "$(ublk-blksnap snapshot info "$name" --field state)" = taken ] || die "the snapshot broke while it was read"
	(cd "$dir/new" && sha256sum data ranges token size >sums)
	sync -f "$dir/new"
	n=$((${n:-0} + 1))
	mv -T "$dir/new" "$dir/$n"
	sync -f "$dir"
	if [ -n "$compare" ]; then
		restore "$dir" "$dir/compared" "$n" >/dev/null
		cmp "$dir/compared" "$image" || die "backup $n and the image differ"
		rm "$dir/compared"
	fi
	echo "backup $n: $([ -n "$full" ] && echo full || echo increment), $(stat -c %s "$dir/$n/data") bytes"
}

restore() {
	local dir=$1 target=$2 n=${3:-$(last "$1")} first k sector count at size
	[ -n "$n" ] && [ -d "$dir/$n" ] || die "no backup ${n:-} in $dir"
	size=$(<"$dir/$n/size")
	first=$n
	until [ -e "$dir/$first/full" ]; do
		first=$((first - 1))
		[ -d "$dir/$first" ] || die "backup $dir/$first, which $n needs, is not there"
	done
	for ((k = first; k <= n; k++)); do check "$dir" "$k"; done
	if [ -b "$target" ]; then
		[ "$(blockdev --getsize64 "$target")" -ge "$size" ] || die "$target is too small for $size bytes"
		# Nobody else has it, a filter neither: this opens the disk exclusively, and changes nothing.
		wipefs --all --no-act "$target" >/dev/null 2>&1 || die "$target is in use"
		dd if="$dir/$first/data" of="$target" bs=1M status=none
	else
		dd if="$dir/$first/data" of="$target" bs=1M conv=sparse status=none
		truncate -s "$size" "$target"
	fi
	for ((k = first + 1; k <= n; k++)); do
		at=0
		while IFS=: read -r sector count; do
			dd if="$dir/$k/data" of="$target" bs=1M iflag=skip_bytes,count_bytes oflag=seek_bytes conv=notrunc \
				skip="$at" seek=$((sector * 512)) count=$((count * 512)) status=none
			at=$((at + count * 512))
		done <"$dir/$k/ranges"
	done
	sync "$target"
	echo "backup $n is in $target"
}

verify() {
	local dir=$1 n
	for ((n = 1; n <= $(last "$dir"); n++)); do check "$dir" "$n"; done
	echo "all backups in $dir are as they were written"
}

case ${1:-} in
save) [ $# -ge 3 ] || die "use: save FILTER DIR [--full] [--check]" ;;
restore) [ $# = 3 ] || [ $# = 4 ] || die "use: restore DIR TARGET [N]" ;;
verify) [ $# = 2 ] || die "use: verify DIR" ;;
*) die "use: save, restore or verify; see the head of this file" ;;
esac
"$@"
