/*
 * Connections, the puppet at their other end, and the small tools that the cases share.
 */
#include "sockconf.h"

#define MAX_LINKS 600
#define PING 64

struct peer {
    int ctl; /* a UNIX stream: orders one way, results the other */
    pid_t pid;
    pthread_t thread;
    int links; /* connections opened so far */
};

struct order {
    order_fn fn;
    int at;
    long arg;
    size_t len;
};

/* ---- The puppet ---- */

static bool ctl_move(int fd, void *bytes, size_t len, bool out)
{
    char *at = bytes;
    while (len) {
        ssize_t n = out ? send(fd, at, len, MSG_NOSIGNAL) : recv(fd, at, len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        len -= (size_t)n;
    }
    return true;
}

static void *puppet(void *arg)
{
    int ctl = (int)(intptr_t)arg;
    int fds[MAX_LINKS];
    for (int i = 0; i < MAX_LINKS; i++)
        fds[i] = -1;
    struct order order;
    while (ctl_move(ctl, &order, sizeof order, false)) {
        char *bytes = order.len ? malloc(order.len) : NULL;
        if (order.len && !ctl_move(ctl, bytes, order.len, false))
            break;
        long result = order.fn(&fds[order.at], bytes, order.len, order.arg);
        free(bytes);
        if (!ctl_move(ctl, &result, sizeof result, true))
            break;
    }
    return NULL;
}

static struct peer *peer_start(void)
{
    struct peer *peer = calloc(1, sizeof *peer);
    int ends[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    peer->ctl = ends[0];
    if (settings.thread_peer) {
        sigset_t all, old;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        EQ(pthread_create(&peer->thread, NULL, puppet, (void *)(intptr_t)ends[1]), 0);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        return peer;
    }
    peer->pid = (pid_t)MUST(fork());
    if (peer->pid == 0) {
        close(ends[0]);
        puppet((void *)(intptr_t)ends[1]);
        _exit(0);
    }
    close(ends[1]);
    return peer;
}

static void p_begin(const struct duo *d, order_fn fn, const void *bytes, size_t len, long arg)
{
    struct order order = {fn, d->at, arg, len};
    CHECK(ctl_move(d->peer->ctl, &order, sizeof order, true), "expected a puppet that takes orders, saw it gone");
    if (len)
        CHECK(ctl_move(d->peer->ctl, (void *)bytes, len, true), "expected a puppet, saw it gone");
}

void p_start(const struct duo *d, order_fn fn, long arg) { p_begin(d, fn, NULL, 0, arg); }

long p_finish(const struct duo *d)
{
    long result;
    if (!ctl_move(d->peer->ctl, &result, sizeof result, false))
        fail(HERE, "expected the puppet's answer, saw it gone");
    return result;
}

long p_give(const struct duo *d, order_fn fn, const void *bytes, size_t len, long arg)
{
    p_begin(d, fn, bytes, len, arg);
    return p_finish(d);
}

long p_do(const struct duo *d, order_fn fn, long arg) { return p_give(d, fn, NULL, 0, arg); }

pid_t peer_pid(const struct duo *d) { return d->peer->pid; }

void peer_kill(const struct duo *d)
{
    MUST(kill(d->peer->pid, SIGKILL));
    MUST(waitpid(d->peer->pid, NULL, 0));
}

/* ---- Opening a connection ---- */

static socklen_t loopback(int flags, struct sockaddr_storage *at)
{
    memset(at, 0, sizeof *at);
    if (flags & (V6 | MAPPED)) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)at;
        six->sin6_family = AF_INET6;
        inet_pton(AF_INET6, flags & MAPPED ? "::ffff:127.0.0.1" : "::1", &six->sin6_addr);
        return sizeof *six;
    }
    struct sockaddr_in *four = (struct sockaddr_in *)at;
    four->sin_family = AF_INET;
    four->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return sizeof *four;
}

int listen_on(int flags, struct sockaddr_storage *at, socklen_t *len)
{
    *len = loopback(flags, at);
    int fd = (int)MUST(socket(at->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    MUST(bind(fd, (struct sockaddr *)at, *len));
    MUST(listen(fd, 128));
    MUST(getsockname(fd, (struct sockaddr *)at, len));
    return fd;
}

static long do_connect(int *fd, void *bytes, size_t len, long unused)
{
    (void)unused;
    const struct sockaddr *at = bytes;
    *fd = (int)MUST(socket(at->sa_family, SOCK_STREAM, 0));
    MUST(connect(*fd, at, (socklen_t)len));
    return 0;
}

static long do_listen(int *fd, void *bytes, size_t len, long flags)
{
    (void)bytes, (void)len;
    struct sockaddr_storage at;
    socklen_t size;
    *fd = listen_on((int)flags, &at, &size);
    return ((struct sockaddr_in *)&at)->sin_port; /* sin6_port lies at the same place */
}

static long do_accept(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    int listener = *fd;
    *fd = (int)MUST(accept(listener, NULL, NULL));
    return close(listener);
}

static struct duo link_open(struct peer *peer, int flags)
{
    struct duo d = {.peer = peer, .at = peer->links++};
    CHECK(d.at < MAX_LINKS, "expected at most %d connections, saw more", MAX_LINKS);
    struct sockaddr_storage at;
    socklen_t len;
    if (settings.swap) {
        len = loopback(flags, &at);
        ((struct sockaddr_in *)&at)->sin_port = (in_port_t)p_do(&d, do_listen, flags);
        p_start(&d, do_accept, 0);
        d.fd = (int)MUST(socket(at.ss_family, SOCK_STREAM, 0));
        MUST(connect(d.fd, (struct sockaddr *)&at, len));
        p_finish(&d);
    } else {
        int listener = listen_on(flags, &at, &len);
        EQ(p_give(&d, do_connect, &at, len, 0), 0);
        d.fd = (int)MUST(accept(listener, NULL, NULL));
        close(listener);
    }
    if (!(flags & COLD))
        duo_warm(&d);
    if (flags & NONBLOCK)
        set_nonblock(d.fd, true);
    return d;
}

struct duo duo_open(int flags) { return link_open(peer_start(), flags); }
struct duo duo_prepare(void) { return (struct duo){.peer = peer_start(), .fd = -1, .at = 0}; }
struct duo duo_more(const struct duo *d, int flags) { return link_open(d->peer, flags); }

/* ---- Warming up ---- */

static long do_pong(int *fd, void *bytes, size_t len, long rounds)
{
    (void)len;
    int count = *(int *)bytes;
    char ping[PING];
    for (long round = 0; round < rounds; round++) {
        for (int i = 0; i < count; i++) {
            EQ(recv(fd[i], ping, sizeof ping, MSG_WAITALL), PING);
            EQ(send(fd[i], ping, sizeof ping, 0), PING);
        }
    }
    return 0;
}

static void ping_all(const struct duo *d, int count, int rounds, int pause_ms)
{
    char ping[PING], pong[PING];
    p_begin(d, do_pong, &count, sizeof count, rounds);
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < count; i++) {
            pattern(77, (uint64_t)(round * count + i), ping, sizeof ping);
            EQ(send(d[i].fd, ping, sizeof ping, 0), PING);
            EQ(recv(d[i].fd, pong, sizeof pong, MSG_WAITALL), PING);
            CHECK(!memcmp(ping, pong, PING), "expected the ping back, saw other bytes");
        }
        sleep_ms(pause_ms);
    }
    EQ(p_finish(d), 0);
}

/* A system call that no library sees; a negative errno on failure. */
long raw_call(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    register long x8 __asm__("x8") = number;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5), "r"(x8) : "memory");
    return x0;
#else
#error "say here how this machine makes a system call"
#endif
}

/* getsockopt(TCP_INFO), straight to the kernel: how many bytes the kernel socket itself has moved. */
uint64_t kernel_bytes(int fd)
{
    enum { bytes_received = 128 / 8, bytes_sent = 200 / 8 }; /* struct tcp_info of linux/tcp.h */
    uint64_t info[32] = {0};
    socklen_t len = sizeof info;
    long result = raw_call(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, (long)info, (long)&len, 0);
    CHECK(result == 0, "expected TCP_INFO from the kernel, saw error %ld", -result);
    return info[bytes_received] + info[bytes_sent];
}

void duo_warm_all(const struct duo *d, int count)
{
    if (settings.warm == 0)
        return;
    uint64_t *before = calloc((size_t)count, sizeof *before);
    int slow = count;
    for (int batch = 0; slow && batch < (settings.need_rings ? 50 : 1); batch++) {
        ping_all(d, count, settings.warm, 2);
        for (int i = 0; i < count; i++)
            before[i] = kernel_bytes(d[i].fd);
        ping_all(d, count, 1, 0);
        slow = 0;
        for (int i = 0; i < count; i++)
            slow += kernel_bytes(d[i].fd) - before[i] >= PING;
    }
    free(before);
    for (int i = 0; i < count; i++)
        count_pair(i >= slow);
    TIMELY(!slow || !settings.need_rings, "expected %d connections on rings after the warm-up, saw %d in the kernel",
           count, slow);
}

void duo_warm(const struct duo *d) { duo_warm_all(d, 1); }

/* ---- Orders ---- */

static long do_send(int *fd, void *bytes, size_t len, long unused)
{
    (void)unused;
    put(HERE, *fd, bytes, len);
    return 0;
}

void p_send(const struct duo *d, const char *text) { p_give(d, do_send, text, strlen(text), 0); }

static long do_want(int *fd, void *bytes, size_t len, long here)
{
    (void)len;
    want((const char *)here, *fd, bytes);
    return 0;
}

void p_want(const char *here, const struct duo *d, const char *text)
{
    step(here);
    p_give(d, do_want, text, strlen(text) + 1, (long)here);
}

static long do_want_end(int *fd, void *bytes, size_t len, long code)
{
    (void)len;
    char byte;
    const char *here = *(const char **)bytes;
    step(here);
    errno = 0;
    long got = recv(*fd, &byte, 1, 0);
    if (code)
        check_error(here, "the puppet's recv()", (int)code, (int)code, got, errno);
    else
        check_equal(here, "the puppet's recv()", 0, got, errno);
    return 0;
}

void p_want_end(const char *here, const struct duo *d, int code)
{
    step(here);
    p_give(d, do_want_end, &here, sizeof here, code);
}

static long do_shutdown(int *fd, void *bytes, size_t len, long how)
{
    (void)bytes, (void)len;
    return MUST(shutdown(*fd, (int)how));
}

void p_shutdown(const struct duo *d, int how) { p_do(d, do_shutdown, how); }

static long do_close(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    MUST(close(*fd));
    *fd = -1;
    return 0;
}

void p_close(const struct duo *d) { p_do(d, do_close, 0); }

static long do_reset(int *fd, void *bytes, size_t len, long unused)
{
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    MUST(setsockopt(*fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
    return do_close(fd, bytes, len, unused);
}

void p_reset(const struct duo *d) { p_do(d, do_reset, 0); }

long do_send_pattern(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    send_pattern(HERE, *fd, 0, (size_t)count);
    return 0;
}

long do_recv_pattern(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    recv_pattern(HERE, *fd, 0, (size_t)count);
    return 0;
}

long do_send_chunks(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    uint32_t state = 5;
    char chunk[5000];
    for (size_t done = 0; done < (size_t)count;) {
        size_t piece = 1 + dice(&state) % sizeof chunk;
        if (piece > (size_t)count - done)
            piece = (size_t)count - done;
        pattern(0, done, chunk, piece);
        put(HERE, *fd, chunk, piece);
        done += piece;
    }
    return 0;
}

long do_echo(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    char block[65536];
    long total = 0;
    for (ssize_t n; (n = recv(*fd, block, sizeof block, 0)) != 0; total += n) {
        CHECK(n > 0, "expected bytes to echo, saw %s", strerror(errno));
        put(HERE, *fd, block, (size_t)n);
    }
    MUST(shutdown(*fd, SHUT_WR));
    return total;
}

long do_send_later(int *fd, void *bytes, size_t len, long ms)
{
    (void)bytes, (void)len;
    sleep_ms((int)ms);
    PUT(*fd, "late");
    return 0;
}

long do_close_later(int *fd, void *bytes, size_t len, long ms)
{
    sleep_ms((int)ms);
    return do_close(fd, bytes, len, 0);
}

long do_shutdown_later(int *fd, void *bytes, size_t len, long ms)
{
    sleep_ms((int)ms);
    return do_shutdown(fd, bytes, len, SHUT_WR);
}

long do_discard(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    char block[65536];
    ssize_t n;
    while ((n = recv(*fd, block, sizeof block, 0)) > 0)
        ;
    return n ? -errno : 0;
}

/* ---- This end ---- */

void put(const char *here, int fd, const void *bytes, size_t len)
{
    const char *at = bytes;
    while (len) {
        step(here);
        ssize_t n = send(fd, at, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail(here, "expected to send %zu more bytes, saw %s", len, n ? strerror(errno) : "0");
        at += n;
        len -= (size_t)n;
    }
}

void want(const char *here, int fd, const char *text)
{
    char got[4096];
    size_t len = strlen(text), have = 0;
    while (have < len) {
        step(here);
        ssize_t n = recv(fd, got + have, len - have, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail(here, "expected \"%s\", saw \"%.*s\" and then %s", text, (int)have, got, n ? strerror(errno) : "EOF");
        have += (size_t)n;
    }
    if (memcmp(got, text, len))
        fail(here, "expected \"%s\", saw \"%.*s\"", text, (int)len, got);
}

int events_of(int fd, int events, int ms)
{
    struct pollfd one = {.fd = fd, .events = (short)events};
    int n = poll(&one, 1, ms);
    return n < 0 ? n : one.revents;
}

void await(const char *here, int fd, int events)
{
    int seen = events_of(fd, events, 10000);
    if ((seen & events) != events && !(seen & events))
        fail(here, "expected events %#x within 10 s, saw %#x", (unsigned)events, (unsigned)seen);
}

void await_bytes(const char *here, int fd, size_t count)
{
    char *block = malloc(count);
    for (int64_t end = now_ms() + 10000; now_ms() < end; sleep_ms(1)) {
        step(here);
        if (recv(fd, block, count, MSG_PEEK | MSG_DONTWAIT) == (ssize_t)count) {
            free(block);
            return;
        }
    }
    fail(here, "expected %zu bytes to arrive within 10 s, saw fewer", count);
}

void set_nonblock(int fd, bool on)
{
    int flags = (int)MUST(fcntl(fd, F_GETFL));
    MUST(fcntl(fd, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK));
}

void set_int(int fd, int level, int name, int value) { MUST(setsockopt(fd, level, name, &value, sizeof value)); }

int get_int(int fd, int level, int name)
{
    int value = -1;
    socklen_t len = sizeof value;
    MUST(getsockopt(fd, level, name, &value, &len));
    return value;
}

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

size_t fill(int fd) { return fill_on(fd, 0); }

size_t fill_on(int fd, size_t from)
{
    static char block[16384];
    size_t total = 0;
    for (int refused = 0;;) {
        pattern(0, from + total, block, sizeof block);
        ssize_t n = send(fd, block, sizeof block, MSG_DONTWAIT | MSG_NOSIGNAL);
        CHECK(n > 0 || errno == EAGAIN, "expected to fill the buffer, saw %s", strerror(errno));
        total += n > 0 ? (size_t)n : 0;
        CHECK(total < 256u << 20, "expected a full buffer, saw it swallow %zu bytes", total);
        refused = n < 0 ? refused + 1 : 0;
        if (refused == 4)
            return total;
        if (refused != 0)
            sleep_ms(40); /* the last bytes are still on their way to the receiver's buffer */
    }
}

void wait_child(const char *here, pid_t pid, int want_status)
{
    int status = 0;
    step(here);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            fail(here, "expected child %d to reap, saw %s", (int)pid, strerror(errno));
    if (WIFSIGNALED(status))
        fail(here, "expected the child's status %d, saw signal %d", want_status, WTERMSIG(status));
    if (WEXITSTATUS(status) != want_status)
        fail(here, "expected the child's status %d, saw %d", want_status, WEXITSTATUS(status));
}

/* ---- The pattern ---- */

static inline uint64_t word_at(uint64_t seed, uint64_t index)
{
    uint64_t x = (index + seed * 0x632be59bd9b4e019u) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    return x * 0xbf58476d1ce4e5b9u;
}

void pattern(uint64_t seed, uint64_t position, void *out, size_t len)
{
    unsigned char *at = out;
    for (; position % 8 == 0 && len >= 8; at += 8, position += 8, len -= 8) {
        uint64_t word = word_at(seed, position / 8);
        memcpy(at, &word, 8);
    }
    while (len) {
        uint64_t word = word_at(seed, position / 8);
        size_t skip = position % 8, piece = 8 - skip < len ? 8 - skip : len;
        memcpy(at, (unsigned char *)&word + skip, piece);
        at += piece;
        position += piece;
        len -= piece;
    }
}

int64_t pattern_differs(uint64_t seed, uint64_t position, const void *bytes, size_t len)
{
    const unsigned char *at = bytes;
    unsigned char right[512];
    while (len) {
        size_t piece = len < sizeof right ? len : sizeof right;
        pattern(seed, position, right, piece);
        if (memcmp(at, right, piece)) {
            size_t i = 0;
            while (at[i] == right[i])
                i++;
            return (int64_t)(position + i);
        }
        at += piece;
        position += piece;
        len -= piece;
    }
    return -1;
}

void send_pattern(const char *here, int fd, uint64_t seed, size_t count)
{
    char block[32768];
    for (size_t done = 0; done < count;) {
        size_t piece = count - done < sizeof block ? count - done : sizeof block;
        pattern(seed, done, block, piece);
        put(here, fd, block, piece);
        done += piece;
    }
}

void recv_pattern(const char *here, int fd, uint64_t seed, size_t count)
{
    char block[32768];
    for (size_t done = 0; done < count;) {
        size_t piece = count - done < sizeof block ? count - done : sizeof block;
        step(here);
        ssize_t n = recv(fd, block, piece, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail(here, "expected %zu bytes, saw %s after %zu", count, n ? strerror(errno) : "EOF", done);
        int64_t wrong = pattern_differs(seed, done, block, (size_t)n);
        if (wrong >= 0)
            fail(here, "expected the pattern, saw another byte at position %lld of %zu", (long long)wrong, count);
        done += (size_t)n;
    }
}

uint32_t dice(uint32_t *state)
{
    uint32_t x = *state;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}
