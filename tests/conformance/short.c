/*
 * A short receive means that nothing more is there: programs with edge-triggered epoll believe it (epoll(7)), and wait. So
 * no boundary of a library below them may show: where the bytes of one receive come from, and in which pieces.
 */
#include "sockconf.h"

enum { MANY = 12 }; /* more connections than an instance looks at without being told */

/* As nginx does: reads after an edge until a receive is short. All `size` bytes must come. */
static void read_by_edges(int set, int fd, size_t size)
{
    static char block[1 << 20];
    size_t done = 0;
    while (done < size) {
        struct epoll_event event;
        EQ(epoll_wait(set, &event, 1, 10000), 1);
        if (event.data.fd != fd)
            continue;
        ssize_t n;
        do {
            n = recv(fd, block, sizeof block, 0);
            CHECK(n > 0 || (n < 0 && errno == EAGAIN), "expected bytes or EAGAIN, saw %zd, errno %d", n, errno);
            done += n > 0 ? (size_t)n : 0;
        } while (n == sizeof block);
    }
    EQ(done, size);
}

/* A set with many connections, each with an edge for what comes, and for `more`. */
static int edges(struct duo *all, uint32_t more)
{
    int set = (int)MUST(epoll_create1(EPOLL_CLOEXEC));
    for (int i = 0; i < MANY; i++) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET | more, .data.fd = all[i].fd};
        set_nonblock(all[i].fd, true);
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, all[i].fd, &event));
    }
    return set;
}

static void open_many(struct duo *all, int flags)
{
    all[0] = duo_open(flags);
    for (int i = 1; i < MANY; i++)
        all[i] = duo_more(&all[0], flags);
}

/* A library that moves a connection in the middle may do so with any call, after some that have made it worth while. */
static void open_movable(struct duo *all)
{
    open_many(all, COLD);
    for (int i = 0; i < MANY; i++)
        for (int turn = 0; turn < 4; turn++) {
            p_send(&all[i], "ask");
            WANT(all[i].fd, "ask");
            PUT(all[i].fd, "answer");
            P_WANT(&all[i], "answer");
        }
    nanosleep(&(struct timespec){0, 300000000}, NULL);
}

CASE(short_receive_while_it_moves)
{
    struct duo all[MANY];
    open_movable(all);
    for (int i = 0; i < MANY; i++) {
        struct duo *d = &all[i];
        char got[64];
        p_send(d, "ab");
        PUT(d->fd, "x");
        p_send(d, "cde");
        AWAIT_BYTES(d->fd, 5);
        if (i % 3 == 0)
            EQ(recv(d->fd, got, sizeof got, MSG_PEEK), 5);
        EQ(recv(d->fd, got, sizeof got, 0), 5);
        EQ(memcmp(got, "abcde", 5), 0);
        P_WANT(d, "x");
    }
}

static long do_leave(int *fd, void *bytes, size_t len, long least)
{
    (void)bytes, (void)len;
    int value = (int)least;
    return setsockopt(*fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof value) < 0 ? -errno : 0;
}

/* The other end asks for something in the middle for which the kernel is needed. */
CASE(short_receive_while_the_peer_leaves)
{
    struct duo all[MANY];
    open_many(all, 0);
    char got[64];
    for (int i = 0; i < MANY; i++) {
        struct duo *d = &all[i];
        p_send(d, "ab");
        EQ(p_do(d, do_leave, 2), 0);
        p_send(d, "cde");
        if (i % 2) {
            AWAIT_BYTES(d->fd, 5);
            EQ(recv(d->fd, got, sizeof got, MSG_PEEK), 5);
            EQ(recv(d->fd, got, sizeof got, MSG_DONTWAIT), 5);
        } else {
            EQ(recv(d->fd, got, 5, MSG_WAITALL), 5);
        }
        EQ(memcmp(got, "abcde", 5), 0);
    }
}

CASE(short_receive_by_edges)
{
    struct duo all[MANY];
    open_many(all, 0);
    int set = edges(all, 0);
    struct duo *d = &all[MANY - 1];
    for (int i = 0; i < 5; i++) {
        p_start(d, do_send_pattern, 900000);
        read_by_edges(set, d->fd, 900000);
        EQ(p_finish(d), 0);
    }
    p_send(d, "ab");
    EQ(p_do(d, do_leave, 2), 0);
    p_send(d, "cde");
    read_by_edges(set, d->fd, 5);
}

static void wait_for_room(int set, int fd)
{
    struct epoll_event event;
    do
        EQ(epoll_wait(set, &event, 1, 10000), 1);
    while (event.data.fd != fd || !(event.events & EPOLLOUT));
}

/* A program that waits for room is told of it, wherever the bytes have gone meanwhile. */
static void send_by_edges(bool full_first)
{
    enum { ALL = 30000000 };
    struct duo all[MANY];
    open_movable(all);
    int set = edges(all, EPOLLOUT);
    struct duo *d = &all[MANY - 1];
    static char block[1 << 16];
    struct epoll_event event;
    while (epoll_wait(set, &event, 1, 100) > 0)
        ;
    size_t done = 0;
    ssize_t n;
    while (full_first && (n = send(d->fd, block, sizeof block, 0)) > 0)
        done += (size_t)n;
    p_send(d, "x"); /* calls here and there, with which it may move */
    while (epoll_wait(set, &event, 1, 100) > 0)
        ;
    WANT(d->fd, "x");
    p_start(d, do_discard, 0);
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    for (bool is_told = !full_first; done < ALL; is_told = false) {
        if (!is_told)
            wait_for_room(set, d->fd);
        while (done < ALL && (n = send(d->fd, block, sizeof block, 0)) > 0)
            done += (size_t)n;
    }
    MUST(shutdown(d->fd, SHUT_WR));
    EQ(p_finish(d), 0);
}

CASE(room_by_edges_while_it_moves, .seconds = 60) { send_by_edges(false); }
CASE(room_by_edges_while_it_is_full, .seconds = 60) { send_by_edges(true); }

/* A pipe that has room has taken all that was there. */
CASE(short_splice)
{
    struct duo d = duo_open(0);
    int ends[2];
    MUST(pipe(ends));
    set_nonblock(ends[0], true);
    for (int i = 0; i < 10; i++) {
        EQ(p_do(&d, do_send_pattern, 20000), 0);
        AWAIT_BYTES(d.fd, 20000);
        for (size_t left = 20000; left;) {
            ssize_t n = (ssize_t)MUST(splice(d.fd, NULL, ends[1], NULL, 65536, SPLICE_F_NONBLOCK));
            CHECK(n > 0 && (size_t)n <= left, "expected at most %zu bytes, saw %zd", left, n);
            left -= (size_t)n;
            if (events_of(ends[1], POLLOUT, 0) & POLLOUT)
                EQ(left, 0);
            char block[65536];
            while (read(ends[0], block, sizeof block) > 0)
                ;
        }
    }
}

#ifdef __x86_64__
static long past_the_library(int *fd, void *bytes, size_t len, long unused)
{
    (void)unused;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(SYS_write), "D"((long)*fd), "S"(bytes), "d"(len) : "rcx", "r11", "memory");
    return result;
}

/* Bytes that come by a system call that no library sees: they arrive, or the connection is reset; nobody waits for ever. */
static void receive_what_slipped(int how)
{
    struct duo d = duo_open(0);
    char got[8];
    EQ(p_give(&d, past_the_library, "raw!", 4, 0), 4);
    if (how == SO_RCVTIMEO) {
        struct timeval limit = {20, 0};
        MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    }
    ssize_t n = recv(d.fd, got, 4, how == MSG_WAITALL ? MSG_WAITALL : 0);
    CHECK(n == 4 || (n < 0 && errno == ECONNRESET), "expected 4 bytes or ECONNRESET, saw %zd, errno %d", n, errno);
}

CASE(bytes_past_the_library, .seconds = 10) { receive_what_slipped(0); }
CASE(bytes_past_the_library_with_a_time_limit, .seconds = 10) { receive_what_slipped(SO_RCVTIMEO); }
CASE(bytes_past_the_library_for_all, .seconds = 10) { receive_what_slipped(MSG_WAITALL); }

/* The same while this end waits for room. */
CASE(bytes_past_the_library_amid_a_send, .seconds = 20)
{
    struct duo d = duo_open(0);
    static char block[1 << 16];
    EQ(p_give(&d, past_the_library, "raw!", 4, 0), 4);
    struct timeval limit = {2, 0};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit));
    for (int i = 0; i < 4096; i++)
        if (send(d.fd, block, sizeof block, MSG_NOSIGNAL) < 0) {
            CHECK(errno == EAGAIN || errno == ECONNRESET || errno == EPIPE, "expected an end, saw errno %d", errno);
            return;
        }
    fail(HERE, "expected the buffers to be full, saw no end");
}
#endif
