#!/bin/sh
# Fetches what the virtual machine needs, as packages of Debian, and unpacks it: tests/vm/fetch.sh CACHE
#
#   CACHE/qemu       QEMU that can connect to a vfio-user device (10.1 or later), with its libraries
#   CACHE/linux-V    for V in 6.12 and 6.1: headers to build modules with; of 6.12 the kernel and its modules too
#   CACHE/source     of 6.12: VFIO, iommufd and what of the kernel they need, which iommufd.sh builds
#   CACHE/busybox    a static busybox
#   CACHE/versions   what of which version, fetched by which version of this
#
# Needs no root: apt works on lists of its own, nothing is installed. The mirror is the one that this machine uses.
# Ends with status 77, and says why, where the mirror has no such packages.
set -eu
CACHE=$1
KERNELS="6.12 6.1"

skip() {
    echo "SKIPPED, NOTHING WAS CHECKED: $1" >&2
    exit 77
}

ours="by $(cksum <"$0" | cut -d ' ' -f 1)"
! grep -sqx "$ours" "$CACHE/versions" || exit 0
[ "$(uname -m)" = x86_64 ] || skip "the virtual machine is an x86-64 one, and so must the host be"
command -v apt-get >/dev/null || skip "there is no apt to fetch QEMU and a kernel with"
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e $KEYS ] || skip "$KEYS is missing (package debian-archive-keyring)"

# The mirrors of this machine, of packages and of security updates.
mirrors=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | sort -u)
MIRROR=${RDSOCK_VM_MIRROR:-$(echo "$mirrors" | awk '$1 ~ /debian\/?$/ { print $1; exit }')}
SECURITY=${RDSOCK_VM_SECURITY:-$(echo "$mirrors" | awk '$1 ~ /debian-security\/?$/ { print $1; exit }')}
[ -n "$MIRROR" ] || skip "apt has no mirror of Debian (RDSOCK_VM_MIRROR may name one)"

mkdir -p "$CACHE"
CACHE=$(cd "$CACHE" && pwd)
apt=$CACHE/apt
# It names the mirror, and is of no use later.
trap 'rm -rf "$apt"' EXIT
rm -rf "$apt" "$CACHE"/qemu "$CACHE"/linux-* "$CACHE"/module-* "$CACHE"/source "$CACHE"/iommufd
mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$apt/etc" "$apt/debs"
# No package is installed, as far as this apt knows, so that it fetches all that QEMU needs, libc too.
: >"$apt/status"
for suite in bookworm trixie trixie-backports; do
    echo "deb [signed-by=$KEYS] $MIRROR $suite main"
done >"$apt/etc/sources.list"
[ -z "$SECURITY" ] || echo "deb [signed-by=$KEYS] $SECURITY bookworm-security main" >>"$apt/etc/sources.list"

apt() {
    command=$1
    shift
    "$command" -qq -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
        -o Dir::Etc::sourcelist="$apt/etc/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::Cache::pkgcache=packages.bin -o Dir::Cache::srcpkgcache=sources.bin -o Acquire::Languages=none -o Acquire::Retries=3 -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 "$@"
}

apt apt-get update || skip "the mirror does not have the suites that are needed"

version() { apt apt-cache policy -t trixie-backports "$1" | awk '/Candidate:/ { print $2 }'; }
qemu=$(version qemu-system-x86)
# Connecting to a vfio-user device came with 10.1.
dpkg --compare-versions "$qemu" ge 1:10.1 || skip "the mirror's newest QEMU is $qemu, which is older than 10.1"
apt apt-get -y --no-install-recommends --download-only -t trixie-backports install qemu-system-x86 >/dev/null
mkdir "$CACHE/qemu"
for deb in "$apt"/cache/archives/*.deb; do
    dpkg-deb -x "$deb" "$CACHE/qemu"
done
echo "qemu $qemu" >"$CACHE/versions.new"

# Fetches the packages that are named, and unpacks them into a folder.
unpack() {
    into=$1
    shift
    (cd "$apt/debs" && apt apt-get download "$@")
    for deb in "$apt"/debs/*.deb; do
        dpkg-deb -x "$deb" "$into"
        rm "$deb"
    done
}

unpack "$CACHE/tools" busybox-static
find "$CACHE/tools" -name busybox -type f -perm -100 -exec cp {} "$CACHE/busybox" \;
[ -x "$CACHE/busybox" ]
rm -rf "$CACHE/tools"
echo "busybox $(version busybox-static)" >>"$CACHE/versions.new"

# The package that another one leads to: the current build of a kernel.
leads_to() { apt apt-cache depends "$1" | awk -v start="$2" '$1 == "Depends:" && index($2, start) == 1 { print $2; exit }'; }

for kernel in $KERNELS; do
    case $kernel in
        6.1) meta=linux-headers-cloud-amd64/bookworm ;;
        *) meta=linux-headers-$kernel-cloud-amd64 ;;
    esac
    headers=$(leads_to "${meta%/*}" "linux-headers-$kernel.")
    [ -n "$headers" ] || headers=$(apt apt-cache search --names-only "^linux-headers-$kernel\..*-cloud-amd64\$" | awk '{ print $1 }' | sort -V | tail -n 1)
    [ -n "$headers" ] || skip "the mirror has no linux-headers for Linux $kernel"
    release=${headers#linux-headers-}
    into=$CACHE/linux-$kernel
    mkdir "$into"
    # What all flavours share, and the programs that build modules: named in the dependencies.
    shared=$(apt apt-cache depends "$headers" | awk '$1 == "Depends:" && $2 ~ /^linux-(headers|kbuild)-/ { print $2 }')
    image=
    [ "$kernel" != "${KERNELS%% *}" ] || image=linux-image-$release
    # shellcheck disable=SC2086
    unpack "$into" "$headers" $shared $image
    echo "$release" >"$into/release"
    # The only absolute paths in them.
    sed -i "s#/usr/src/#$into/usr/src/#" "$into/usr/src/linux-headers-$release/Makefile"
    echo "linux $release $(version "$headers")" >>"$CACHE/versions.new"
done

# Of the source of the very kernel that boots, what iommufd.sh wants. The package has it as an archive.
source=linux-source-${KERNELS%% *}
built=$(awk '$1 == "linux" { print $3; exit }' "$CACHE/versions.new")
(cd "$apt/debs" && apt apt-get download "$source=$built" && mv ./*.deb source.package) ||
    skip "the mirror has no $source of version $built"
mkdir "$CACHE/source"
dpkg-deb --fsys-tarfile "$apt/debs/source.package" | tar -xO "./usr/src/$source.tar.xz" |
    "$CACHE/busybox" unxz | tar -xC "$CACHE/source" --strip-components=1 --wildcards "$source/drivers/iommu/iommufd/*" \
        "$source/drivers/iommu/iommu-priv.h" "$source/drivers/vfio/*" "$source/lib/interval_tree.c"
rm "$apt/debs/source.package"
echo "source $built" >>"$CACHE/versions.new"

echo "$ours" >>"$CACHE/versions.new"
mv "$CACHE/versions.new" "$CACHE/versions"
cat "$CACHE/versions"
