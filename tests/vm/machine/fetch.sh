# fetch_kernel DIR NAME unpacks the latest kernel package called NAME, "newest" or a version, into DIR/RELEASE and
# points the link DIR/NAME there. To be sourced after apt.sh.

# Where to look after the system's own suites. The last one follows the kernel's own releases within a few weeks.
more_suites=(trixie trixie-backports)

fetch_kernel() {
	local dir=$1 name=$2 deb suites=("" "${more_suites[@]}") pattern="${2//./\\.}\\." suite release part
	[ "$name" != newest ] || suites=("${more_suites[@]: -1}") pattern='[0-9]+\.[0-9]+\.'
	trap "rm -rf '$dir/apt' '$dir'/*.part" EXIT
	for suite in "${suites[@]}"; do
		private_apt "$dir/apt" "$suite" /dev/null
		release=$(apt-cache pkgnames linux-image- |
			sed -nE "s/^linux-image-($pattern.*-cloud-amd64)$/\1/p" | sort -V | tail -n 1)
		[ -z "$release" ] || break
	done
	if [ -z "$release" ]; then
		echo "no package linux-image-$name…-cloud-amd64 in this system's suites, ${more_suites[*]}" >&2
		return 1
	fi

	# Newer packages are split into an image and its modules, which carry the release in their names.
	cd "$dir/apt"
	apt-get -q download "linux-image-$release" $(apt-cache depends --important "linux-image-$release" |
		grep -oFx -e "  Depends: linux-binary-$release" -e "  Depends: linux-modules-$release" | cut -d: -f2)
	part=$dir/$release.part
	rm -rf "$part"
	for deb in *.deb; do dpkg-deb -x "$deb" "$part"; done

	# They keep the modules in /usr/lib, where depmod does not look, and the image among them.
	if [ -d "$part/usr/lib/modules" ]; then
		mkdir -p "$part/lib"
		mv "$part/usr/lib/modules" "$part/lib/modules"
	fi
	mv "$part/boot/vmlinuz-$release" "$part/vmlinuz" 2>/dev/null ||
		mv "$part/lib/modules/$release/vmlinuz" "$part/vmlinuz"
	depmod -b "$part" "$release"
	rm -rf "${dir:?}/$release"
	mv "$part" "$dir/$release"
	ln -sfn "$release" "$dir/$name"
}
