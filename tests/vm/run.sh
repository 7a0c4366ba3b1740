#!/bin/bash
# The true VFIO path in a virtual machine: make vm-test, or tests/vm/run.sh [SUITE…]
#
# Fetches QEMU and a stock kernel into target/vm (see fetch.sh), builds the kernel module, the model and the guest's
# programs, boots each suite of guest/suites by software emulation, and checks what came back against expected.txt: a test that
# was not run has failed. Needs no root (but to install the programs that go into the guest) and no KVM. RDSOCK_VM_KVM=1 uses KVM.
set -euo pipefail
cd "$(dirname "$0")/../.."
TARGET=${CARGO_TARGET_DIR:-target}
mkdir -p "$TARGET/vm"
TARGET=$(cd "$TARGET" && pwd)
CACHE=$TARGET/vm
export KERNEL=6.12
VM=tests/vm
MODEL=$TARGET/debug/rdsock-model
SUITES=("$@")
[ $# != 0 ] || SUITES=(trapped module driver no_remapping no_iommu iommufd programs)
# A machine takes a minute or two; a busy host needs more.
LIMIT=${RDSOCK_VM_LIMIT:-600}
# Suites that run at a time. Where programs of two machines are at work, these have the host for themselves.
LANES=${RDSOCK_VM_LANES:-2}
lanes_of() { case $1 in programs) echo 1 ;; *) echo "$LANES" ;; esac; }
started=$SECONDS

say() { echo "vm-test ($((SECONDS - started)) s): $*"; }

work=$(mktemp -d)
finish() {
    local running
    mapfile -t running < <(jobs -rp)
    [ ${#running[@]} = 0 ] || kill "${running[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

# Fetching waits for the network, building for the processor.
$VM/fetch.sh "$CACHE" >"$work/fetch.log" 2>&1 &
fetching=$!
for program in redis-server redis-cli iperf3 sockperf nginx curl setpriv gcc make; do
    PATH=$PATH:/usr/sbin:/sbin command -v $program >/dev/null || { tests/setup.sh; break; }
done
cargo build -q --locked -p rdsock-model-server -p rdsockd -p rdsock -p sockshim -p rdsock-vm-driver -p rdsock-vfio -p rdsock-tests \
    --lib --bin rdsock-model --bin rdsockd --bin rdsock --bin rdsock-vm-driver --bin rdsock-test-pump --example edu
say "built the programs"
status=0
wait "$fetching" || status=$?
cat "$work/fetch.log"
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
$VM/image.sh "$CACHE" "$TARGET" "$work/guest.gz"
say "built the guest"

. $VM/machine.sh
. $VM/counted.sh

# Boots a suite, and prints what came of it; the last line is for below.
run() {
    local suite=$1 passed=0 failed=0 name wanted
    boot "$suite" 2>"$work/$suite.err"
    folder=$work/$suite
    case $suite in
        programs) moved "$folder/model.out" >"$folder/host.log" ;;
        trapped) costs "$folder/model.out" "$folder/guest.log" >"$folder/host.log" ;;
    esac
    grep -ahE '^(TEST|suite|devices)' "$folder"/*.log || true
    wanted=$(awk -v suite="$suite" '$1 == suite { print $2 }' $VM/expected.txt)
    [ -n "$wanted" ] || { echo "FAILED: expected.txt has no tests of suite $suite"; failed=1; }
    for name in $wanted; do
        if grep -ahqx "TEST $name ok" "$folder"/*.log && ! grep -ahq "TEST $name FAILED" "$folder"/*.log; then
            passed=$((passed + 1))
        else
            echo "FAILED: $suite: $name"
            failed=$((failed + 1))
        fi
    done
    # A test that is not in the list would not be missed if it went.
    for name in $(awk '$1 == "TEST" { print $2 }' "$folder"/*.log | sort -u); do
        [[ " ${wanted//$'\n'/ } " == *" $name "* ]] || { echo "FAILED: $suite: $name is not in expected.txt"; failed=$((failed + 1)); }
    done
    for name in $(guests_of "$suite"); do
        grep -aq "RESULT of suite $suite" "$folder/$name.log" || { echo "FAILED: $suite: $name did not come to its end"; failed=$((failed + 1)); }
    done
    if [ "$failed" != 0 ] || [ -n "${RDSOCK_VM_VERBOSE:-}" ]; then
        [ "$suite" != iommufd ] || cat "$work/iommufd.log"
        for name in "$work/$suite.err" "$folder"/*.{log,qemu,out}; do
            echo "--- what ${name##*/} of suite $suite says:"
            head -n 1000 "$name"
        done
    fi
    echo "suite $suite: $passed $failed"
}

# The suite "iommufd" has its own modules; building them takes as long as a suite.
case " ${SUITES[*]} " in
    *" iommufd "*) $VM/iommufd.sh "$CACHE" "$work/iommufd.gz" >"$work/iommufd.log" 2>&1 & ;;
esac
lanes=$LANES
for suite in "${SUITES[@]}"; do
    needed=$(lanes_of "$suite")
    [ "$suite" != iommufd ] || while [ ! -e "$work/iommufd.gz" ] && [ -n "$(jobs -rp)" ]; do wait -n || true; done
    while [ "$(jobs -rp | wc -l)" -ge "$((needed < lanes ? needed : lanes))" ]; do wait -n || true; done
    lanes=$needed
    say "booting suite $suite"
    run "$suite" >"$work/$suite.result" 2>&1 &
done
wait
passed=0 failed=0
for suite in "${SUITES[@]}"; do
    cat "$work/$suite.result"
    read -r good bad < <(sed -n "s/^suite $suite: //p" "$work/$suite.result") || { good=0 bad=1; echo "FAILED: $suite was not run"; }
    passed=$((passed + good)) failed=$((failed + bad))
done
say "done"
result=ok
[ "$failed" = 0 ] || { result=FAILED; grep -ah '^FAILED' "$work"/*.result || true; }
echo "test result: $result. $passed passed; $failed failed;"
[ "$failed" = 0 ]
