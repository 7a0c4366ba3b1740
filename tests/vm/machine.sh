# A virtual machine with rde devices, for run.sh. Wants: CACHE (fetch.sh's), KERNEL, MODEL (the program rdsock-model), work (a
# folder), LIMIT (seconds that a machine may take).

# QEMU runs with the libraries that it came with, by their own loader.
libraries=$CACHE/qemu/usr/lib/x86_64-linux-gnu
QEMU=(timeout "$LIMIT" "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/pulseaudio"
    "$CACHE/qemu/usr/bin/qemu-system-x86_64" -L "$CACHE/qemu/usr/share/seabios" -L "$CACHE/qemu/usr/share/qemu")

# What is different in a suite: its guests (one that has no name, else by name), how the model serves, the IOMMU.
guests_of() { case $1 in programs) echo servers clients ;; *) echo guest ;; esac; }
serving_of() { case $1 in trapped) echo --trapped ;; esac; }
# Each of two guests has one processor, as the host has few.
cpus_of() { case $1 in guest) echo 2 ;; *) echo 1 ;; esac; }
iommu_of() {
    case $1 in
        no_iommu) ;;
        no_remapping) echo -device intel-iommu,intremap=off,caching-mode=on ;;
        *) echo -device intel-iommu,intremap=on,caching-mode=on ;;
    esac
}

# An rde on a socket of the model: rde NAME ADDRESS [MORE]
rde() {
    printf '{"driver":"vfio-user-pci","id":"%s","bus":"pcie.0","addr":"%s"%s,"socket":{"type":"unix","path":"%s"}}' \
        "$1" "$2" "${3:-}" "$folder/$1.sock"
}

# What is plugged into a guest: three functions of the model and two of QEMU's, or in one of two guests its function and a
# network between them.
devices_of() {
    case $1 in
        guest)
            printf '%s\n' -device "$(rde a 0x10.0)" -device "$(rde b 0x11.0)" \
                -device "$(rde c 0x12.0 ',"multifunction":true')" -device edu,addr=0x12.1 \
                -device edu,addr=0x13.0 -device igb,addr=0x4.0
            ;;
        servers)
            printf '%s\n' -device "$(rde a 0x10.0)" -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:01 \
                -netdev "stream,id=net,server=on,addr.type=unix,addr.path=$folder/net.sock"
            ;;
        clients)
            printf '%s\n' -device "$(rde b 0x10.0)" -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:02 \
                -netdev "stream,id=net,server=off,reconnect-ms=500,addr.type=unix,addr.path=$folder/net.sock"
            ;;
    esac
}

# What a guest asks of its host: to have the model print what it has counted, or take the devices away, as if they
# were pulled out; and to have read its result. Each request is answered by a line.
serve_guest() {
    while IFS= read -r line; do
        line=${line%$'\r'}
        printf '%s\n' "$line"
        case $line in
            "HOST count") kill -USR1 "$model"; echo counted >&3 ;;
            "HOST pull the devices out") kill -USR2 "$model"; echo pulled >&3 ;;
            "RESULT of "*) echo read >&3 ;;
        esac
    done
}

# Runs one guest of a suite until it ends. The kernel does not check whether its timer ticks: on a busy host it seems not to.
guest() {
    local suite=$1 name=$2 accel=(-accel tcg,thread=multi -cpu max) split=() iommu devices
    [ -z "${RDSOCK_VM_KVM:-}" ] || accel=(-accel kvm -cpu host)
    read -ra iommu < <(iommu_of "$suite") || true
    [ ${#iommu[@]} = 0 ] || split=(-machine kernel-irqchip=split)
    mapfile -t devices < <(devices_of "$name")
    cat "$work/guest.gz" >"$folder/$name.gz"
    [ "$suite" != iommufd ] || cat "$work/iommufd.gz" >>"$folder/$name.gz"
    mkfifo "$folder/$name.in"
    exec 3<>"$folder/$name.in"
    "${QEMU[@]}" "${accel[@]}" -machine q35,memory-backend=mem "${split[@]}" \
        -object memory-backend-memfd,id=mem,size=768M,share=on -m 768 -smp "$(cpus_of "$name")" -nodefaults -no-user-config -display none \
        -serial stdio -no-reboot "${iommu[@]}" "${devices[@]}" \
        -kernel "$CACHE"/linux-$KERNEL/boot/vmlinuz-* -initrd "$folder/$name.gz" \
        -append "console=ttyS0 intel_iommu=on iommu=nopt no_timer_check panic=-1 quiet suite=$suite guest=$name" \
        <&3 2>"$folder/$name.qemu" | serve_guest >"$folder/$name.log" || true
}

# Boots the guests of a suite, with a model of their devices. What they print comes to $work/SUITE/GUEST.log.
boot() {
    local suite=$1 name guests=()
    folder=$work/$suite
    mkdir "$folder"
    "$MODEL" --node 1="$folder/a.sock" --node 2="$folder/b.sock" --node 3="$folder/c.sock" --stats \
        $(serving_of "$suite") >"$folder/model.out" 2>&1 &
    model=$!
    for _ in $(seq 100); do [ -S "$folder/c.sock" ] && break; sleep 0.1; done
    for name in $(guests_of "$suite"); do
        guest "$suite" "$name" &
        guests+=($!)
    done
    wait "${guests[@]}"
    kill "$model" 2>/dev/null || true
    wait "$model" 2>/dev/null || true
}
