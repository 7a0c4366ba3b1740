#!/usr/bin/env bash
# Shows what rdsock does, on this machine, in three minutes: make demo
#
# Builds everything, measures rdsock beside kernel TCP, and runs two real programs without and with
# the shim. Needs no root, no huge pages, no configuration. It runs a daemon of its own on a socket
# of its own, chooses free ports, and ends what it started, and nothing else.
#
#   RDSOCK_BIN_DIR    use these programs instead of building
#   DEMO_DIR          where to leave figures and pictures [target/demo]
#   DEMO_SECONDS      seconds of each single measurement [0.5]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

DIR=${DEMO_DIR:-${CARGO_TARGET_DIR:-target}/demo}
SECONDS_EACH=${DEMO_SECONDS:-0.5}
BIN=${RDSOCK_BIN_DIR:-}

say() { printf '%s\n' "$*"; }
head_line() { printf '\n--- %s\n\n' "$*"; }
fail() {
    say "demo: $*" >&2
    exit 1
}

# --- What was started is ended by its number, whatever happens.

started=()
temp=$(mktemp -d) || exit 1

end_all() {
    local pid
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null; done
    rm -rf "$temp"
}
trap end_all EXIT
trap 'exit 130' INT TERM HUP

# start LOG COMMAND...: in the background; its number is in $pid.
start() {
    local log=$1
    shift
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    started+=("$pid")
}

end() {
    kill "$1" 2>/dev/null
    wait "$1" 2>/dev/null
}

is_free() {
    local hex
    hex=$(printf ':%04X ' "$1")
    ! grep -qs "$hex" /proc/net/tcp /proc/net/tcp6
}

# Sets $port.
free_port() {
    for _ in {1..200}; do
        port=$((20000 + RANDOM % 12000))
        is_free "$port" && return
    done
    fail "no free port"
}

# Waits until somebody listens; fails when the server ends before.
wait_for_port() {
    local hex
    hex=$(printf ':%04X 0\\+:0000 0A' "$2")
    for _ in {1..200}; do
        grep -qs "$hex" /proc/net/tcp /proc/net/tcp6 && return
        kill -0 "$1" 2>/dev/null || return
        sleep 0.05
    done
    return 1
}

# serve LOG COMMAND...: starts a server, with @ standing for its port; sets $pid and $port.
serve() {
    local log=$1
    shift
    free_port
    start "$log" "${@//@/$port}"
    wait_for_port "$pid" "$port" || fail "$1 did not start: $(tail -n 3 "$log")"
}

missing() { ! command -v "$1" >/dev/null 2>&1; }

# --- Build

if [ -z "$BIN" ]; then
    missing cargo && fail "cargo is missing: install Rust (https://rustup.rs) and a C compiler (apt install gcc)"
    missing cc && fail "a C compiler is missing: apt install gcc"
    head_line "Building (some minutes the first time)"
    cargo build --release --workspace || fail "the build failed"
    BIN=${CARGO_TARGET_DIR:-target}/release
fi
BIN=$(cd "$BIN" && pwd) || exit 1
PATH=$BIN:$PATH
mkdir -p "$DIR" && DIR=$(cd "$DIR" && pwd) || exit 1

# --- A daemon, as `rdsock run` would start one. It would end by itself if this script were killed.

export RDSOCK_SOCKET=$temp/rdsockd.sock
start "$DIR/rdsockd.log" rdsockd --socket "$RDSOCK_SOCKET" --idle-exit 30
daemon=$pid
for _ in {1..100}; do
    [ -S "$RDSOCK_SOCKET" ] && break
    kill -0 "$daemon" 2>/dev/null || fail "rdsockd did not start: $(tail -n 3 "$DIR/rdsockd.log")"
    sleep 0.05
done
unset RDSOCK_DISABLE RDSOCK_SPIN_US

faults=0
fault() {
    faults=$((faults + 1))
    say "NOT AS IT SHOULD BE: $*"
}

# --- 1. Side by side

head_line "1. Kernel TCP, UNIX sockets, bare hardware and rdsock, on one node and between two, measured in turns ($(nproc) cores)"
awk -v cores="$(nproc)" '$1 > cores / 2 {
    print "Other programs are busy here (load " $1 "): figures will be worse than they could be.\n" }' /proc/loadavg
compare=(rdsock-perf compare --seconds "$SECONDS_EACH" --rounds 1
    --json "$DIR/compare.json" --svg "$DIR/latency.svg")
say "\$ ${compare[*]}"
"${compare[@]}" &
started+=($!)
wait $! || fault "the comparison ended with status $?"

# --- 2. Real programs

table=
# row WHAT BEFORE AFTER UNIT BETTER: one line of the table; BETTER is less or more.
row() {
    local factor
    factor=$(awk -v a="$2" -v b="$3" -v better="$5" 'BEGIN {
        if (a <= 0 || b <= 0) print "?"; else printf "%.1f", better == "less" ? a / b : b / a }')
    table+=$(printf '  %-46s %10s %10s %-9s %6s x' "$1" "$2" "$3" "$4" "$factor")$'\n'
}

# Asks whether a process has a connection on rings now; notes what was said of it.
on_rings() {
    timeout 10 rdsock why "$1" --json 2>/dev/null | grep -q '"accelerated": *true' || return
    if [ ! -s "$temp/why" ]; then
        timeout 10 rdsock why "$1" >"$temp/answer" 2>&1
        # It may have ended between the two questions.
        grep -q ' yes' "$temp/answer" && mv "$temp/answer" "$temp/why"
    fi
    return 0
}

# During a load: waits until it is on rings, at most 3 s.
see_rings() {
    for _ in {1..30}; do
        on_rings "$1" && return
        sleep 0.1
    done
    fault "$2: rdsock why saw no connection on rings: $(timeout 10 rdsock why "$1" 2>&1 | tail -n 3)"
}

redis_once() {
    local requests=$1 server csv
    shift
    serve "$temp/redis.log" "$@" redis-server --port @ --bind 127.0.0.1 --save '' --appendonly no --dir "$temp"
    server=$pid
    start "$temp/redis.csv" timeout 60 "$@" redis-benchmark -h 127.0.0.1 -p "$port" -c 1 -n "$requests" -t get --csv
    [ $# -eq 0 ] || see_rings "$server" redis
    wait "$pid" || fault "redis-benchmark failed: $(tail -n 1 "$temp/redis.csv")"
    end "$server"
    # "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms",...
    csv=$(grep '^"GET"' "$temp/redis.csv" | tr -d '"')
    per_second=$(cut -d, -f2 <<<"$csv")
    p50=$(cut -d, -f5 <<<"$csv" | awk '$1 != "" { print $1 * 1000 }')
}

redis() {
    local plain_p50 plain_rate
    redis_once 20000
    plain_p50=$p50 plain_rate=$per_second
    redis_once 200000 rdsock run --
    [ -z "$p50" ] || row "redis GET, one client, p50" "$plain_p50" "$p50" us less
    row "redis GET, one client" "${plain_rate%.*}" "${per_second%.*}" per_s more
}

iperf_once() {
    local server
    serve "$temp/iperf-server.log" "$@" iperf3 -s -1 -p @
    server=$pid
    start "$temp/iperf.log" timeout 60 "$@" iperf3 -c 127.0.0.1 -p "$port" -t 3 -f g
    [ $# -eq 0 ] || see_rings "$server" iperf3
    wait "$pid" || fault "iperf3 failed: $(tail -n 1 "$temp/iperf.log")"
    end "$server"
    gigabits=$(awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i ~ /bits\/sec/) print $(i - 1) }' "$temp/iperf.log")
}

iperf() {
    local plain
    iperf_once
    plain=$gigabits
    iperf_once rdsock run --
    row "iperf3, one stream" "$plain" "$gigabits" Gbit/s more
}

# An echo server and a client that prints the median of its round trips, in microseconds.
echo_program() {
    cat <<'PYTHON'
import socket, sys, time
role, port = sys.argv[1], int(sys.argv[2])
if role == "serve":
    listener = socket.create_server(("127.0.0.1", port))
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := peer.recv(65536):
        peer.sendall(data)
else:
    peer = socket.create_connection(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times, message, end = [], b"x" * 64, time.monotonic() + 3
    while time.monotonic() < end:
        begin = time.perf_counter_ns()
        peer.sendall(message)
        peer.recv(65536)
        times.append(time.perf_counter_ns() - begin)
    print(sorted(times)[len(times) // 2] / 1000)
PYTHON
}

python_once() {
    local server
    serve "$temp/echo-server.log" "$@" python3 "$temp/echo.py" serve @
    server=$pid
    start "$temp/echo.log" timeout 60 "$@" python3 "$temp/echo.py" ask "$port"
    [ $# -eq 0 ] || see_rings "$server" "python3 echo"
    wait "$pid" || fault "the python3 client failed: $(tail -n 1 "$temp/echo.log")"
    end "$server"
    p50=$(tail -n 1 "$temp/echo.log")
}

python_echo() {
    local plain
    echo_program >"$temp/echo.py"
    python_once
    plain=$p50
    python_once rdsock run --
    row "python3 echo, 64 bytes, p50" "$plain" "$p50" us less
}

head_line "2. Real programs, unmodified, without and with rdsock"
left_out=()
programs=0
run_program() { # NAME FUNCTION COMMAND...
    local name=$1 function=$2 command
    shift 2
    for command; do
        if missing "$command"; then
            left_out+=("$name (apt install $(package_of "$command"))")
            return
        fi
    done
    say "  $name ..."
    programs=$((programs + 1))
    "$function"
}
package_of() {
    case $1 in
        redis-server) echo redis-server ;;
        redis-*) echo redis-tools ;;
        *) echo "$1" ;;
    esac
}
PATH=$PATH:/usr/sbin:/sbin
run_program redis redis redis-server redis-benchmark
run_program iperf3 iperf iperf3
[ "$programs" -ge 2 ] || run_program "python3 echo" python_echo python3

if [ -n "$table" ]; then
    printf '\n  %-46s %10s %10s %-9s %6s\n' "" "kernel TCP" rdsock "" better
    printf '%s' "$table"
fi
[ ${#left_out[@]} -eq 0 ] || printf '  left out, not installed: %s\n' "${left_out[@]}"
if [ -s "$temp/why" ]; then
    printf '\n  While it ran, "rdsock why PID" said of the server:\n\n'
    sed 's/^/    /' "$temp/why"
fi

head_line "What to look at"
cat <<END
- The first table: rdsock-local beside tcp-loopback in the same way of waiting ("x tcp"), and how
  near it comes to bare hardware (floor-cacheline, floor-ring).
- The second: rdsock-nodes, two nodes with a model of the device each, beside a virtual Ethernet
  (tcp-veth, as root) and the bare engine (floor-engine).
- Latency distributions: $DIR/latency.svg
- All figures:           $DIR/compare.json
- The daemon's log:      $DIR/rdsockd.log

Your own programs: start both ends with it, and ask what became of their connections:

    rdsock run -- SERVER ...
    rdsock run -- CLIENT ...
    rdsock why --all
END
missing rdsock || case $(command -v rdsock) in
    "$BIN"/*) say "" && say "(rdsock is in $BIN; make install puts it into your path.)" ;;
esac
if [ "$faults" -ne 0 ]; then
    say "" && say "$faults things were not as they should be; they are named above."
    exit 1
fi
