#!/bin/bash
# setup.sh go|test|package… installs what the Makefile's targets need on Debian 12 or later, and is quick if all is there.
# On another system it says what is missing.
#
#   go    a Go that can build the module (packaged; if the system's suites have only older ones, from backports)
#   test  compiler, QEMU, and the tools that tests, demo and benchmarks call
#   package  what looks at packages
set -euo pipefail
cd "$(dirname "$0")/.."

# Program in the search path (or file, or the certificates below), and its package.
test_needs="
	gcc                           gcc
	/usr/include/stdio.h          libc6-dev
	/usr/include/linux/types.h    linux-libc-dev
	certificates                  ca-certificates
	qemu-system-x86_64            qemu-system-x86
	/usr/lib/qemu/virtiofsd       qemu-system-common
	nbdkit                        nbdkit
	busybox                       busybox-static
	modprobe                      kmod
	/usr/bin/udevadm              udev
	/lib/systemd/systemd          systemd
	dmsetup                       dmsetup
	blkid                         util-linux
	blockdev                      util-linux
	losetup                       mount
	sfdisk                        fdisk
	fio                           fio
	mkfs.ext4                     e2fsprogs
	mkfs.xfs                      xfsprogs
	mkfs.btrfs                    btrfs-progs
	mkfs.f2fs                     f2fs-tools
	cryptsetup                    cryptsetup-bin
	lvm                           lvm2
	zstd                          zstd
	jq                            jq
	mmdebstrap                    mmdebstrap
	pgrep                         procps
	man                           man-db
"
package_needs="
	lintian                       lintian
	rpmlint                       rpmlint
	rpm                           rpm
"
go_needs="
	certificates                  ca-certificates
"

# Where Go looks for the authorities whose certificates it believes: the file differs with the system.
certificates=(
	/etc/ssl/certs/ca-certificates.crt
	/etc/pki/tls/certs/ca-bundle.crt
	/etc/ssl/ca-bundle.pem
	/etc/pki/tls/cacert.pem
	/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem
	/etc/ssl/cert.pem
)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# any_of says whether one of the files is there.
any_of() {
	local file
	for file; do [ ! -e "$file" ] || return 0; done
	return 1
}

# missing prints a line for each thing of the list $1 that is not there: the package first, then what is missing.
missing() {
	while read -r what package; do
		case $what in
		"") ;;
		certificates) any_of "${certificates[@]}" || echo "$package ${certificates[0]}" ;;
		/*) [ -e "$what" ] || echo "$package $what" ;;
		*) command -v "$what" >/dev/null || echo "$package $what" ;;
		esac
	done <<<"$1"
}

# not_debian ends setup where there is no apt, with all that a person has to install; $1 are lines of missing.
not_debian() {
	{
		echo "setup: this is not Debian or one of its kind (no apt-get), so nothing is installed. What is missing here,"
		echo "setup: and in which package Debian has it:"
		while read -r package what; do printf 'setup:   %-34s %s\n' "$what" "$package"; done <<<"$1"
		echo "setup: Install these with this system's own tools, then try again. make build, install, deb and rpm need Go"
		echo "setup: alone. The machine for tests boots a kernel of Debian's on this file tree, so what runs in it needs apt in"
		echo "setup: any case."
	} >&2
	exit 1
}

# quietly runs a command and shows what it said only if it fails.
quietly() {
	local said
	said=$("$@" 2>&1) || { echo "$said" >&2; return 1; }
}

as_root() {
	if [ "$(id -u)" != 0 ]; then
		echo "setup: not root, and these packages are missing: $*" >&2
		exit 1
	fi
	echo "setup: installing $*" >&2
}

install_packages() {
	as_root "$@"
	export DEBIAN_FRONTEND=noninteractive
	quietly apt-get -q update
	quietly apt-get -q install -y --no-install-recommends "$@"
}

# go_fits says whether the Go called $1 builds this module, by itself or by fetching a newer toolchain. Go has been
# able to do that since 1.21.
go_fits() {
	command -v "$1" >/dev/null || return 1
	local have want
	have=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
	have=${have#go}
	want=$(sed -n 's/^go //p' go.mod)
	[ "${GOTOOLCHAIN:-auto}" = local ] || want=1.21
	[ "$(printf '%s\n' "$want" "${have%% *}" | sort -V | head -n 1)" = "$want" ]
}

# install_go installs the newest packaged Go of the first suite that has one new enough, beside any older Go, and
# puts it into .cache/bin, which the Makefile looks into first.
install_go() {
	local suite version private=$PWD/.cache/apt-go
	as_root "a packaged Go"
	export DEBIAN_FRONTEND=noninteractive
	. tests/vm/machine/apt.sh
	codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
	for suite in "" "$codename-backports" trixie; do
		quietly private_apt "$private" "$suite" /var/lib/dpkg/status || continue
		export APT_CONFIG=$private/apt.conf
		version=$(apt-cache pkgnames golang-1. | sed -nE 's/^golang-(1\.[0-9]+)-go$/\1/p' | sort -V | tail -n 1)
		if [ -n "$version" ] && [ "$(printf '%s\n' 1.21 "$version" | sort -V | head -n 1)" = 1.21 ] &&
			quietly apt-get -q install -y --no-install-recommends "golang-$version-go"; then
			mkdir -p .cache/bin
			ln -sf "/usr/lib/go-$version/bin/go" "/usr/lib/go-$version/bin/gofmt" .cache/bin/
			break
		fi
	done
	rm -rf "$private"
	unset APT_CONFIG
}

for group; do
	needs=${group}_needs
	lines=$(missing "${!needs}")
	[ -z "$lines" ] || command -v apt-get >/dev/null || not_debian "$lines"
	packages=$(cut -d ' ' -f 1 <<<"$lines" | sort -u)
	# shellcheck disable=SC2086 # one word a package
	[ -z "$packages" ] || install_packages $packages
	if [ "$group" = go ]; then
		go_fits go || go_fits .cache/bin/go || {
			command -v apt-get >/dev/null || not_debian "golang go, 1.21 or newer"
			install_go
		}
		go_fits go || go_fits .cache/bin/go || {
			echo "setup: no Go new enough for this module could be installed; see https://go.dev/dl" >&2
			exit 1
		}
	fi
done
