#!/bin/bash
# The true VFIO path in a virtual machine: make vm-test, or tests/vm/run.sh [SUITE…]
#
# Fetches QEMU and a stock kernel into target/vm (see fetch.sh), builds the kernel module, the model and the guest's
# programs, boots each suite of guest/suites by software emulation, and checks what came back against expected.txt: a test that
# was not run has failed. Needs no root (but to install redis and iperf3, which go into the guest) and no KVM. RDSOCK_VM_KVM=1 uses KVM.
set -euo pipefail
cd "$(dirname "$0")/../.."
TARGET=${CARGO_TARGET_DIR:-target}
mkdir -p "$TARGET/vm"
TARGET=$(cd "$TARGET" && pwd)
CACHE=$TARGET/vm
KERNEL=6.12
VM=tests/vm
SUITES=("${@:-module driver programs no_remapping no_iommu}")
# A boot takes some ten seconds; a busy machine needs more.
LIMIT=${RDSOCK_VM_LIMIT:-240}
started=$SECONDS

say() { echo "vm-test ($((SECONDS - started)) s): $*"; }

work=$(mktemp -d)
servers=()
finish() {
    for server in "${servers[@]}"; do kill "$server" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

status=0
$VM/fetch.sh "$CACHE" || status=$?
if [ "$status" = 77 ]; then exit 0; fi
[ "$status" = 0 ] || exit "$status"
say "with $(tr '\n' ',' <"$CACHE/versions")"

# The module, for each kernel that there are headers of. The one of the machine that boots is the one that is tried.
for linux in "$CACHE"/linux-*; do
    release=$(cat "$linux/release")
    build=$CACHE/module-${linux##*-}
    mkdir -p "$build"
    cp -u kmod-minimal/*.[ch] kmod-minimal/Kbuild kmod-minimal/Makefile "$build"
    make -s -C "$build" KDIR="$linux/usr/src/linux-headers-$release" CC="${CC:-gcc}" >"$work/make.log" 2>&1 ||
        { cat "$work/make.log"; echo "the module does not build for Linux $release"; exit 1; }
    # The compiler is not the one that the kernel was built with, which is said, and does not matter.
    ! grep -E 'main.c.*warning' "$work/make.log"
    say "the module builds for Linux $release, with -Wall -Werror W=1"
done

cargo build -q --locked -p rdsock-model-server -p rdsockd -p rdsock -p sockshim -p rdsock-tests --bins --lib
model=$TARGET/debug/rdsock-model
# Linked statically, since the machine has no libraries. The target is named so that what runs here is not.
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
    cargo build -q --locked --target x86_64-unknown-linux-gnu -p rdsock-vm-driver -p rdsock-vfio \
    --bin rdsock-vm-driver --example edu
static=$TARGET/x86_64-unknown-linux-gnu/debug
[ -x "$model" ]

# The guest: busybox, modules, programs linked statically, and (a shim needs them) some that are not, with their libraries.
say "building the guest"
linux=$CACHE/linux-$KERNEL
release=$(cat "$linux/release")
root=$work/root
mkdir -p "$root"/{bin,dev,etc,proc,sys,modules,suites,tmp,usr/bin}
cp "$CACHE/busybox" "$root/bin"
cp $VM/guest/init "$root/init"
cp $VM/guest/suites/* "$root/suites"
for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci inet_diag tcp_diag; do
    found=$(find "$linux/" -name "$module.ko*" -print -quit)
    case $found in
        *.xz) "$CACHE/busybox" unxz -c "$found" >"$root/modules/$module.ko" ;;
        *.ko) cp "$found" "$root/modules/$module.ko" ;;
        *) echo "Linux $release has no module $module"; exit 1 ;;
    esac
done
strip -o "$root/bin/driver" "$static/rdsock-vm-driver"
strip -o "$root/bin/edu" "$static/examples/edu"
strip -g -o "$root/modules/rdsock-vfio.ko" "$CACHE/module-$KERNEL/rdsock-vfio.ko"
"${CC:-gcc}" -static -O1 -D_GNU_SOURCE -Wall -Wextra -Wno-unused-result -o "$root/bin/attacker" $VM/guest/attacker.c
# Copies a file to its place in the guest, and the libraries that it needs to theirs.
pack() {
    cp -L "$1" "$root/usr/bin/"
    ldd "$1" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -Lu "$library" "$root$library"
    done
}
for program in redis-server redis-cli redis-benchmark iperf3 setpriv; do
    command -v $program >/dev/null || tests/setup.sh
    pack "$(command -v $program)"
done
for file in rdsockd rdsock rdsock-test-pump librdsock.so; do
    strip -g -o "$work/$file" "$TARGET/debug/$file"
    pack "$work/$file"
done
(cd "$root" && find . | "$CACHE/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$work/guest.gz"

# QEMU runs with the libraries that it came with, by their own loader.
libraries=$CACHE/qemu/usr/lib/x86_64-linux-gnu
qemu() {
    "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/pulseaudio" \
        "$CACHE/qemu/usr/bin/qemu-system-x86_64" -L "$CACHE/qemu/usr/share/seabios" -L "$CACHE/qemu/usr/share/qemu" "$@"
}

# An rde, on a socket of the model: rde ID ADDRESS [more]
rde() {
    printf '{"driver":"vfio-user-pci","id":"%s","bus":"pcie.0","addr":"%s"%s,"socket":{"type":"unix","path":"%s"}}' \
        "$1" "$2" "${3:-}" "$work/$1.sock"
}

# Boots a suite. The kernel does not check whether its timer ticks: on a busy host it seems not to.
boot() {
    local suite=$1 iommu=(-device intel-iommu,intremap=on,caching-mode=on) accel=(-accel tcg,thread=multi -cpu max)
    [ -z "${RDSOCK_VM_KVM:-}" ] || accel=(-accel kvm -cpu host)
    case $suite in
        no_remapping) iommu=(-device intel-iommu,intremap=off,caching-mode=on) ;;
        no_iommu) iommu=() ;;
    esac
    local split=()
    [ "$suite" != no_iommu ] && split=(-machine kernel-irqchip=split)
    rm -f "$work"/*.sock
    "$model" --node 1="$work/a.sock" --node 2="$work/b.sock" --node 3="$work/c.sock" --stats >"$work/model.$suite" 2>&1 &
    local server=$!
    servers+=("$server")
    for _ in $(seq 100); do [ -S "$work/c.sock" ] && break; sleep 0.1; done
    timeout "$LIMIT" bash -c "$(declare -f qemu); libraries=$libraries CACHE=$CACHE; qemu \"\$@\"" qemu \
        "${accel[@]}" -machine q35,memory-backend=mem "${split[@]}" \
        -object memory-backend-memfd,id=mem,size=768M,share=on -m 768 -smp 2 -nodefaults -no-user-config -display none \
        -serial stdio -no-reboot "${iommu[@]}" \
        -device "$(rde a 0x10.0)" -device "$(rde b 0x11.0)" \
        -device "$(rde c 0x12.0 ',"multifunction":true')" -device edu,addr=0x12.1 \
        -device edu,addr=0x13.0 -device igb,addr=0x4.0 \
        -kernel "$linux/boot/vmlinuz-$release" -initrd "$work/guest.gz" \
        -append "console=ttyS0 intel_iommu=on iommu=nopt no_timer_check panic=-1 quiet suite=$suite" \
        </dev/null >"$work/serial" 2>&1 || true
    tr -d '\r' <"$work/serial" >"$work/$suite.log"
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
}

# What the models counted in the suite "programs": the bytes went through them, with no fault, and no register was read
# or doorbell rung more often than once for each descriptor.
counted() {
    awk -F'[:,{}]' '/^\{"bytes_read"/ {
        for (i = 2; i < NF; i += 2) { gsub(/"/, "", $i); n[$i] = $(i + 1) }
        if (n["node"] > 2) next
        nodes++
        if (n["bytes_written"] < 8 * 1048576 || n["dma_faults"] || n["refused_here"] || n["doorbells"] > n["descriptors"])
            wrong = wrong " " $0
    } END { print nodes == 2 && wrong == "" ? "ok" : "FAILED: " wrong }' "$1"
}

passed=0 failed=0
for suite in ${SUITES[*]}; do
    say "booting suite $suite on Linux $release"
    boot "$suite"
    [ "$suite" != programs ] ||
        echo "TEST the_models_have_moved_the_bytes $(counted "$work/model.$suite")" >>"$work/$suite.log"
    grep -aE '^(TEST|suite|devices)' "$work/$suite.log" || true
    wanted=$(awk -v suite="$suite" '$1 == suite { print $2 }' $VM/expected.txt)
    [ -n "$wanted" ] || { echo "expected.txt has no tests of suite $suite"; exit 1; }
    bad=0
    for name in $wanted; do
        if grep -aqx "TEST $name ok" "$work/$suite.log" &&
            ! grep -aq "TEST $name FAILED" "$work/$suite.log"; then
            passed=$((passed + 1))
        else
            echo "FAILED: $suite: $name"
            bad=$((bad + 1))
        fi
    done
    # A test that is not in the list would not be missed if it went.
    for name in $(awk '$1 == "TEST" { print $2 }' "$work/$suite.log" | sort -u); do
        [[ " ${wanted//$'\n'/ } " == *" $name "* ]] || { echo "FAILED: $suite: $name is not in expected.txt"; bad=$((bad + 1)); }
    done
    grep -aq "RESULT of suite $suite" "$work/$suite.log" || { echo "FAILED: $suite did not come to its end"; bad=$((bad + 1)); }
    if [ "$bad" != 0 ] || [ -n "${RDSOCK_VM_VERBOSE:-}" ]; then
        echo "--- what the machine printed in suite $suite:"
        cat "$work/$suite.log"
        echo "--- what the model printed:"
        cat "$work/model.$suite"
    fi
    failed=$((failed + bad))
done
say "done"
result=ok
[ "$failed" = 0 ] || result=FAILED
echo "test result: $result. $passed passed; $failed failed;"
[ "$failed" = 0 ]
