# make_root DIR IMAGE makes IMAGE, that of a disk with a Debian of the system's own release on it, from the mirrors
# that the system's apt has: what boots with systemd, and no more. To be sourced after apt.sh.
make_root() {
	local dir=$1 image=$2 codename
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	trap "rm -rf '$dir/apt' '$dir/tree' '$dir/root.part'" EXIT
	rm -rf "$dir/tree"
	mkdir -p "$dir/tree"
	private_apt "$dir/apt" "" /dev/null
	# mmdebstrap goes by a configuration of its own; how to reach the mirrors it cannot know.
	unset APT_CONFIG
	apt-config dump | grep '^Acquire::' >"$dir/apt/acquire.conf" || true
	mmdebstrap --quiet --mode=root --variant=minbase --include=systemd-sysv,udev,kmod,e2fsprogs,lvm2 \
		--aptopt="$dir/apt/acquire.conf" "$codename" "$dir/tree" "$dir"/apt/sources/*
	echo vm >"$dir/tree/etc/hostname"
	: >"$dir/tree/etc/machine-id"
	# They would only take time.
	chroot "$dir/tree" systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
		fstrim.timer lvm2-monitor.service systemd-random-seed.service systemd-update-utmp.service systemd-pstore.service
	rm -rf "$dir/tree/var/cache/apt" "$dir/tree/var/lib/apt/lists"
	mkfs.ext4 -q -F -d "$dir/tree" "$dir/root.part" 1G
	mv "$dir/root.part" "$image"
}
