/*
 * epoll: level- and edge-triggered, one-shot, exclusive, nested, mixed, shared; the user's data untouched.
 */
#include "sockconf.h"

static int new_set(void) { return (int)MUST(epoll_create1(EPOLL_CLOEXEC)); }

static void add(int set, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event));
}

static void change(int set, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    MUST(epoll_ctl(set, EPOLL_CTL_MOD, fd, &event));
}

/* Exactly one event, with these flags and this data. */
static void one(const char *here, int set, int ms, uint32_t events, uint64_t data)
{
    struct epoll_event seen[4];
    step(here);
    int n = epoll_wait(set, seen, 4, ms);
    if (n != 1)
        fail(here, "expected one event, saw %d (%s)", n, n < 0 ? strerror(errno) : "events");
    if (seen[0].events != events)
        fail(here, "expected events %#x, saw %#x", events, seen[0].events);
    if (seen[0].data.u64 != data)
        fail(here, "expected data %#llx, saw %#llx", (unsigned long long)data, (unsigned long long)seen[0].data.u64);
}
#define ONE(set, ms, events, data) one(HERE, set, ms, events, data)

static void nothing(const char *here, int set, int ms)
{
    struct epoll_event seen[4];
    step(here);
    int n = epoll_wait(set, seen, 4, ms);
    if (n)
        fail(here, "expected no event, saw %d (first %#x)", n, n > 0 ? seen[0].events : 0);
}
#define NOTHING(set, ms) nothing(HERE, set, ms)

CASE(epoll_level)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 0xfeedfacecafebeef);
    NOTHING(set, 0);
    p_send(&d, "abcdef");
    ONE(set, 10000, EPOLLIN, 0xfeedfacecafebeef);
    ONE(set, 0, EPOLLIN, 0xfeedfacecafebeef);
    WANT(d.fd, "abc");
    ONE(set, 0, EPOLLIN, 0xfeedfacecafebeef);
    WANT(d.fd, "def");
    NOTHING(set, 20);
    change(set, d.fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP, (uint64_t)(uintptr_t)&d);
    ONE(set, 0, EPOLLOUT, (uint64_t)(uintptr_t)&d);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    ONE(set, 0, EPOLLIN | EPOLLOUT, (uint64_t)(uintptr_t)&d);
    p_shutdown(&d, SHUT_WR);
    AWAIT(d.fd, POLLRDHUP);
    ONE(set, 0, EPOLLIN | EPOLLOUT | EPOLLRDHUP, (uint64_t)(uintptr_t)&d);
    WANT(d.fd, "x");
    WANT_EOF(d.fd);
    MUST(shutdown(d.fd, SHUT_WR));
    AWAIT(d.fd, POLLHUP);
    change(set, d.fd, 0, 5);
    ONE(set, 0, EPOLLHUP, 5);
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
    NOTHING(set, 0);
}

CASE(epoll_edge)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN | EPOLLET, 1);
    NOTHING(set, 0);
    p_send(&d, "abcdef");
    ONE(set, 10000, EPOLLIN, 1);
    NOTHING(set, 30); /* once for each arrival, read or not */
    WANT(d.fd, "ab");
    NOTHING(set, 30);
    p_send(&d, "g");
    ONE(set, 10000, EPOLLIN, 1);
    NOTHING(set, 0);
    WANT(d.fd, "cdefg");
    NOTHING(set, 30);
    for (int i = 0; i < 200; i++) {
        p_send(&d, "xy");
        ONE(set, 10000, EPOLLIN, 1);
        WANT(d.fd, "xy");
    }
    p_shutdown(&d, SHUT_WR);
    ONE(set, 10000, EPOLLIN, 1);
    NOTHING(set, 30);
    WANT_EOF(d.fd);
}

CASE(epoll_deleted_and_added_again)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int set = new_set(), other = new_set();
    for (uint64_t i = 0; i < 100; i++) { /* as redis-benchmark does for each request */
        add(set, d.fd, EPOLLOUT, i);
        ONE(set, 0, EPOLLOUT, i);
        PUT(d.fd, "ask");
        MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
        add(set, d.fd, EPOLLIN | (i % 2 ? EPOLLET : 0), i + 1000);
        P_WANT(&d, "ask");
        if (i % 10 == 0)
            NOTHING(set, 20);
        p_send(&d, "answer");
        ONE(set, 10000, EPOLLIN, i + 1000);
        WANT(d.fd, "answer");
        MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
    }
    ERR(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL), ENOENT);
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, &(struct epoll_event){.events = EPOLLIN}), ENOENT);
    /* What comes while it is deleted wakes nobody, and is reported when it is there again. */
    p_send(&d, "meanwhile");
    NOTHING(set, 30);
    add(set, e.fd, EPOLLIN, 7);
    NOTHING(set, 30);
    add(other, d.fd, EPOLLIN, 8);
    ONE(other, 10000, EPOLLIN, 8);
    add(set, d.fd, EPOLLIN | EPOLLET, 9);
    ONE(set, 10000, EPOLLIN, 9);
    NOTHING(set, 30);
    WANT(d.fd, "meanwhile");
    ERR(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &(struct epoll_event){.events = EPOLLIN}), EEXIST);
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
    p_send(&e, "other");
    ONE(set, 10000, EPOLLIN, 7);
    WANT(e.fd, "other");
    /* So is the end. */
    p_shutdown(&d, SHUT_WR);
    NOTHING(set, 30);
    add(set, d.fd, EPOLLIN | EPOLLRDHUP | EPOLLET, 10);
    ONE(set, 10000, EPOLLIN | EPOLLRDHUP, 10);
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
    /* A number that leads to another connection is another registration. */
    MUST(dup2(e.fd, d.fd));
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, &(struct epoll_event){.events = EPOLLIN}), ENOENT);
    add(set, d.fd, EPOLLIN, 11);
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, e.fd, NULL));
    p_send(&e, "twice");
    ONE(set, 10000, EPOLLIN, 11);
}

CASE(epoll_edge_starts_ready)
{
    struct duo d = duo_open(0);
    int set = new_set();
    p_send(&d, "waiting");
    AWAIT_BYTES(d.fd, 7);
    add(set, d.fd, EPOLLIN | EPOLLET, 2);
    ONE(set, 0, EPOLLIN, 2);
    NOTHING(set, 0);
    change(set, d.fd, EPOLLIN | EPOLLET, 3); /* MOD arms again */
    ONE(set, 0, EPOLLIN, 3);
    NOTHING(set, 0);
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, NULL));
    add(set, d.fd, EPOLLIN | EPOLLOUT | EPOLLET, 4);
    ONE(set, 0, EPOLLIN | EPOLLOUT, 4);
    NOTHING(set, 0);
    WANT(d.fd, "waiting");
}

CASE(epoll_edge_out)
{
    struct duo d = duo_open(NONBLOCK);
    int set = new_set();
    add(set, d.fd, EPOLLOUT | EPOLLET, 1);
    ONE(set, 0, EPOLLOUT, 1);
    NOTHING(set, 20);
    for (int round = 0; round < 3; round++) {
        size_t sent = fill(d.fd);
        ERR(send(d.fd, "x", 1, 0), EAGAIN);
        struct epoll_event seen;
        epoll_wait(set, &seen, 1, 0); /* fill() waits in pauses, and edges may have come meanwhile */
        NOTHING(set, 20);
        p_start(&d, do_recv_pattern, (long)sent);
        ONE(set, 10000, EPOLLOUT, 1);
        EQ(p_finish(&d), 0);
    }
}

CASE(epoll_oneshot)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN | EPOLLONESHOT, 9);
    p_send(&d, "a");
    ONE(set, 10000, EPOLLIN, 9);
    p_send(&d, "b");
    NOTHING(set, 30);
    WANT(d.fd, "ab");
    p_send(&d, "c");
    NOTHING(set, 30);
    change(set, d.fd, EPOLLIN | EPOLLONESHOT, 10);
    ONE(set, 10000, EPOLLIN, 10);
    WANT(d.fd, "c");
    change(set, d.fd, EPOLLIN | EPOLLONESHOT | EPOLLET, 11);
    NOTHING(set, 20);
    p_send(&d, "d");
    ONE(set, 10000, EPOLLIN, 11);
    WANT(d.fd, "d");
    p_close(&d);
    NOTHING(set, 20); /* disarmed: not even the end */
    change(set, d.fd, EPOLLIN, 12);
    ONE(set, 10000, EPOLLIN, 12);
}

CASE(epoll_exclusive)
{
    struct duo d = duo_open(0);
    int set = new_set(), second = new_set();
    add(set, d.fd, EPOLLIN | EPOLLEXCLUSIVE, 1);
    add(second, d.fd, EPOLLIN | EPOLLEXCLUSIVE | EPOLLET, 2);
    struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE};
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, &event), EINVAL);
    event.events = EPOLLIN;
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, &event), EINVAL);
    event.events = EPOLLIN | EPOLLONESHOT | EPOLLEXCLUSIVE;
    int third = new_set();
    ERR(epoll_ctl(third, EPOLL_CTL_ADD, d.fd, &event), EINVAL);
    p_send(&d, "x");
    ONE(set, 10000, EPOLLIN, 1);
    WANT(d.fd, "x");
    NOTHING(set, 10);
    p_start(&d, do_send_later, 40);
    ONE(set, 10000, EPOLLIN, 1);
    p_finish(&d);
    WANT(d.fd, "late");
}

CASE(epoll_errors)
{
    struct duo d = duo_open(0);
    struct epoll_event event = {.events = EPOLLIN}, seen[2];
    ERR(epoll_create(0), EINVAL);
    int set = (int)MUST(epoll_create(1));
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, &event), ENOENT);
    ERR(epoll_ctl(set, EPOLL_CTL_DEL, d.fd, &event), ENOENT);
    add(set, d.fd, EPOLLIN, 1);
    ERR(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event), EEXIST);
    ERR(epoll_ctl(set, EPOLL_CTL_ADD, set, &event), EINVAL);
    ERR(epoll_ctl(set, 77, d.fd, &event), EINVAL);
    ERR(epoll_ctl(d.fd, EPOLL_CTL_ADD, d.fd, &event), EINVAL);
    ERR(epoll_ctl(-1, EPOLL_CTL_ADD, d.fd, &event), EBADF);
    ERR(epoll_wait(set, seen, 0, 0), EINVAL);
    volatile int negative = -1;
    ERR(epoll_wait(set, seen, negative, 0), EINVAL);
    ERR(epoll_wait(d.fd, seen, 2, 0), EINVAL);
    ERR(epoll_wait(-1, seen, 2, 0), EBADF);
    ERR(epoll_create1(0x1234), EINVAL);
    p_send(&d, "x");
    ONE(set, 10000, EPOLLIN, 1);
    WANT(d.fd, "x");
}

CASE(epoll_time_limits)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 1);
    int64_t start = now_ms();
    NOTHING(set, 50);
    int64_t took = now_ms() - start;
    CHECK(took >= 49, "expected to wait 50 ms, saw %lld", (long long)took);
    TIMELY(took < 4000, "expected to wait 50 ms, saw %lld", (long long)took);
    struct epoll_event seen;
    struct timespec limit = {0, 30000000};
    start = now_ms();
    int n = epoll_pwait2(set, &seen, 1, &limit, NULL);
    CHECK(n == 0 || (n == -1 && errno == ENOSYS), "expected no event, saw %d", n);
    took = now_ms() - start;
    CHECK(n || took >= 29, "expected to wait 30 ms, saw %lld", (long long)took);
    p_start(&d, do_send_later, 40);
    ONE(set, -1, EPOLLIN, 1);
    p_finish(&d);
    limit.tv_nsec = 1500000000;
    if (n == 0)
        ERR(epoll_pwait2(set, &seen, 1, &limit, NULL), EINVAL);
    EQ(epoll_pwait(set, &seen, 1, 10, NULL), 1);
    if (n == 0)
        EQ(epoll_pwait2(set, &seen, 1, NULL, NULL), 1);
    WANT(d.fd, "late");
}

static volatile sig_atomic_t hits;
static void count_hit(int signal_no)
{
    (void)signal_no;
    hits++;
}

CASE(epoll_pwait_mask)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 1);
    struct sigaction action = {.sa_handler = count_hit};
    sigset_t usr1, none;
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    raise(SIGUSR1);
    NOTHING(set, 20);
    EQ(hits, 0);
    struct epoll_event seen;
    ERR(epoll_pwait(set, &seen, 1, 10000, &none), EINTR);
    EQ(hits, 1);
    raise(SIGUSR1);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    int n = epoll_pwait(set, &seen, 1, 0, &none); /* events and a signal at once: events first */
    CHECK(n == 1 || (n == -1 && errno == EINTR), "expected an event or EINTR, saw %d", n);
    WANT(d.fd, "x");
}

CASE(epoll_mixed_kinds)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int set = new_set(), lines[2], counter = (int)MUST(eventfd(0, EFD_NONBLOCK));
    int timer = (int)MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    MUST(pipe(lines));
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int udp = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
    MUST(bind(udp, (struct sockaddr *)&at, len));
    MUST(getsockname(udp, (struct sockaddr *)&at, &len));
    const int fds[] = {d.fd, e.fd, lines[0], counter, timer, udp};
    const uint64_t data[] = {0x100000001, 0x200000002, 3, 4, 5, 6};
    for (int i = 0; i < 6; i++)
        add(set, fds[i], i == 1 ? EPOLLIN | EPOLLET : EPOLLIN, data[i]);
    NOTHING(set, 10);
    uint64_t value = 1;
    char got[64];
    uint32_t state = 99;
    for (int round = 0; round < 300; round++) {
        int which = (int)(dice(&state) % 6);
        struct itimerspec soon = {.it_value = {0, 1000000}};
        if (which == 0)
            p_send(&d, "d");
        else if (which == 1)
            p_send(&e, "e");
        else if (which == 2)
            EQ(write(lines[1], "p", 1), 1);
        else if (which == 3)
            EQ(write(counter, &value, 8), 8);
        else if (which == 4)
            MUST(timerfd_settime(timer, 0, &soon, NULL));
        else
            EQ(sendto(udp, "u", 1, 0, (struct sockaddr *)&at, sizeof at), 1);
        ONE(set, 10000, EPOLLIN, data[which]);
        CHECK(read(fds[which], got, sizeof got) > 0, "expected bytes from kind %d, saw %s", which, strerror(errno));
        NOTHING(set, 0);
    }
    p_send(&d, "d");
    p_send(&e, "e");
    EQ(write(lines[1], "p", 1), 1);
    AWAIT(d.fd, POLLIN);
    AWAIT(e.fd, POLLIN);
    struct epoll_event seen[8];
    EQ(epoll_wait(set, seen, 8, 1000), 3);
    EQ(seen[0].data.u64 ^ seen[1].data.u64 ^ seen[2].data.u64, 0x100000001 ^ 0x200000002 ^ 3);
}

CASE(epoll_nested)
{
    struct duo d = duo_open(0);
    int inner = new_set(), outer = new_set();
    add(inner, d.fd, EPOLLIN, 1);
    add(outer, inner, EPOLLIN, 2);
    NOTHING(outer, 10);
    p_start(&d, do_send_later, 30);
    ONE(outer, 10000, EPOLLIN, 2);
    p_finish(&d);
    ONE(outer, 0, EPOLLIN, 2);
    ONE(inner, 0, EPOLLIN, 1);
    WANT(d.fd, "late");
    NOTHING(outer, 10);
    for (int i = 0; i < 50; i++) {
        p_send(&d, "x");
        ONE(outer, 10000, EPOLLIN, 2);
        ONE(inner, 0, EPOLLIN, 1);
        WANT(d.fd, "x");
        NOTHING(outer, 0);
    }
}

CASE(epoll_set_in_poll)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 1);
    EQ(events_of(set, POLLIN, 20), 0);
    p_start(&d, do_send_later, 30);
    EQ(events_of(set, POLLIN, 10000), POLLIN);
    p_finish(&d);
    EQ(events_of(set, POLLIN, 0), POLLIN);
    fd_set in;
    FD_ZERO(&in);
    FD_SET(set, &in);
    EQ(select(set + 1, &in, NULL, NULL, NULL), 1);
    ONE(set, 0, EPOLLIN, 1);
    WANT(d.fd, "late");
    EQ(events_of(set, POLLIN, 10), 0);
}

CASE(epoll_two_sets)
{
    struct duo d = duo_open(0);
    int a = new_set(), b = new_set();
    add(a, d.fd, EPOLLIN, 1);
    add(b, d.fd, EPOLLIN | EPOLLET, 2);
    for (int i = 0; i < 50; i++) {
        p_send(&d, "x");
        ONE(a, 10000, EPOLLIN, 1);
        ONE(b, 10000, EPOLLIN, 2);
        ONE(a, 0, EPOLLIN, 1);
        NOTHING(b, 0);
        WANT(d.fd, "x");
        NOTHING(a, 0);
    }
}

CASE(epoll_close_removes)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 1);
    add(set, e.fd, EPOLLIN, 2);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    MUST(close(d.fd));
    NOTHING(set, 20);
    p_send(&e, "y");
    ONE(set, 10000, EPOLLIN, 2);
    int fd = (int)MUST(eventfd(0, 0));
    EQ(fd, d.fd);
    ERR(epoll_ctl(set, EPOLL_CTL_DEL, fd, NULL), ENOENT);
    WANT(e.fd, "y");
}

CASE(epoll_stays_while_a_dup_lives)
{
    struct duo d = duo_open(0);
    int set = new_set(), copy = (int)MUST(dup(d.fd));
    add(set, d.fd, EPOLLIN, 1);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 2};
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, copy, &event), ENOENT); /* a set knows (file, number) pairs */
    MUST(close(d.fd));
    p_send(&d, "x");
    ONE(set, 10000, EPOLLIN, 1); /* the file lives on, so does what was registered */
    WANT(copy, "x");
    NOTHING(set, 0);
    MUST(close(copy));
    NOTHING(set, 20);
    P_WANT_EOF(&d);
}

CASE(epoll_dup_added_twice)
{
    struct duo d = duo_open(0);
    int set = new_set(), copy = (int)MUST(dup(d.fd));
    add(set, d.fd, EPOLLIN, 1);
    add(set, copy, EPOLLIN, 2);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    struct epoll_event seen[4];
    EQ(epoll_wait(set, seen, 4, 1000), 2);
    EQ(seen[0].data.u64 + seen[1].data.u64, 3);
    WANT(copy, "x");
    NOTHING(set, 0);
}

CASE(epoll_set_dup)
{
    struct duo d = duo_open(0);
    int set = new_set(), copy = (int)MUST(dup(set));
    add(copy, d.fd, EPOLLIN, 1);
    p_send(&d, "x");
    ONE(set, 10000, EPOLLIN, 1);
    MUST(close(set));
    ONE(copy, 0, EPOLLIN, 1);
    WANT(d.fd, "x");
    NOTHING(copy, 0);
}

CASE(epoll_across_fork)
{
    struct duo d = duo_open(0);
    int set = new_set();
    add(set, d.fd, EPOLLIN, 1);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        ONE(set, 10000, EPOLLIN, 1);
        WANT(d.fd, "for the child");
        PUT(d.fd, "from the child");
        _exit(0);
    }
    p_send(&d, "for the child");
    P_WANT(&d, "from the child");
    WAIT_CHILD(pid);
    NOTHING(set, 10);
    p_send(&d, "for the parent");
    ONE(set, 10000, EPOLLIN, 1);
    WANT(d.fd, "for the parent");
}

CASE(epoll_many, .seconds = 60)
{
    enum { count = 200 };
    struct duo d[count];
    int set = new_set(), seen_count[count] = {0};
    d[0] = duo_open(COLD);
    for (int i = 1; i < count; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, count);
    for (int i = 0; i < count; i++)
        add(set, d[i].fd, EPOLLIN, (uint64_t)(uintptr_t)&d[i]);
    NOTHING(set, 0);
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < count; i++)
            p_send(&d[i], "msg");
        for (int left = count; left;) {
            struct epoll_event seen[16];
            int n = (int)MUST(epoll_wait(set, seen, 16, 10000));
            CHECK(n > 0, "expected events for %d more connections, saw none", left);
            for (int k = 0; k < n; k++) {
                struct duo *at = seen[k].data.ptr;
                CHECK(at >= d && at < d + count, "expected a pointer of ours, saw %p", (void *)at);
                EQ(seen[k].events, EPOLLIN);
                WANT(at->fd, "msg");
                seen_count[at - d]++;
                left--;
            }
        }
        NOTHING(set, 0);
    }
    for (int i = 0; i < count; i++)
        EQ(seen_count[i], 5);
}

static void allow_descriptors(rlim_t count)
{
    struct rlimit limit;
    MUST(getrlimit(RLIMIT_NOFILE, &limit));
    if (limit.rlim_cur < count) {
        limit.rlim_cur = count;
        limit.rlim_max = limit.rlim_max > count ? limit.rlim_max : count;
        MUST(setrlimit(RLIMIT_NOFILE, &limit));
    }
}

/* What a stream in an instance does: level, a wait in which it comes, an edge, gone and here again. */
static void works_in(const struct duo *d, int set, uint64_t data)
{
    add(set, d->fd, EPOLLIN, data);
    NOTHING(set, 0);
    for (int i = 0; i < 3; i++) {
        p_send(d, "abc");
        ONE(set, 10000, EPOLLIN, data);
        WANT(d->fd, "a");
        ONE(set, 0, EPOLLIN, data);
        WANT(d->fd, "bc");
        NOTHING(set, 0);
        p_start(d, do_send_later, 20);
        ONE(set, -1, EPOLLIN, data);
        EQ(p_finish(d), 0);
        WANT(d->fd, "late");
    }
    change(set, d->fd, EPOLLIN | EPOLLET, data + 1);
    NOTHING(set, 0);
    p_send(d, "x");
    ONE(set, 10000, EPOLLIN, data + 1);
    NOTHING(set, 0);
    WANT(d->fd, "x");
    MUST(epoll_ctl(set, EPOLL_CTL_DEL, d->fd, NULL));
    NOTHING(set, 0);
    ERR(epoll_ctl(set, EPOLL_CTL_DEL, d->fd, NULL), ENOENT);
}

CASE(epoll_many_sets, .root = true)
{
    enum { count = 700 };
    int sets[count];
    allow_descriptors(4096);
    struct duo d = duo_open(0);
    for (int i = 0; i < count; i++)
        sets[i] = new_set();
    works_in(&d, sets[count - 1], 7);
    works_in(&d, sets[0], 8);
    /* One stream in a hundred of them: each hears of it. */
    for (int i = count - 100; i < count; i++)
        add(sets[i], d.fd, EPOLLIN, (uint64_t)i);
    for (int round = 0; round < 3; round++) {
        p_send(&d, "all");
        for (int i = count - 100; i < count; i++)
            ONE(sets[i], 10000, EPOLLIN, (uint64_t)i);
        WANT(d.fd, "all");
        for (int i = count - 100; i < count; i++)
            NOTHING(sets[i], 0);
    }
    for (int i = 0; i < count; i++)
        MUST(close(sets[i]));
    works_in(&d, new_set(), 9);
}

/* Sockets that are not connected have one edge each. */
static void take_edges(int set)
{
    struct epoll_event seen[64];
    for (int n; (n = (int)MUST(epoll_wait(set, seen, 64, 0))) > 0;)
        for (int i = 0; i < n; i++)
            EQ(seen[i].data.u64, 1);
}

CASE(epoll_many_before, .root = true, .seconds = 60)
{
    /* Thousands of registrations stand before those that are looked at. */
    enum { count = 9000 };
    static int fds[count];
    allow_descriptors(count + 1024);
    struct duo d[3];
    int set = new_set();
    d[0] = duo_open(0);
    d[1] = duo_more(&d[0], 0);
    d[2] = duo_more(&d[0], COLD); /* promoted when it is registered already */
    for (int i = 0; i < count; i++) {
        fds[i] = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
        add(set, fds[i], EPOLLIN | EPOLLET, 1);
        if (i == 4000) {
            take_edges(set);
            works_in(&d[0], set, 2); /* its place is free again */
        }
    }
    take_edges(set);
    add(set, d[2].fd, EPOLLIN, 4);
    add(set, d[1].fd, EPOLLIN, 3);
    works_in(&d[0], set, 5);
    for (int i = 0; i < 20; i++) {
        p_send(&d[2], "cold");
        ONE(set, 10000, EPOLLIN, 4);
        WANT(d[2].fd, "cold");
        PUT(d[2].fd, "out");
        P_WANT(&d[2], "out");
        p_send(&d[1], "warm");
        ONE(set, 10000, EPOLLIN, 3);
        WANT(d[1].fd, "warm");
        NOTHING(set, i % 2);
    }
    for (int i = 0; i < count; i += 2)
        MUST(close(fds[i]));
    works_in(&d[0], set, 6);
    p_send(&d[2], "cold");
    ONE(set, 10000, EPOLLIN, 4);
    WANT(d[2].fd, "cold");
}

CASE(epoll_is_fair)
{
    /* More ready connections than the array holds: each call goes on where the last one ended. */
    enum { count = 12 };
    struct duo d[count];
    int set = new_set(), seen_count[count] = {0};
    d[0] = duo_open(COLD);
    for (int i = 1; i < count; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, count);
    for (int i = 0; i < count; i++) {
        add(set, d[i].fd, EPOLLIN, (uint64_t)i);
        p_send(&d[i], "x");
        AWAIT(d[i].fd, POLLIN);
    }
    for (int k = 0; k < 12; k++) {
        struct epoll_event seen[3];
        EQ(epoll_wait(set, seen, 3, 0), 3);
        for (int n = 0; n < 3; n++)
            seen_count[seen[n].data.u64]++;
    }
    for (int i = 0; i < count; i++)
        EQ(seen_count[i], 3);
}

struct waiter {
    int set, events;
    pthread_t thread;
};

static void *wait_once(void *arg)
{
    struct waiter *w = arg;
    struct epoll_event seen[4];
    w->events = epoll_wait(w->set, seen, 4, 10000);
    return NULL;
}

CASE(epoll_add_while_waiting)
{
    struct duo d = duo_open(0);
    struct waiter w = {.set = new_set()};
    EQ(pthread_create(&w.thread, NULL, wait_once, &w), 0);
    sleep_ms(30);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    add(w.set, d.fd, EPOLLIN, 1); /* ready at once: the waiter wakes */
    pthread_join(w.thread, NULL);
    EQ(w.events, 1);
    EQ(pthread_create(&w.thread, NULL, wait_once, &w), 0);
    pthread_join(w.thread, NULL);
    WANT(d.fd, "x");
    EQ(pthread_create(&w.thread, NULL, wait_once, &w), 0);
    sleep_ms(30);
    change(w.set, d.fd, EPOLLOUT, 1);
    pthread_join(w.thread, NULL);
    EQ(w.events, 1);
}

struct taker {
    int set, fds;
    atomic_int *taken;
    pthread_t thread;
};

static void *take_all(void *arg)
{
    struct taker *t = arg;
    for (;;) {
        struct epoll_event seen;
        int n = epoll_wait(t->set, &seen, 1, 10000);
        CHECK(n == 1, "expected an event for a thread, saw %d", n);
        char got[16];
        ssize_t size = recv(seen.data.fd, got, sizeof got, MSG_DONTWAIT);
        if (size == 0)
            return NULL;
        CHECK(size > 0, "expected one thread an event, saw %s", strerror(errno));
        atomic_fetch_add(t->taken, (int)size);
        struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = seen.data.fd};
        MUST(epoll_ctl(t->set, EPOLL_CTL_MOD, seen.data.fd, &again));
    }
}

CASE(epoll_oneshot_threads)
{
    enum { count = 4, threads = 4 };
    struct duo d[count];
    atomic_int taken = 0;
    struct taker t[threads];
    int set = new_set();
    d[0] = duo_open(COLD);
    for (int i = 1; i < count; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, count);
    for (int i = 0; i < count; i++) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = d[i].fd};
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, d[i].fd, &event));
    }
    for (int i = 0; i < threads; i++) {
        t[i] = (struct taker){.set = set, .taken = &taken};
        EQ(pthread_create(&t[i].thread, NULL, take_all, &t[i]), 0);
    }
    for (int i = 0; i < 1000; i++)
        p_send(&d[i % count], "abc");
    for (int i = 0; i < count; i++)
        p_shutdown(&d[i], SHUT_WR);
    for (int i = 0; i < threads; i++)
        pthread_join(t[i].thread, NULL);
    EQ(taken, 3000);
}

CASE(epoll_registered_number_is_closed_and_a_copy_lives)
{
    /* Linux keeps a registration until the last copy is closed, and one of a copy apart from it. */
    for (int cold = 0; cold < 2; cold++) {
        struct duo d = duo_open(cold ? COLD : 0);
        int ep = (int)MUST(epoll_create1(0));
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = 1}, got[4];
        MUST(epoll_ctl(ep, EPOLL_CTL_ADD, d.fd, &event));
        int copy = (int)MUST(dup(d.fd)), number = d.fd;
        MUST(close(d.fd));
        event.data.u64 = 2;
        MUST(epoll_ctl(ep, EPOLL_CTL_ADD, copy, &event));
        d.fd = copy;
        if (cold)
            duo_warm(&d);
        for (int i = 0; i < 20; i++) {
            p_send(&d, "both");
            AWAIT_BYTES(copy, 4);
            EQ(epoll_wait(ep, got, 4, 1000), 2);
            EQ(got[0].data.u64 + got[1].data.u64, 3);
            WANT(copy, "both");
            EQ(epoll_wait(ep, got, 4, 0), 0);
        }
        ERR(epoll_ctl(ep, EPOLL_CTL_DEL, number, NULL), EBADF);
        MUST(epoll_ctl(ep, EPOLL_CTL_DEL, copy, NULL));
        p_send(&d, "one");
        EQ(epoll_wait(ep, got, 4, 1000), 1);
        EQ(got[0].data.u64, 1);
        WANT(copy, "one");
        /* The same number again, for the same connection: the old registration is its own. */
        EQ(dup2(copy, number), number);
        ERR(epoll_ctl(ep, EPOLL_CTL_ADD, number, &event), EEXIST);
        event.data.u64 = 5;
        MUST(epoll_ctl(ep, EPOLL_CTL_MOD, number, &event));
        p_send(&d, "mod");
        EQ(epoll_wait(ep, got, 4, 1000), 1);
        EQ(got[0].data.u64, 5);
        WANT(copy, "mod");
        MUST(close(number));
        MUST(close(copy));
        P_WANT_EOF(&d);
        EQ(epoll_wait(ep, got, 4, 0), 0);
        MUST(close(ep));
    }
}
