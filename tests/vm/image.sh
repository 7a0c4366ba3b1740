#!/bin/bash
# Builds what the virtual machine boots into: tests/vm/image.sh CACHE TARGET IMAGE
#
# busybox; the modules of the kernel in CACHE, and ours; programs, with the libraries that they need. CACHE is fetch.sh's,
# TARGET cargo's.
set -euo pipefail
cd "$(dirname "$0")/../.."
CACHE=$1 TARGET=$2 IMAGE=$3
GUEST=tests/vm/guest

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/{bin,dev,etc,proc,sys,modules,suites,tmp,usr/bin}
cp "$CACHE/busybox" "$root/bin"
cp $GUEST/init $GUEST/node $GUEST/*.conf "$root"
cp $GUEST/suites/* "$root/suites"

for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci inet_diag tcp_diag failover net_failover virtio_net; do
    found=$(find "$CACHE/linux-$KERNEL/" -name "$module.ko*" -print -quit)
    case $found in
        *.xz) "$CACHE/busybox" unxz -c "$found" >"$root/modules/$module.ko" ;;
        *.ko) cp "$found" "$root/modules/$module.ko" ;;
        *) echo "Linux $KERNEL has no module $module"; exit 1 ;;
    esac
done
strip -g -o "$root/modules/rdsock-vfio.ko" "$CACHE/module-$KERNEL/rdsock-vfio.ko"

# Copies a file to its place in the guest, and the libraries that it needs to theirs.
pack() {
    cp -L "$1" "$root/usr/bin/"
    # The shim needs none.
    ldd "$1" | sed -n 's|^[^/]*\(/[^ ]*\).*|\1|p' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -Lu "$library" "$root$library"
    done
}
PATH=$PATH:/usr/sbin:/sbin
for program in redis-server redis-cli redis-benchmark iperf3 sockperf nginx curl setpriv; do
    pack "$(command -v $program)"
done
for file in rdsockd rdsock rdsock-test-pump rdsock-vm-driver examples/edu librdsock.so; do
    strip -g -o "$work/${file##*/}" "$TARGET/debug/$file"
    pack "$work/${file##*/}"
done
"${CC:-gcc}" -O1 -D_GNU_SOURCE -Wall -Wextra -Wno-unused-result -o "$work/attacker" $GUEST/attacker.c
pack "$work/attacker"
(cd "$root" && find . | "$CACHE/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$IMAGE"
