/*
 * poll and select: which events there are, when they come, how long the calls wait.
 */
#include "sockconf.h"

CASE(poll_states)
{
    struct duo d = duo_open(0);
    int all = POLLIN | POLLOUT | POLLPRI | POLLRDHUP | POLLRDNORM | POLLWRNORM;
    EQ(events_of(d.fd, all, 0), POLLOUT | POLLWRNORM);
    EQ(events_of(d.fd, POLLIN, 0), 0);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    EQ(events_of(d.fd, all, 0), POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM);
    WANT(d.fd, "x");
    EQ(events_of(d.fd, all, 0), POLLOUT | POLLWRNORM);
    p_shutdown(&d, SHUT_WR);
    AWAIT(d.fd, POLLRDHUP);
    EQ(events_of(d.fd, all, 0), POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM | POLLRDHUP);
    EQ(events_of(d.fd, POLLOUT, 0), POLLOUT);
    MUST(shutdown(d.fd, SHUT_WR));
    AWAIT(d.fd, POLLHUP);
    EQ(events_of(d.fd, POLLOUT | POLLIN | POLLRDHUP, 0), POLLIN | POLLOUT | POLLRDHUP | POLLHUP);
    EQ(events_of(d.fd, 0, 0), POLLHUP);
}

CASE(poll_reset)
{
    struct duo d = duo_open(0);
    p_reset(&d);
    AWAIT(d.fd, POLLERR);
    EQ(events_of(d.fd, POLLIN | POLLOUT | POLLRDHUP, 0), POLLIN | POLLOUT | POLLRDHUP | POLLERR | POLLHUP);
    EQ(get_int(d.fd, SOL_SOCKET, SO_ERROR), ECONNRESET);
    EQ(get_int(d.fd, SOL_SOCKET, SO_ERROR), 0);
    WANT_EOF(d.fd);
}

CASE(poll_waits)
{
    struct duo d = duo_open(0);
    int64_t start = now_ms();
    EQ(events_of(d.fd, POLLIN, 50), 0);
    int64_t took = now_ms() - start;
    CHECK(took >= 49, "expected to wait 50 ms, saw %lld", (long long)took);
    TIMELY(took < 4000, "expected to wait 50 ms, saw %lld", (long long)took);
    p_start(&d, do_send_later, 60);
    start = now_ms();
    EQ(events_of(d.fd, POLLIN, -1), POLLIN);
    took = now_ms() - start;
    TIMELY(took >= 55, "expected to be woken after 60 ms, saw %lld", (long long)took);
    p_finish(&d);
    WANT(d.fd, "late");
    p_start(&d, do_shutdown_later, 30);
    EQ(events_of(d.fd, POLLRDHUP, 10000), POLLRDHUP);
    p_finish(&d);
    WANT_EOF(d.fd);
}

CASE(poll_error_ends_the_wait)
{
    struct duo d = duo_open(0);
    p_start(&d, do_close_later, 30);
    EQ(events_of(d.fd, POLLIN, 10000), POLLIN);
    p_finish(&d);
    WANT_EOF(d.fd);
}

CASE(poll_set)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int lines[2], count = eventfd(0, 0);
    MUST(pipe(lines));
    struct pollfd set[] = {{.fd = d.fd, .events = POLLIN}, {.fd = -7, .events = POLLIN},     {.fd = lines[0], .events = POLLIN},
                           {.fd = e.fd, .events = POLLIN}, {.fd = 999, .events = POLLIN},    {.fd = count, .events = POLLIN},
                           {.fd = d.fd, .events = POLLOUT}};
    for (int i = 0; i < 7; i++)
        set[i].revents = -1;
    EQ(poll(set, 7, 1000), 2);
    EQ(set[0].revents, 0);
    EQ(set[1].revents, 0);
    EQ(set[4].revents, POLLNVAL);
    EQ(set[6].revents, POLLOUT);
    set[4].fd = -1;
    EQ(poll(set, 6, 20), 0);
    p_send(&e, "x");
    EQ(poll(set, 6, 10000), 1);
    EQ(set[3].revents, POLLIN);
    EQ(write(lines[1], "p", 1), 1);
    EQ(poll(set, 6, 10000), 2);
    EQ(set[2].revents, POLLIN);
    p_send(&d, "y");
    AWAIT(d.fd, POLLIN);
    EQ(poll(set, 6, 0), 3);
    EQ(poll(NULL, 0, 5), 0);
    WANT(d.fd, "y");
    WANT(e.fd, "x");
}

static void *write_later(void *arg)
{
    sleep_ms(50);
    write((int)(intptr_t)arg, "w", 1) == 1 ? (void)0 : abort();
    return NULL;
}

CASE(poll_woken_by_another_fd)
{
    struct duo d = duo_open(0);
    int lines[2];
    pthread_t thread;
    MUST(pipe(lines));
    EQ(pthread_create(&thread, NULL, write_later, (void *)(intptr_t)lines[1]), 0);
    struct pollfd set[] = {{.fd = d.fd, .events = POLLIN}, {.fd = lines[0], .events = POLLIN}};
    EQ(poll(set, 2, 10000), 1);
    EQ(set[1].revents, POLLIN);
    pthread_join(thread, NULL);
    p_start(&d, do_send_later, 40);
    set[1].fd = -1;
    EQ(poll(set, 2, 10000), 1);
    EQ(set[0].revents, POLLIN);
    p_finish(&d);
    WANT(d.fd, "late");
}

static volatile sig_atomic_t hits;
static void count_hit(int signal_no)
{
    (void)signal_no;
    hits++;
}

CASE(ppoll_mask_and_time)
{
    struct duo d = duo_open(0);
    struct sigaction action = {.sa_handler = count_hit};
    sigset_t usr1, none, now;
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    raise(SIGUSR1);
    struct pollfd watch = {.fd = d.fd, .events = POLLIN};
    struct timespec limit = {0, 40000000}, kept = limit;
    int64_t start = now_ms();
    EQ(ppoll(&watch, 1, &limit, NULL), 0);
    CHECK(now_ms() - start >= 39, "expected to wait 40 ms, saw %lld", (long long)(now_ms() - start));
    EQ(limit.tv_nsec, kept.tv_nsec); /* glibc keeps it const */
    EQ(hits, 0);
    limit.tv_sec = 10;
    ERR(ppoll(&watch, 1, &limit, &none), EINTR); /* the pending signal gets in */
    EQ(hits, 1);
    MUST(sigprocmask(SIG_BLOCK, NULL, &now));
    EQ(sigismember(&now, SIGUSR1), 1);
    p_send(&d, "x");
    EQ(ppoll(&watch, 1, NULL, &none), 1);
    limit.tv_nsec = -1;
    ERR(ppoll(&watch, 1, &limit, NULL), EINVAL);
    WANT(d.fd, "x");
}

CASE(poll_out_fills_and_drains)
{
    struct duo d = duo_open(0);
    size_t sent = fill(d.fd);
    EQ(events_of(d.fd, POLLOUT, 0), 0);
    EQ(events_of(d.fd, POLLOUT, 30), 0);
    p_start(&d, do_recv_pattern, (long)sent);
    EQ(events_of(d.fd, POLLOUT, 10000), POLLOUT);
    EQ(p_finish(&d), 0);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

static int pick(int fd, int which, int ms)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    struct timeval limit = {ms / 1000, ms % 1000 * 1000};
    int n = select(fd + 1, which == 0 ? &set : NULL, which == 1 ? &set : NULL, which == 2 ? &set : NULL,
                   ms < 0 ? NULL : &limit);
    if (n >= 0 && n != (FD_ISSET(fd, &set) != 0))
        return -2;
    return n;
}

CASE(select_states)
{
    struct duo d = duo_open(0);
    EQ(pick(d.fd, 0, 0), 0);
    EQ(pick(d.fd, 1, 0), 1);
    EQ(pick(d.fd, 2, 0), 0);
    int64_t start = now_ms();
    EQ(pick(d.fd, 0, 40), 0);
    CHECK(now_ms() - start >= 39, "expected to wait 40 ms, saw %lld", (long long)(now_ms() - start));
    p_start(&d, do_send_later, 40);
    EQ(pick(d.fd, 0, -1), 1);
    p_finish(&d);
    WANT(d.fd, "late");
    size_t sent = fill(d.fd);
    EQ(pick(d.fd, 1, 0), 0);
    p_start(&d, do_recv_pattern, (long)sent);
    EQ(pick(d.fd, 1, 10000), 1);
    EQ(p_finish(&d), 0);
    p_close(&d);
    EQ(pick(d.fd, 0, 10000), 1);
    WANT_EOF(d.fd);
    ERR(select(-1, NULL, NULL, NULL, NULL), EINVAL);
    int gone = (int)MUST(dup(d.fd));
    MUST(close(gone));
    ERR(pick(gone, 0, 0), EBADF);
}

CASE(select_mixed)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int lines[2];
    MUST(pipe(lines));
    int top = (d.fd > e.fd ? d.fd : e.fd) > lines[1] ? (d.fd > e.fd ? d.fd : e.fd) : lines[1];
    for (int round = 0; round < 20; round++) {
        fd_set in, out;
        FD_ZERO(&in);
        FD_ZERO(&out);
        FD_SET(d.fd, &in);
        FD_SET(e.fd, &in);
        FD_SET(lines[0], &in);
        FD_SET(d.fd, &out);
        FD_SET(lines[1], &out);
        struct timeval limit = {5, 0};
        if (round % 2) {
            p_send(&e, "x");
            AWAIT(e.fd, POLLIN);
        }
        EQ(select(top + 1, &in, &out, NULL, &limit), 2 + round % 2);
        EQ(FD_ISSET(e.fd, &in) != 0, round % 2);
        EQ(FD_ISSET(d.fd, &out) != 0, 1);
        EQ(FD_ISSET(d.fd, &in) != 0, 0);
        if (round % 2)
            WANT(e.fd, "x");
    }
}

CASE(select_leaves_the_time_left)
{
    struct duo d = duo_open(0);
    fd_set in;
    FD_ZERO(&in);
    FD_SET(d.fd, &in);
    struct timeval limit = {10, 0};
    p_start(&d, do_send_later, 50);
    EQ(select(d.fd + 1, &in, NULL, NULL, &limit), 1);
    TIMELY(limit.tv_sec == 9, "expected Linux to leave 9.9 s, saw %ld.%06ld", (long)limit.tv_sec, (long)limit.tv_usec);
    p_finish(&d);
    WANT(d.fd, "late");
}

CASE(pselect_mask)
{
    struct duo d = duo_open(0);
    hits = 0;
    struct sigaction action = {.sa_handler = count_hit};
    sigset_t usr1, none;
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    raise(SIGUSR1);
    fd_set in;
    FD_ZERO(&in);
    FD_SET(d.fd, &in);
    struct timespec limit = {0, 30000000};
    EQ(pselect(d.fd + 1, &in, NULL, NULL, &limit, NULL), 0);
    EQ(limit.tv_nsec, 30000000);
    FD_SET(d.fd, &in);
    limit.tv_sec = 10;
    ERR(pselect(d.fd + 1, &in, NULL, NULL, &limit, &none), EINTR);
    EQ(hits, 1);
    p_send(&d, "x");
    FD_SET(d.fd, &in);
    EQ(pselect(d.fd + 1, &in, NULL, NULL, NULL, &none), 1);
    WANT(d.fd, "x");
}

CASE(urgent_in_select)
{
    struct duo d = duo_open(0);
    char got;
    EQ(send(d.fd, "!", 1, MSG_OOB), 1);
    struct duo e = duo_more(&d, COLD);
    (void)e;
    EQ(pick(d.fd, 2, 0), 0);
    EQ(recv(d.fd, &got, 1, MSG_OOB | MSG_DONTWAIT) == -1, 1);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

CASE(listener_readiness)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    EQ(events_of(listener, POLLIN | POLLOUT, 0), 0);
    int client = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
    ERR(connect(client, (struct sockaddr *)&at, len), EINPROGRESS);
    AWAIT(listener, POLLIN);
    AWAIT(client, POLLOUT);
    EQ(get_int(client, SOL_SOCKET, SO_ERROR), 0);
    EQ(connect(client, (struct sockaddr *)&at, len), 0);
    ERR(connect(client, (struct sockaddr *)&at, len), EISCONN);
    int server = (int)MUST(accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC));
    EQ(fcntl(server, F_GETFL), O_RDWR | O_NONBLOCK);
    EQ(fcntl(server, F_GETFD), FD_CLOEXEC);
    set_nonblock(listener, true);
    ERR(accept(listener, NULL, NULL), EAGAIN);
    for (int i = 0; i < 200; i++) {
        char got[8];
        EQ(send(client, "abcd", 4, 0), 4);
        AWAIT(server, POLLIN);
        EQ(recv(server, got, 8, 0), 4);
        EQ(send(server, "efgh", 4, 0), 4);
        AWAIT(client, POLLIN);
        EQ(recv(client, got, 8, 0), 4);
    }
}
