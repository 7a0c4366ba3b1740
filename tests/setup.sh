#!/bin/sh
# Installs what the tests need: the real programs that are run on rings, C compilers (one for musl), valgrind, systemd-analyze.
# As root on Debian or Ubuntu it installs what is missing; elsewhere it names it and fails.
# Quick when all is there, and safe to run again. Starts no service and leaves none enabled that was not there.
set -eu

# command:package. nginx is handled below, since its package has two names, and postgres, which Debian keeps
# in a folder for each version.
NEEDED="redis-server:redis-server redis-cli:redis-tools redis-benchmark:redis-tools nginx:nginx wrk:wrk curl:curl
ab:apache2-utils mariadbd:mariadb-server mariadb-install-db:mariadb-server mariadb-slap:mariadb-client
iperf3:iperf3 sockperf:sockperf socat:socat nm:binutils python3:python3 ip:iproute2 gcc:gcc make:make valgrind:valgrind
sshd:openssh-server ssh:openssh-client sftp:openssh-client ssh-keygen:openssh-client setpriv:util-linux
systemd-analyze:systemd musl-gcc:musl-tools"

PATH=$PATH:/usr/sbin:/sbin

# Words that are missing, each once.
missing() {
    for pair in $NEEDED; do
        command -v "${pair%%:*}" >/dev/null 2>&1 || echo "${pair##*:}"
    done | sort -u
    for program in initdb postgres psql pgbench; do
        ls /usr/lib/postgresql/*/bin/$program >/dev/null 2>&1 || { echo postgresql; break; }
    done
    # Part of the conformance tests is linked statically.
    if command -v gcc >/dev/null 2>&1; then
        case $(gcc -print-file-name=libc.a) in /*) ;; *) echo libc6-dev ;; esac
    else
        echo libc6-dev
    fi
}

packages=$(missing)
if [ -z "$packages" ]; then
    echo "tests/setup.sh: everything that the tests need is installed"
    exit 0
fi
# One line, for messages and for apt.
packages=$(echo $packages)

if ! command -v apt-get >/dev/null 2>&1; then
    echo "tests/setup.sh: missing, and there is no apt to install it with: $packages" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/setup.sh: missing: $packages" >&2
    echo "tests/setup.sh: run this as root, or: sudo apt-get install $packages" >&2
    exit 1
fi

# Packages of servers start them; while this file says 101 they do not.
policy=/usr/sbin/policy-rc.d
ours=no
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    ours=yes
fi
trap '[ "$ours" = no ] || rm -f "$policy"' EXIT
trap 'exit 130' INT TERM

echo "tests/setup.sh: installing $packages"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
chosen=
for package in $packages; do
    if [ "$package" = nginx ] && apt-cache show nginx-light >/dev/null 2>&1; then
        package=nginx-light
    fi
    chosen="$chosen $package"
done
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $chosen >/dev/null

# Installed by us, so not wanted as services at the next start of the machine either.
if command -v systemctl >/dev/null 2>&1; then
    for package in $packages; do
        case $package in
            redis-server | nginx | postgresql) systemctl disable --now "$package" >/dev/null 2>&1 || true ;;
            mariadb-server) systemctl disable --now mariadb >/dev/null 2>&1 || true ;;
            openssh-server) systemctl disable --now ssh ssh.socket >/dev/null 2>&1 || true ;;
        esac
    done
fi

packages=$(missing)
if [ -n "$packages" ]; then
    echo "tests/setup.sh: still missing after apt-get install: $(echo $packages)" >&2
    exit 1
fi
echo "tests/setup.sh: done"
