/*
 * How connections end: half-close, shutdown, close, reset, death.
 */
#include "sockconf.h"

CASE(half_close_here)
{
    struct duo d = duo_open(0);
    PUT(d.fd, "last words");
    MUST(shutdown(d.fd, SHUT_WR));
    P_WANT(&d, "last words");
    P_WANT_EOF(&d);
    P_WANT_EOF(&d);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    p_start(&d, do_send_pattern, 10 << 20); /* the other direction goes on */
    RECV_PATTERN(d.fd, 10 << 20);
    EQ(p_finish(&d), 0);
    EQ(shutdown(d.fd, SHUT_WR), 0);
    p_close(&d);
    WANT_EOF(d.fd);
    ERR(shutdown(d.fd, SHUT_WR), ENOTCONN);
}

CASE(half_close_there)
{
    struct duo d = duo_open(0);
    p_send(&d, "bye");
    p_shutdown(&d, SHUT_WR);
    WANT(d.fd, "bye");
    WANT_EOF(d.fd);
    WANT_EOF(d.fd);
    p_start(&d, do_recv_pattern, 10 << 20);
    SEND_PATTERN(d.fd, 10 << 20);
    EQ(p_finish(&d), 0);
    MUST(shutdown(d.fd, SHUT_WR));
    P_WANT_EOF(&d);
}

CASE(half_close_cold)
{
    struct duo d = duo_open(COLD);
    p_shutdown(&d, SHUT_WR);
    WANT_EOF(d.fd);
    for (int i = 0; i < 50; i++) { /* promotion, if any, comes when one direction is over already */
        PUT(d.fd, "one way");
        P_WANT(&d, "one way");
        sleep_ms(1);
    }
    MUST(shutdown(d.fd, SHUT_WR));
    P_WANT_EOF(&d);
}

CASE(shut_read_here)
{
    struct duo d = duo_open(0);
    char got[8];
    p_send(&d, "kept");
    AWAIT_BYTES(d.fd, 4);
    MUST(shutdown(d.fd, SHUT_RD));
    EQ(recv(d.fd, got, sizeof got, 0), 4); /* Linux: what had come is still there */
    EQ(recv(d.fd, got, sizeof got, 0), 0);
    EQ(events_of(d.fd, POLLIN | POLLRDHUP, 0), POLLIN | POLLRDHUP);
    PUT(d.fd, "out");
    P_WANT(&d, "out");
    ERR(shutdown(d.fd, 7), EINVAL);
}

struct unblocker {
    pthread_t thread;
    int fd, how;
};

static void *shut_later(void *arg)
{
    struct unblocker *u = arg;
    sleep_ms(50);
    MUST(shutdown(u->fd, u->how));
    return NULL;
}

CASE(shutdown_unblocks_receive)
{
    for (int round = 0; round < 4; round++) {
        struct duo d = duo_open(0);
        char got[8];
        struct unblocker u = {.fd = d.fd, .how = round % 2 ? SHUT_RDWR : SHUT_RD};
        EQ(pthread_create(&u.thread, NULL, shut_later, &u), 0);
        if (round < 2)
            EQ(recv(d.fd, got, sizeof got, 0), 0);
        else
            EQ(events_of(d.fd, POLLIN, 10000) & POLLIN, POLLIN);
        pthread_join(u.thread, NULL);
        EQ(recv(d.fd, got, sizeof got, 0), 0);
        if (u.how == SHUT_RDWR) {
            ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
            P_WANT_EOF(&d);
        }
        close(d.fd);
    }
}

CASE(shutdown_unblocks_send)
{
    struct duo d = duo_open(0);
    struct unblocker u = {.fd = d.fd, .how = SHUT_WR};
    fill(d.fd);
    EQ(pthread_create(&u.thread, NULL, shut_later, &u), 0);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    pthread_join(u.thread, NULL);
}

CASE(shutdown_unblocks_epoll)
{
    struct duo d = duo_open(0);
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET}, seen;
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    struct unblocker u = {.fd = d.fd, .how = SHUT_RDWR};
    EQ(pthread_create(&u.thread, NULL, shut_later, &u), 0);
    EQ(epoll_wait(set, &seen, 1, 10000), 1);
    EQ(seen.events & (EPOLLIN | EPOLLRDHUP), EPOLLIN | EPOLLRDHUP);
    pthread_join(u.thread, NULL);
}

CASE(listener_shutdown_unblocks_accept)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    struct unblocker u = {.fd = listener, .how = SHUT_RDWR};
    EQ(pthread_create(&u.thread, NULL, shut_later, &u), 0);
    ERR(accept(listener, NULL, NULL), EINVAL);
    pthread_join(u.thread, NULL);
}

CASE(shut_both_directions)
{
    struct duo d = duo_open(0);
    char got[4];
    PUT(d.fd, "end");
    MUST(shutdown(d.fd, SHUT_RDWR));
    EQ(recv(d.fd, got, 4, 0), 0);
    P_WANT(&d, "end");
    P_WANT_EOF(&d);
    p_shutdown(&d, SHUT_RDWR);
    EQ(events_of(d.fd, POLLIN | POLLOUT, 1000) & POLLHUP, POLLHUP);
    EQ(close(d.fd), 0);
}

CASE(close_gives_eof)
{
    struct duo d = duo_open(0);
    PUT(d.fd, "tail");
    MUST(close(d.fd));
    P_WANT(&d, "tail");
    P_WANT_EOF(&d);
    P_WANT_EOF(&d);
}

CASE(close_delivers_everything)
{
    struct duo d = duo_open(0);
    p_start(&d, do_recv_pattern, 20 << 20);
    SEND_PATTERN(d.fd, 20 << 20);
    MUST(close(d.fd));
    EQ(p_finish(&d), 0);
    P_WANT_EOF(&d);
}

CASE(exit_delivers_everything)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        SEND_PATTERN(d.fd, 1000); /* fits any buffer: the process is gone before it is read */
        _exit(0);
    }
    MUST(close(d.fd));
    WAIT_CHILD(pid);
    EQ(p_do(&d, do_recv_pattern, 1000), 0);
    P_WANT_EOF(&d);
}

CASE(close_with_unread_data_resets)
{
    struct duo d = duo_open(0);
    p_send(&d, "never read");
    AWAIT_BYTES(d.fd, 10);
    MUST(close(d.fd));
    P_WANT_ERROR(&d, ECONNRESET);
    P_WANT_EOF(&d);
}

CASE(close_with_unread_data_loses_nothing_sent_earlier)
{
    struct duo d = duo_open(0);
    p_send(&d, "partly read");
    WANT(d.fd, "partly");
    MUST(close(d.fd));
    P_WANT_ERROR(&d, ECONNRESET);
}

CASE(write_after_peer_closed)
{
    struct duo d = duo_open(0);
    p_close(&d);
    WANT_EOF(d.fd);
    EQ(send(d.fd, "into the void", 13, MSG_NOSIGNAL), 13); /* the reset comes back only now */
    AWAIT(d.fd, POLLERR);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    WANT_EOF(d.fd);
}

CASE(write_until_peer_is_seen_closed)
{
    struct duo d = duo_open(0);
    p_close(&d);
    ssize_t n = 0;
    int64_t end = now_ms() + 10000;
    while ((n = send(d.fd, "x", 1, MSG_NOSIGNAL)) == 1 && now_ms() < end)
        sleep_ms(1);
    CHECK(n == -1 && (errno == EPIPE || errno == ECONNRESET), "expected EPIPE or ECONNRESET, saw %zd %s", n,
          strerror(errno));
}

CASE(peer_close_unblocks_send)
{
    struct duo d = duo_open(0);
    fill(d.fd);
    p_start(&d, do_close_later, 50); /* with unread data: a reset */
    ERR2(send(d.fd, "x", 1, MSG_NOSIGNAL), ECONNRESET, EPIPE);
    p_finish(&d);
}

CASE(reset)
{
    struct duo d = duo_open(0);
    char got[4];
    p_reset(&d);
    ERR(recv(d.fd, got, 4, 0), ECONNRESET);
    EQ(recv(d.fd, got, 4, 0), 0);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    ERR(getpeername(d.fd, (struct sockaddr *)&(struct sockaddr_storage){0}, &(socklen_t){100}), ENOTCONN);
}

CASE(reset_with_data_waiting)
{
    struct duo d = duo_open(0);
    char got[8];
    p_send(&d, "lost?");
    AWAIT_BYTES(d.fd, 5);
    p_reset(&d);
    AWAIT(d.fd, POLLERR);
    EQ(recv(d.fd, got, 8, 0), 5); /* Linux: what had come is still there, and the error comes after it */
    ERR(recv(d.fd, got, 8, 0), ECONNRESET);
    EQ(recv(d.fd, got, 8, 0), 0);
}

CASE(reset_here)
{
    struct duo d = duo_open(0);
    struct linger now = {.l_onoff = 1, .l_linger = 0}, seen;
    socklen_t len = sizeof seen;
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
    MUST(getsockopt(d.fd, SOL_SOCKET, SO_LINGER, &seen, &len));
    EQ(seen.l_onoff, 1);
    MUST(close(d.fd));
    P_WANT_ERROR(&d, ECONNRESET);
    P_WANT_EOF(&d);
}

CASE(reset_unblocks_receive)
{
    struct duo d = duo_open(0);
    char got[4];
    p_send(&d, "ab");
    WANT(d.fd, "ab");
    PUT(d.fd, "unread"); /* so the puppet's close is a reset */
    p_start(&d, do_close_later, 50);
    ERR(recv(d.fd, got, 4, 0), ECONNRESET);
    p_finish(&d);
}

CASE(linger_waits_for_delivery)
{
    struct duo d = duo_open(0);
    struct linger wait = {.l_onoff = 1, .l_linger = 10};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_LINGER, &wait, sizeof wait));
    p_start(&d, do_recv_pattern, 8 << 20);
    SEND_PATTERN(d.fd, 8 << 20);
    MUST(close(d.fd));
    EQ(p_finish(&d), 0);
    P_WANT_EOF(&d);
}

static long do_send_forever(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    char block[10000];
    for (uint64_t at = 0;; at += sizeof block) {
        pattern(0, at, block, sizeof block);
        for (size_t done = 0; done < sizeof block;) {
            ssize_t n = send(*fd, block + done, sizeof block - done, MSG_NOSIGNAL);
            if (n < 0)
                return -errno;
            done += (size_t)n;
        }
    }
}

CASE(kill_sender, .process = true)
{
    struct duo d = duo_open(0);
    char block[65536];
    p_start(&d, do_send_forever, 0);
    uint64_t total = 0;
    bool killed = false;
    for (;;) {
        ssize_t n = recv(d.fd, block, sizeof block, 0);
        if (n <= 0) { /* the end, or a reset if it died with something unread */
            CHECK(killed && (n == 0 || errno == ECONNRESET), "expected EOF after the kill, saw %zd %s", n, strerror(errno));
            break;
        }
        int64_t wrong = pattern_differs(0, total, block, (size_t)n);
        CHECK(wrong < 0, "expected the pattern, saw another byte at %lld", (long long)wrong);
        total += (uint64_t)n;
        if (!killed && total > 20 << 20) {
            peer_kill(&d);
            killed = true;
        }
    }
}

CASE(kill_receiver, .process = true)
{
    struct duo d = duo_open(0);
    char block[65536];
    p_start(&d, do_discard, 0);
    memset(block, 7, sizeof block);
    ssize_t n;
    int64_t end = now_ms() + 15000;
    for (uint64_t total = 0; (n = send(d.fd, block, sizeof block, MSG_NOSIGNAL)) > 0; total += (uint64_t)n) {
        if (total <= 20 << 20 && total + (uint64_t)n > 20 << 20)
            peer_kill(&d);
        CHECK(now_ms() < end, "expected an error soon after the kill, saw sends go on");
    }
    CHECK(errno == ECONNRESET || errno == EPIPE, "expected ECONNRESET or EPIPE, saw %s", strerror(errno));
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EPIPE);
}

CASE(kill_idle_peer, .process = true)
{
    struct duo d = duo_open(0);
    p_send(&d, "tail");
    AWAIT_BYTES(d.fd, 4);
    peer_kill(&d);
    AWAIT(d.fd, POLLRDHUP);
    WANT(d.fd, "tail");
    WANT_EOF(d.fd);
}

/*
 * A puppet that has received bytes one by one, asleep between them, and has never sent any. (Under the shim, what
 * woke it may lie unread where it slept, and its kernel answers its death with a reset.)
 */
static struct duo woken_puppet(void)
{
    struct duo d = duo_open(COLD);
    p_start(&d, do_recv_pattern, 60);
    for (uint64_t i = 0; i < 60; i++) {
        char byte;
        sleep_ms(2);
        pattern(0, i, &byte, 1);
        put(HERE, d.fd, &byte, 1);
    }
    EQ(p_finish(&d), 0);
    return d;
}

enum { BY_POLL, BY_SELECT, BY_EPOLL, BY_OPTION, BY_RECEIVE, WAYS };

/* Looks at a connection whose peer has died, in each way, another one first each time. */
static void look_in_all_ways(bool unread)
{
    for (int first = 0; first < WAYS; first++) {
        struct duo d = woken_puppet();
        int level = (int)MUST(epoll_create1(0)), edge = (int)MUST(epoll_create1(0));
        int none = POLLIN | POLLOUT | POLLRDHUP | (unread ? POLLHUP : 0); /* all but an error */
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP}, events[8];
        bool error = unread; /* not reported yet */
        MUST(epoll_ctl(level, EPOLL_CTL_ADD, d.fd, &event));
        event.events |= EPOLLET;
        MUST(epoll_ctl(edge, EPOLL_CTL_ADD, d.fd, &event));
        EQ(epoll_wait(edge, events, 8, 1000), 1);
        EQ(events[0].events, EPOLLOUT);
        if (unread)
            PUT(d.fd, "never read");
        peer_kill(&d);
        sleep_ms(20);
        for (int i = 0; i < WAYS; i++) {
            int seen = none | (error ? POLLERR : 0);
            fd_set in, out, urgent;
            char got[4];
            switch ((first + i) % WAYS) {
            case BY_POLL:
                EQ(events_of(d.fd, POLLIN | POLLOUT | POLLRDHUP, 1000), seen);
                EQ(events_of(d.fd, POLLIN | POLLOUT | POLLRDHUP | POLLPRI, 0), seen);
                EQ(events_of(d.fd, POLLOUT, 0), seen & ~(POLLIN | POLLRDHUP));
                EQ(events_of(d.fd, 0, 0), seen & (POLLERR | POLLHUP));
                break;
            case BY_SELECT:
                FD_ZERO(&in);
                FD_SET(d.fd, &in);
                out = urgent = in;
                EQ(select(d.fd + 1, &in, &out, &urgent, &(struct timeval){1, 0}), 2);
                EQ(FD_ISSET(d.fd, &urgent) != 0, 0);
                break;
            case BY_EPOLL:
                EQ(epoll_wait(level, events, 8, 1000), 1);
                EQ(events[0].events, seen); /* the bits are those of poll() */
                EQ(epoll_wait(edge, events, 8, 1000), 1);
                EQ(events[0].events, seen);
                EQ(epoll_wait(edge, events, 8, 0), 0);
                break;
            case BY_OPTION:
                EQ(get_int(d.fd, SOL_SOCKET, SO_ERROR), error ? ECONNRESET : 0);
                error = false;
                break;
            default:
                if (error)
                    ERR(recv(d.fd, got, sizeof got, 0), ECONNRESET);
                error = false;
                WANT_EOF(d.fd);
            }
        }
        EQ(events_of(d.fd, POLLIN | POLLOUT | POLLRDHUP, 0), none);
        EQ(get_int(d.fd, SOL_SOCKET, SO_ERROR), 0);
        EQ(epoll_wait(edge, events, 8, 0), 0);
        MUST(close(level));
        MUST(close(edge));
        MUST(close(d.fd));
    }
}

CASE(kill_woken_peer, .process = true) { look_in_all_ways(false); }
CASE(kill_woken_peer_with_unread_data, .process = true) { look_in_all_ways(true); }

CASE(kill_woken_peer_ends_waits_for_room, .process = true)
{
    for (int way = 0; way < 2; way++) {
        struct duo d = woken_puppet();
        int set = (int)MUST(epoll_create1(0));
        struct epoll_event event = {.events = EPOLLOUT};
        fill(d.fd);
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
        pid_t killer = (pid_t)MUST(fork());
        if (killer == 0) {
            sleep_ms(60);
            kill(peer_pid(&d), SIGKILL);
            _exit(0);
        }
        if (way == 0) {
            EQ(events_of(d.fd, POLLOUT, 10000), POLLOUT | POLLERR | POLLHUP);
        } else {
            EQ(epoll_wait(set, &event, 1, 10000), 1);
            EQ(event.events, EPOLLOUT | EPOLLERR | EPOLLHUP);
        }
        WAIT_CHILD(killer);
        MUST(close(set));
        MUST(close(d.fd));
    }
}

CASE(close_of_a_woken_peer_after_shutdown)
{
    struct duo d = woken_puppet();
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    MUST(shutdown(d.fd, SHUT_WR));
    P_WANT_EOF(&d);
    p_close(&d);
    AWAIT(d.fd, POLLRDHUP);
    EQ(events_of(d.fd, POLLIN | POLLOUT, 0), POLLIN | POLLOUT | POLLHUP);
    EQ(events_of(d.fd, POLLOUT, 0), POLLOUT | POLLHUP);
    EQ(events_of(d.fd, 0, 0), POLLHUP);
    EQ(epoll_wait(set, &event, 1, 1000), 1);
    EQ(event.events, EPOLLIN | EPOLLHUP);
    WANT_EOF(d.fd);
}

CASE(kill_polled_peer, .process = true)
{
    for (int i = 0; i < 2; i++) { /* by calls that never wait */
        struct duo d = i ? woken_puppet() : duo_open(0);
        EQ(events_of(d.fd, POLLIN | POLLRDHUP, 0), 0);
        EQ(events_of(d.fd, POLLIN | POLLRDHUP, 0), 0);
        peer_kill(&d);
        int64_t end = now_ms() + 5000;
        while (!events_of(d.fd, POLLIN | POLLRDHUP, 0) && now_ms() < end)
            ;
        EQ(events_of(d.fd, POLLIN | POLLRDHUP, 0), POLLIN | POLLRDHUP);
        WANT_EOF(d.fd);
    }
}

CASE(kill_peer_while_blocked, .process = true)
{
    struct duo d = duo_open(0);
    pid_t killer = (pid_t)MUST(fork());
    if (killer == 0) {
        sleep_ms(60);
        kill(peer_pid(&d), SIGKILL);
        _exit(0);
    }
    char got[4];
    EQ(recv(d.fd, got, 4, 0), 0);
    WAIT_CHILD(killer);
}

CASE(stopped_peer_is_not_dead, .process = true)
{
    struct duo d = duo_open(0);
    char got[4];
    MUST(kill(peer_pid(&d), SIGSTOP));
    struct timeval limit = {0, 100000};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    ERR(recv(d.fd, got, 4, 0), EAGAIN);
    PUT(d.fd, "wait for it");
    EQ(events_of(d.fd, POLLIN | POLLOUT, 0), POLLOUT);
    MUST(kill(peer_pid(&d), SIGCONT));
    P_WANT(&d, "wait for it");
}

CASE(reconnect_again_and_again)
{
    struct duo d = duo_open(COLD);
    for (int i = 0; i < 100; i++) {
        struct duo e = duo_more(&d, COLD);
        PUT(e.fd, "hello");
        P_WANT(&e, "hello");
        p_send(&e, "hi");
        WANT(e.fd, "hi");
        if (i % 3 == 0) {
            p_close(&e);
            WANT_EOF(e.fd);
            MUST(close(e.fd));
        } else {
            MUST(close(e.fd));
            P_WANT_EOF(&e);
            p_close(&e);
        }
    }
    PUT(d.fd, "first");
    P_WANT(&d, "first");
}

CASE(connect_refused)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    MUST(close(listener));
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    ERR(connect(fd, (struct sockaddr *)&at, len), ECONNREFUSED);
    MUST(close(fd));
    fd = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    int got = connect(fd, (struct sockaddr *)&at, len);
    CHECK(got == -1 && (errno == EINPROGRESS || errno == ECONNREFUSED), "expected a refusal, saw %d", got);
    if (errno == EINPROGRESS) {
        AWAIT(fd, POLLOUT);
        EQ(get_int(fd, SOL_SOCKET, SO_ERROR), ECONNREFUSED);
        EQ(get_int(fd, SOL_SOCKET, SO_ERROR), 0);
    }
}

CASE(disconnect_with_unspec)
{
    struct duo d = duo_open(0);
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    PUT(d.fd, "x");
    P_WANT(&d, "x");
    MUST(connect(d.fd, &none, sizeof none)); /* dissolves the connection: the peer sees a reset */
    P_WANT_ERROR(&d, ECONNRESET);
    char got[4];
    ERR2(recv(d.fd, got, 4, 0), ECONNRESET, ENOTCONN);
}
