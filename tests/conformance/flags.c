/*
 * Flags and modes of the calls: MSG_*, O_NONBLOCK, time limits, urgent data, SIGPIPE.
 */
#include "sockconf.h"
#include <linux/errqueue.h>

CASE(peek)
{
    struct duo d = duo_open(0);
    char got[32];
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    for (int i = 0; i < 3; i++) {
        EQ(recv(d.fd, got, sizeof got, MSG_PEEK), 10);
        EQ(memcmp(got, "0123456789", 10), 0);
    }
    EQ(recv(d.fd, got, 4, MSG_PEEK), 4);
    EQ(recv(d.fd, got, 4, 0), 4);
    p_send(&d, "abcdef");
    AWAIT_BYTES(d.fd, 12);
    EQ(recv(d.fd, got, sizeof got, MSG_PEEK), 12);
    EQ(memcmp(got, "456789abcdef", 12), 0);
    struct iovec in[] = {{got, 2}, {got + 2, 3}};
    struct msghdr msg = {.msg_iov = in, .msg_iovlen = 2};
    EQ(recvmsg(d.fd, &msg, MSG_PEEK), 5);
    EQ(memcmp(got, "45678", 5), 0);
    WANT(d.fd, "456789abcdef");
    ERR(recv(d.fd, got, 1, MSG_PEEK | MSG_DONTWAIT), EAGAIN);
    p_start(&d, do_send_later, 40);
    EQ(recv(d.fd, got, sizeof got, MSG_PEEK), 4); /* waits like any other */
    p_finish(&d);
    WANT(d.fd, "late");
    p_close(&d);
    EQ(recv(d.fd, got, 1, MSG_PEEK), 0);
}

static long do_send_in_parts(int *fd, void *bytes, size_t len, long parts)
{
    (void)bytes, (void)len;
    for (long i = 0; i < parts; i++) {
        char block[1000];
        pattern(0, (uint64_t)i * sizeof block, block, sizeof block);
        put(HERE, *fd, block, sizeof block);
        sleep_ms(5);
    }
    return 0;
}

CASE(peek_waitall)
{
    struct duo d = duo_open(0);
    char *got = malloc(8000);
    p_start(&d, do_send_in_parts, 8);
    EQ(recv(d.fd, got, 8000, MSG_PEEK | MSG_WAITALL), 8000);
    EQ(pattern_differs(0, 0, got, 8000), -1);
    p_finish(&d);
    RECV_PATTERN(d.fd, 8000);
}

CASE(waitall)
{
    struct duo d = duo_open(0);
    char *got = malloc(10000);
    p_start(&d, do_send_in_parts, 8);
    EQ(recv(d.fd, got, 8000, MSG_WAITALL), 8000);
    EQ(pattern_differs(0, 0, got, 8000), -1);
    p_finish(&d);
    p_start(&d, do_send_in_parts, 4);
    struct iovec in[] = {{got, 1500}, {got + 1500, 2500}};
    struct msghdr msg = {.msg_iov = in, .msg_iovlen = 2};
    EQ(recvmsg(d.fd, &msg, MSG_WAITALL), 4000);
    EQ(pattern_differs(0, 0, got, 4000), -1);
    p_finish(&d);
    p_send(&d, "tail");
    p_start(&d, do_close_later, 30);
    EQ(recv(d.fd, got, 10000, MSG_WAITALL), 4); /* EOF ends it early */
    EQ(recv(d.fd, got, 10000, MSG_WAITALL), 0);
    p_finish(&d);
}

CASE(waitall_large)
{
    struct duo d = duo_open(0);
    size_t size = 24 << 20; /* more than any buffer holds */
    char *got = malloc(size);
    p_start(&d, do_send_pattern, (long)size);
    EQ(recv(d.fd, got, size, MSG_WAITALL), size);
    EQ(pattern_differs(0, 0, got, size), -1);
    p_finish(&d);
}

CASE(waitall_nonblocking)
{
    struct duo d = duo_open(NONBLOCK);
    char got[16];
    ERR(recv(d.fd, got, 10, MSG_WAITALL), EAGAIN);
    p_send(&d, "12345");
    AWAIT_BYTES(d.fd, 5);
    EQ(recv(d.fd, got, 10, MSG_WAITALL), 5);
}

CASE(waitall_with_time_limit)
{
    struct duo d = duo_open(0);
    char got[16];
    struct timeval limit = {0, 60000};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    p_send(&d, "12345");
    int64_t start = now_ms();
    EQ(recv(d.fd, got, 10, MSG_WAITALL), 5);
    CHECK(now_ms() - start >= 50, "expected to wait 60 ms, saw %lld", (long long)(now_ms() - start));
}

CASE(nonblocking)
{
    struct duo d = duo_open(NONBLOCK);
    char got[16];
    ERR(recv(d.fd, got, sizeof got, 0), EAGAIN);
    ERR(read(d.fd, got, sizeof got), EAGAIN);
    struct iovec in = {got, sizeof got};
    ERR(readv(d.fd, &in, 1), EAGAIN);
    struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1};
    ERR(recvmsg(d.fd, &msg, 0), EAGAIN);
    p_send(&d, "abc");
    AWAIT(d.fd, POLLIN);
    EQ(read(d.fd, got, sizeof got), 3);
    ERR(read(d.fd, got, sizeof got), EAGAIN);
    EQ(fcntl(d.fd, F_GETFL), O_RDWR | O_NONBLOCK);
    int off = 0, on = 1;
    MUST(ioctl(d.fd, FIONBIO, &off));
    EQ(fcntl(d.fd, F_GETFL), O_RDWR);
    p_start(&d, do_send_later, 30);
    EQ(read(d.fd, got, sizeof got), 4);
    p_finish(&d);
    MUST(ioctl(d.fd, FIONBIO, &on));
    ERR(read(d.fd, got, sizeof got), EAGAIN);
}

CASE(nonblocking_send_fills)
{
    struct duo d = duo_open(NONBLOCK);
    size_t sent = fill(d.fd);
    CHECK(sent >= 4096, "expected a buffer of some size, saw %zu bytes", sent);
    ERR(send(d.fd, "x", 1, 0), EAGAIN);
    ERR(write(d.fd, "x", 1), EAGAIN);
    struct iovec out = {"x", 1};
    ERR(writev(d.fd, &out, 1), EAGAIN);
    EQ(events_of(d.fd, POLLOUT | POLLIN, 0), 0);
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    AWAIT(d.fd, POLLOUT);
    EQ(send(d.fd, "x", 1, 0), 1);
    P_WANT(&d, "x");
}

CASE(nonblocking_send_is_partial)
{
    struct duo d = duo_open(NONBLOCK);
    size_t size = 64 << 20, done;
    char *big = malloc(size);
    pattern(0, 0, big, size);
    ssize_t sent = send(d.fd, big, size, 0);
    CHECK(sent > 0 && (size_t)sent < size, "expected part of 64 MiB to be sent, saw %zd", sent);
    p_start(&d, do_recv_pattern, (long)size);
    for (done = (size_t)sent; done < size;) {
        AWAIT(d.fd, POLLOUT);
        sent = send(d.fd, big + done, size - done, 0);
        CHECK(sent > 0 || errno == EAGAIN, "expected progress, saw %s", strerror(errno));
        done += sent > 0 ? (size_t)sent : 0;
    }
    EQ(p_finish(&d), 0);
}

CASE(dontwait)
{
    struct duo d = duo_open(0);
    char got[16];
    ERR(recv(d.fd, got, sizeof got, MSG_DONTWAIT), EAGAIN);
    p_send(&d, "abc");
    AWAIT(d.fd, POLLIN);
    EQ(recv(d.fd, got, sizeof got, MSG_DONTWAIT), 3);
    size_t sent = fill(d.fd);
    ERR(send(d.fd, "x", 1, MSG_DONTWAIT), EAGAIN);
    p_start(&d, do_recv_pattern, (long)sent);
    EQ(send(d.fd, "y", 1, 0), 1); /* blocking: waits for room */
    EQ(p_finish(&d), 0);
    P_WANT(&d, "y");
}

CASE(nonblock_flag_is_shared_by_dups)
{
    struct duo d = duo_open(0);
    char got[4];
    int copy = (int)MUST(dup(d.fd));
    set_nonblock(copy, true);
    ERR(recv(d.fd, got, 1, 0), EAGAIN);
    set_nonblock(d.fd, false);
    EQ(fcntl(copy, F_GETFL), O_RDWR);
    p_start(&d, do_send_later, 30);
    EQ(recv(copy, got, 4, 0), 4);
    p_finish(&d);
}

CASE(receive_time_limit)
{
    struct duo d = duo_open(0);
    char got[8];
    struct timeval limit = {0, 80000}, seen;
    socklen_t len = sizeof seen;
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    MUST(getsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &seen, &len));
    EQ(seen.tv_sec, 0);
    for (int i = 0; i < 2; i++) {
        int64_t start = now_ms();
        ERR(i ? read(d.fd, got, sizeof got) : recv(d.fd, got, sizeof got, 0), EAGAIN);
        int64_t took = now_ms() - start;
        CHECK(took >= 70, "expected to wait 80 ms, saw %lld", (long long)took);
        TIMELY(took < 4000, "expected to wait 80 ms, saw %lld", (long long)took);
    }
    p_start(&d, do_send_later, 20);
    ssize_t n = recv(d.fd, got, sizeof got, 0);
    TIMELY(n != -1 || errno != EAGAIN, "expected bytes before the limit of 80 ms, saw none");
    CHECK(n == 4, "expected \"late\", saw %zd %s", n, n < 0 ? strerror(errno) : "bytes");
    p_finish(&d);
    limit = (struct timeval){0, 0}; /* off */
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    p_start(&d, do_send_later, 150);
    EQ(recv(d.fd, got, sizeof got, 0), 4);
    p_finish(&d);
}

CASE(send_time_limit)
{
    struct duo d = duo_open(0);
    struct timeval limit = {0, 80000};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit));
    size_t sent = fill(d.fd);
    int64_t start = now_ms();
    ERR(send(d.fd, "x", 1, 0), EAGAIN);
    int64_t took = now_ms() - start;
    CHECK(took >= 70, "expected to wait 80 ms, saw %lld", (long long)took);
    TIMELY(took < 4000, "expected to wait 80 ms, saw %lld", (long long)took);
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    size_t size = 64 << 20;
    char *big = malloc(size);
    pattern(0, 0, big, size);
    ssize_t part = send(d.fd, big, size, 0); /* what went before the limit counts */
    CHECK(part > 0 && (size_t)part < size, "expected part of 64 MiB, saw %zd", part);
    EQ(p_do(&d, do_recv_pattern, part), 0);
}

CASE(trunc_discards)
{
    struct duo d = duo_open(0);
    char got[8] = "zzzzzzz";
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    EQ(recv(d.fd, got, 4, MSG_TRUNC), 4);
    EQ(memcmp(got, "zzzz", 4), 0); /* not copied, gone */
    EQ(recv(d.fd, NULL, 3, MSG_TRUNC), 3);
    WANT(d.fd, "789");
}

CASE(error_queue_is_empty)
{
    struct duo d = duo_open(0);
    char got[8], control[64];
    struct iovec in = {got, sizeof got};
    struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ERR(recvmsg(d.fd, &msg, MSG_ERRQUEUE), EAGAIN);
    ERR(recv(d.fd, got, sizeof got, MSG_ERRQUEUE), EAGAIN);
    p_send(&d, "data");
    AWAIT_BYTES(d.fd, 4);
    ERR(recvmsg(d.fd, &msg, MSG_ERRQUEUE), EAGAIN);
    WANT(d.fd, "data");
}

CASE(more_and_cork)
{
    struct duo d = duo_open(0);
    EQ(send(d.fd, "a", 1, MSG_MORE), 1);
    EQ(send(d.fd, "b", 1, MSG_MORE), 1);
    EQ(send(d.fd, "c", 1, 0), 1);
    P_WANT(&d, "abc");
    set_int(d.fd, IPPROTO_TCP, TCP_CORK, 1);
    PUT(d.fd, "d");
    PUT(d.fd, "e");
    set_int(d.fd, IPPROTO_TCP, TCP_CORK, 0);
    P_WANT(&d, "de");
    EQ(send(d.fd, "f", 1, MSG_MORE), 1);
    P_WANT(&d, "f"); /* comes by itself in the end */
    set_int(d.fd, IPPROTO_TCP, TCP_NODELAY, 1);
    PUT(d.fd, "g");
    P_WANT(&d, "g");
    EQ(send(d.fd, "h", 1, MSG_EOR | MSG_CONFIRM | MSG_DONTROUTE), 1);
    P_WANT(&d, "h");
}

static volatile sig_atomic_t hits;
static void count_hit(int signal_no)
{
    (void)signal_no;
    hits++;
}

CASE(sigpipe)
{
    struct duo d = duo_open(0);
    struct sigaction action = {.sa_handler = count_hit};
    MUST(sigaction(SIGPIPE, &action, NULL));
    MUST(shutdown(d.fd, SHUT_WR));
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    EQ(hits, 0);
    ERR(send(d.fd, "x", 1, 0), EPIPE);
    EQ(hits, 1);
    ERR(write(d.fd, "x", 1), EPIPE);
    EQ(hits, 2);
    struct iovec out = {"x", 1};
    ERR(writev(d.fd, &out, 1), EPIPE);
    EQ(hits, 3);
    struct msghdr msg = {.msg_iov = &out, .msg_iovlen = 1};
    ERR(sendmsg(d.fd, &msg, MSG_NOSIGNAL), EPIPE);
    EQ(hits, 3);
    ERR(sendmsg(d.fd, &msg, 0), EPIPE);
    EQ(hits, 4);
    signal(SIGPIPE, SIG_IGN);
    ERR(write(d.fd, "x", 1), EPIPE);
    p_send(&d, "still");
    WANT(d.fd, "still");
}

CASE(sigpipe_kills)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        signal(SIGPIPE, SIG_DFL);
        shutdown(d.fd, SHUT_WR);
        write(d.fd, "x", 1) == 1 ? _exit(1) : _exit(2);
    }
    int status;
    MUST(waitpid(pid, &status, 0));
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGPIPE, "expected death by SIGPIPE, saw status %#x",
          (unsigned)status);
}

static long do_send_oob(int *fd, void *bytes, size_t len, long unused)
{
    (void)unused;
    return send(*fd, bytes, len, MSG_OOB);
}

CASE(urgent_data)
{
    struct duo d = duo_open(0);
    char got[16];
    ERR(recv(d.fd, got, 1, MSG_OOB), EINVAL);
    EQ(sockatmark(d.fd), 0);
    p_send(&d, "abc");
    EQ(p_give(&d, do_send_oob, "!", 1, 0), 1);
    p_send(&d, "def");
    AWAIT(d.fd, POLLPRI);
    EQ(recv(d.fd, got, 1, MSG_OOB), 1);
    EQ(got[0], '!');
    ERR(recv(d.fd, got, 1, MSG_OOB), EINVAL); /* read already */
    EQ(sockatmark(d.fd), 0);
    EQ(recv(d.fd, got, sizeof got, 0), 3); /* stops at the mark */
    EQ(memcmp(got, "abc", 3), 0);
    EQ(sockatmark(d.fd), 1);
    WANT(d.fd, "def");
    PUT(d.fd, "on");
    P_WANT(&d, "on");
}

CASE(urgent_inline)
{
    struct duo d = duo_open(0);
    char got[16];
    set_int(d.fd, SOL_SOCKET, SO_OOBINLINE, 1);
    p_send(&d, "abc");
    EQ(p_give(&d, do_send_oob, "!", 1, 0), 1);
    p_send(&d, "def");
    AWAIT(d.fd, POLLPRI);
    ERR(recv(d.fd, got, 1, MSG_OOB), EINVAL);
    EQ(recv(d.fd, got, sizeof got, 0), 3);
    EQ(sockatmark(d.fd), 1);
    WANT(d.fd, "!def");
}

CASE(urgent_sent_from_here)
{
    struct duo d = duo_open(0);
    PUT(d.fd, "before");
    EQ(send(d.fd, "x!", 2, MSG_OOB), 2);
    P_WANT(&d, "beforex");
    PUT(d.fd, "after");
    P_WANT(&d, "after");
    p_start(&d, do_echo, 0);
    SEND_PATTERN(d.fd, 100000);
    RECV_PATTERN(d.fd, 100000);
    MUST(shutdown(d.fd, SHUT_WR));
    WANT_EOF(d.fd);
    p_finish(&d);
}

CASE(urgent_signal)
{
    struct duo d = duo_open(0);
    char got[4];
    hits = 0;
    struct sigaction action = {.sa_handler = count_hit};
    MUST(sigaction(SIGURG, &action, NULL));
    MUST(fcntl(d.fd, F_SETOWN, getpid()));
    EQ(p_give(&d, do_send_oob, "!", 1, 0), 1);
    for (int i = 0; i < 1000 && !hits; i++)
        sleep_ms(2);
    EQ(hits, 1);
    EQ(recv(d.fd, got, 1, MSG_OOB), 1);
}

CASE(receive_low_water)
{
    struct duo d = duo_open(0);
    char got[32];
    set_int(d.fd, SOL_SOCKET, SO_RCVLOWAT, 8);
    EQ(get_int(d.fd, SOL_SOCKET, SO_RCVLOWAT), 8);
    p_send(&d, "1234");
    sleep_ms(20);
    EQ(events_of(d.fd, POLLIN, 0), 0);
    p_send(&d, "5678");
    AWAIT(d.fd, POLLIN);
    EQ(recv(d.fd, got, sizeof got, 0), 8);
    set_int(d.fd, SOL_SOCKET, SO_RCVLOWAT, 1);
    p_send(&d, "9");
    AWAIT(d.fd, POLLIN);
    WANT(d.fd, "9");
}

CASE(peek_offset)
{
    struct duo d = duo_open(0);
    char got[32];
    int offset = 2;
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    if (setsockopt(d.fd, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset) < 0) {
        CHECK(errno == EOPNOTSUPP, "expected EOPNOTSUPP of older kernels, saw %s", strerror(errno));
        return;
    }
    EQ(recv(d.fd, got, 3, MSG_PEEK), 3);
    EQ(memcmp(got, "234", 3), 0);
    EQ(recv(d.fd, got, 3, MSG_PEEK), 3);
    EQ(memcmp(got, "567", 3), 0);
    WANT(d.fd, "0123456789");
}
