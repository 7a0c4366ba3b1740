#!/bin/bash
# Builds VFIO with iommufd for the virtual machine's kernel: tests/vm/iommufd.sh CACHE ARCHIVE
#
# Debian's kernels have none of it (CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV are off), but export what it needs. So it is built from
# the source of that very kernel (fetch.sh), and our module against it: into an archive that the guest has beside its own.
set -euo pipefail
CACHE=$1 ARCHIVE=$2
cd "$(dirname "$0")/../.."
linux=$CACHE/linux-$KERNEL
build=$CACHE/iommufd
headers=$linux/usr/src/linux-headers-$(cat "$linux/release")
mkdir -p "$build/ours" "$build/root/modules/iommufd"

# What the headers do not know to be there. Kbuild takes the first line, the compiler the second.
CONFIG=(CONFIG_IOMMUFD=m CONFIG_VFIO_DEVICE_CDEV=y CONFIG_DEBUG_INFO_BTF_MODULES=)
FLAGS="-DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1"
module() { make -s -C "$headers" M="$1" CC="${CC:-gcc}" -j"$(nproc)" "${CONFIG[@]}" KCFLAGS="$FLAGS" "${@:2}" modules; }

if [ ! -e "$build/Module.symvers" ]; then
    cp -r "$CACHE/source/drivers/iommu" "$CACHE/source/drivers/vfio" "$build"
    # Of the kernel's interval tree, the part that CONFIG_INTERVAL_TREE_SPAN_ITER leaves out: the kernel has the rest.
    sed '/^EXPORT_SYMBOL/d; /^INTERVAL_TREE_DEFINE/,/^$/d' "$CACHE/source/lib/interval_tree.c" >"$build/iommu/iommufd/span.c"
    echo "iommufd-y += span.o" >>"$build/iommu/iommufd/Makefile"
    # Drivers of devices that the machine does not have.
    sed -i '/^obj-.*\/$/d' "$build/vfio/pci/Makefile"
    sed -i '/\(platform\|mdev\|fsl-mc\|cdx\)\/$/d' "$build/vfio/Makefile"
    echo "obj-m := iommu/iommufd/ vfio/" >"$build/Kbuild"
    module "$build"
fi
cp -u kmod-minimal/*.[ch] kmod-minimal/Kbuild "$build/ours"
module "$build/ours" KBUILD_EXTRA_SYMBOLS="$build/Module.symvers"
for file in "$build"/iommu/iommufd/iommufd.ko "$build"/vfio/{vfio,vfio_iommu_type1}.ko \
    "$build"/vfio/pci/{vfio-pci-core,vfio-pci}.ko "$build"/ours/rdsock-vfio.ko; do
    strip -g -o "$build/root/modules/iommufd/${file##*/}" "$file"
done
(cd "$build/root" && find . | "$CACHE/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$ARCHIVE.new"
mv "$ARCHIVE.new" "$ARCHIVE"
