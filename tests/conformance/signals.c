/*
 * Signals that arrive in the middle of socket calls.
 */
#include "sockconf.h"
#include <setjmp.h>

static volatile sig_atomic_t hits;
static int live_fd;

static void count_hit(int signal_no)
{
    (void)signal_no;
    hits++;
}

static void handle(int signal_no, void (*handler)(int), int flags)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    hits = 0;
    MUST(sigaction(signal_no, &action, NULL));
}

/* Sends SIGUSR1 to the thread that started it, again and again, so that one surely hits a blocked call. */
struct pest {
    pthread_t thread, target;
    atomic_int stop;
    int first_ms, period_us;
};

static void *pester(void *arg)
{
    struct pest *p = arg;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    sleep_ms(p->first_ms);
    while (!atomic_load(&p->stop)) {
        pthread_kill(p->target, SIGUSR1);
        usleep((useconds_t)p->period_us);
    }
    return NULL;
}

static void pest_start(struct pest *p, int first_ms, int period_us)
{
    *p = (struct pest){.target = pthread_self(), .first_ms = first_ms, .period_us = period_us};
    EQ(pthread_create(&p->thread, NULL, pester, p), 0);
}

static void pest_stop(struct pest *p)
{
    atomic_store(&p->stop, 1);
    EQ(pthread_join(p->thread, NULL), 0);
}

/* The call fails with EINTR after at least one signal. */
#define INTERRUPTED(expression)                                                                \
    do {                                                                                       \
        struct pest pest_;                                                                     \
        hits = 0;                                                                              \
        pest_start(&pest_, 40, 20000);                                                         \
        ERR(expression, EINTR);                                                                \
        EQ(hits > 0, 1);                                                                       \
        pest_stop(&pest_);                                                                     \
    } while (0)

CASE(eintr_receive)
{
    struct duo d = duo_open(0);
    char got[8];
    struct iovec in = {got, sizeof got};
    struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1};
    struct mmsghdr many = {.msg_hdr = msg};
    handle(SIGUSR1, count_hit, 0);
    INTERRUPTED(recv(d.fd, got, sizeof got, 0));
    INTERRUPTED(read(d.fd, got, sizeof got));
    INTERRUPTED(readv(d.fd, &in, 1));
    INTERRUPTED(recvmsg(d.fd, &msg, 0));
    INTERRUPTED(recvfrom(d.fd, got, sizeof got, MSG_PEEK, NULL, NULL));
    INTERRUPTED(recvmmsg(d.fd, &many, 1, 0, NULL));
    p_send(&d, "fine");
    WANT(d.fd, "fine");
}

CASE(eintr_waits)
{
    struct duo d = duo_open(0);
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    struct pollfd watch = {.fd = d.fd, .events = POLLIN};
    struct timeval limit = {10, 0};
    fd_set in;
    for (int restart = 0; restart < 2; restart++) { /* these are never started again, whatever the handler asks */
        handle(SIGUSR1, count_hit, restart ? SA_RESTART : 0);
        INTERRUPTED(poll(&watch, 1, 10000));
        INTERRUPTED(poll(&watch, 1, -1));
        INTERRUPTED(ppoll(&watch, 1, NULL, NULL));
        INTERRUPTED(epoll_wait(set, &event, 1, 10000));
        INTERRUPTED(epoll_wait(set, &event, 1, -1));
        INTERRUPTED(epoll_pwait(set, &event, 1, -1, NULL));
        FD_ZERO(&in);
        FD_SET(d.fd, &in);
        limit = (struct timeval){10, 0};
        INTERRUPTED(select(d.fd + 1, &in, NULL, NULL, &limit));
        EQ(FD_ISSET(d.fd, &in) != 0, 1); /* untouched */
        INTERRUPTED(pselect(d.fd + 1, &in, NULL, NULL, NULL, NULL));
    }
    p_send(&d, "fine");
    WANT(d.fd, "fine");
}

CASE(restart_receive)
{
    struct duo d = duo_open(0);
    struct pest pest;
    char got[8];
    handle(SIGUSR1, count_hit, SA_RESTART);
    for (int i = 0; i < 3; i++) {
        hits = 0;
        pest_start(&pest, 10, 10000);
        p_start(&d, do_send_later, 150);
        EQ(i == 0 ? recv(d.fd, got, sizeof got, 0) : i == 1 ? read(d.fd, got, sizeof got)
                                                            : recv(d.fd, got, 4, MSG_WAITALL), 4);
        pest_stop(&pest);
        EQ(p_finish(&d), 0);
        TIMELY(hits > 0, "expected signals during the wait, saw none");
        EQ(memcmp(got, "late", 4), 0);
    }
}

CASE(time_limit_is_not_restarted)
{
    struct duo d = duo_open(0);
    char got[8];
    struct timeval limit = {8, 0};
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    handle(SIGUSR1, count_hit, SA_RESTART);
    INTERRUPTED(recv(d.fd, got, sizeof got, 0)); /* with a time limit set: EINTR even so */
}

CASE(eintr_send)
{
    struct duo d = duo_open(0);
    handle(SIGUSR1, count_hit, 0);
    size_t sent = fill(d.fd);
    INTERRUPTED(send(d.fd, "x", 1, 0));
    INTERRUPTED(write(d.fd, "x", 1));
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    size_t size = 64 << 20;
    char *big = malloc(size);
    pattern(0, 0, big, size);
    struct pest pest;
    pest_start(&pest, 60, 20000);
    ssize_t part = send(d.fd, big, size, 0); /* something went already: that is the answer */
    pest_stop(&pest);
    CHECK(part > 0 && (size_t)part < size, "expected part of 64 MiB, saw %zd", part);
    EQ(p_do(&d, do_recv_pattern, part), 0);
}

static long do_drain_later(int *fd, void *bytes, size_t len, long count)
{
    sleep_ms(150);
    return do_recv_pattern(fd, bytes, len, count);
}

static void tick(int first_ms, int every_ms)
{
    struct itimerval times = {{0, every_ms * 1000}, {0, first_ms * 1000}};
    MUST(setitimer(ITIMER_REAL, &times, NULL));
}

/* A send that waits for room while a handler that restarts calls runs again and again. */
static void restarted_send(const struct duo *d)
{
    size_t sent = fill(d->fd);
    handle(SIGALRM, count_hit, SA_RESTART);
    tick(10, 10);
    p_start(d, do_drain_later, (long)sent);
    EQ(send(d->fd, "x", 1, 0), 1);
    tick(0, 0);
    EQ(p_finish(d), 0);
    TIMELY(hits > 1, "expected signals during the wait, saw %d", (int)hits);
    P_WANT(d, "x");
}

CASE(restart_send)
{
    struct duo d = duo_open(0);
    restarted_send(&d);
    pid_t pid = (pid_t)MUST(fork()); /* with another process that has the connection */
    if (pid == 0) {
        pause();
        _exit(1);
    }
    restarted_send(&d);
    MUST(kill(pid, SIGKILL));
    MUST(waitpid(pid, NULL, 0));
    struct timeval limit = {8, 0}; /* the other direction's */
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    restarted_send(&d);
    MUST(setsockopt(d.fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit));
    fill(d.fd);
    handle(SIGUSR1, count_hit, SA_RESTART);
    INTERRUPTED(send(d.fd, "x", 1, 0)); /* with a time limit set: EINTR even so */
}

static volatile sig_atomic_t alarms;

static void count_alarm(int signal_no)
{
    (void)signal_no;
    alarms++;
}

/* The state of a thread as the kernel has it: S while it sleeps. */
static char thread_state(pid_t id)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)id);
    int fd = (int)MUST(open(path, O_RDONLY | O_CLOEXEC));
    ssize_t got = MUST(raw_call(SYS_read, fd, (long)text, sizeof text - 1, 0, 0, 0));
    text[got] = 0;
    close(fd);
    char *end = strrchr(text, ')');
    return end && end[1] == ' ' ? end[2] : '?';
}

/* Sends one signal after the other to a thread, each while it sleeps in its call. */
struct conductor {
    pthread_t thread, target;
    pid_t id;
    atomic_int inside;
};

enum { BEATS = 5 };

static void *conduct(void *arg)
{
    struct conductor *c = arg;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    while (!atomic_load(&c->inside))
        sleep_ms(1);
    for (int beat = 0; beat <= BEATS; beat++) {
        while (hits < beat || thread_state(c->id) != 'S')
            sleep_ms(1);
        pthread_kill(c->target, beat < BEATS ? SIGUSR1 : SIGALRM);
    }
    return NULL;
}

CASE(restart_send_beside_threads)
{
    struct duo d = duo_open(0);
    struct pest pest;
    handle(SIGUSR1, count_hit, SA_RESTART);
    pest_start(&pest, 0, 1000000); /* a second thread, which disturbs nobody yet */
    restarted_send(&d);
    pest_stop(&pest);
    /* Two handlers: the one that restarts calls does not end the wait, the other one does. */
    struct conductor conductor = {.target = pthread_self(), .id = (pid_t)syscall(SYS_gettid)};
    size_t sent = fill(d.fd);
    handle(SIGALRM, count_alarm, 0);
    handle(SIGUSR1, count_hit, SA_RESTART);
    alarms = 0;
    EQ(pthread_create(&conductor.thread, NULL, conduct, &conductor), 0);
    atomic_store(&conductor.inside, 1);
    ERR(send(d.fd, "x", 1, 0), EINTR);
    EQ(alarms, 1);
    EQ(hits, BEATS);
    EQ(pthread_join(conductor.thread, NULL), 0);
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

CASE(eintr_send_before_unread_bytes)
{
    struct duo d = duo_open(COLD);
    p_send(&d, "unread"); /* from before any promotion: it lies where a sender would sleep */
    for (int i = 0; i < 40; i++) {
        PUT(d.fd, "x");
        P_WANT(&d, "x");
        sleep_ms(1);
    }
    handle(SIGUSR1, count_hit, 0);
    size_t sent = fill(d.fd);
    INTERRUPTED(send(d.fd, "x", 1, 0));
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    WANT(d.fd, "unread");
}

/*
 * A signal that comes while a call sleeps ends it, at whatever moment: also between two sleeps of one wait. One thread looks until
 * the other one sleeps in its call, lets some time pass that is another one each time, and sends one signal. On a machine of any
 * load, nothing else ends the call.
 */
enum { SHOTS = 150, LOOKS = 100000 }; /* ten seconds, of a process that is not stopped */

struct sniper {
    pthread_t thread, target;
    pid_t id;
    atomic_int aimed; /* the number of the call that is under way, 0 for none */
    atomic_int stop;
};

static void busy_us(int us)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t end = now.tv_sec * 1000000000LL + now.tv_nsec + us * 1000LL;
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec * 1000000000LL + now.tv_nsec < end);
}

static void *snipe(void *arg)
{
    struct sniper *s = arg;
    sigset_t all;
    uint32_t seed = 1;
    int shot = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    while (!atomic_load(&s->stop)) {
        int aimed = atomic_load(&s->aimed);
        if (aimed == shot || aimed == 0 || thread_state(s->id) != 'S') {
            usleep(50);
            continue;
        }
        shot = aimed;
        busy_us((int)(dice(&seed) % 3000));
        pthread_kill(s->target, SIGUSR1);
        for (int looks = 0; atomic_load(&s->aimed) == shot; looks++) {
            CHECK(looks < LOOKS, "expected signal number %d to end the call, saw it sleep on", shot);
            usleep(100);
        }
    }
    return NULL;
}

static void sniper_start(struct sniper *s)
{
    *s = (struct sniper){.target = pthread_self(), .id = (pid_t)syscall(SYS_gettid)};
    handle(SIGUSR1, count_hit, 0);
    EQ(pthread_create(&s->thread, NULL, snipe, s), 0);
}

static void sniper_stop(struct sniper *s)
{
    atomic_store(&s->stop, 1);
    EQ(pthread_join(s->thread, NULL), 0);
}

/* Each of many calls ends with EINTR by one signal. */
#define SHOT_DEAD(expression)                                                                  \
    do {                                                                                       \
        struct sniper sniper_;                                                                 \
        sniper_start(&sniper_);                                                                \
        for (int shot_ = 1; shot_ <= SHOTS; shot_++) {                                         \
            atomic_store(&sniper_.aimed, shot_);                                               \
            ERR(expression, EINTR);                                                            \
            atomic_store(&sniper_.aimed, 0);                                                   \
            EQ(hits, shot_);                                                                   \
        }                                                                                      \
        sniper_stop(&sniper_);                                                                 \
    } while (0)

CASE(each_signal_ends_a_send, .seconds = 120)
{
    struct duo d = duo_open(0);
    size_t sent = fill(d.fd);
    SHOT_DEAD(send(d.fd, "x", 1, 0));
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

/* A byte that was there before any promotion lies where a sender, or a poll for room, would sleep. */
static size_t fill_before_unread_bytes(struct duo *d)
{
    *d = duo_open(COLD);
    p_send(d, "unread");
    for (int i = 0; i < 40; i++) {
        PUT(d->fd, "x");
        P_WANT(d, "x");
        sleep_ms(1);
    }
    return fill(d->fd);
}

CASE(each_signal_ends_a_send_before_unread_bytes, .seconds = 120)
{
    struct duo d;
    size_t sent = fill_before_unread_bytes(&d);
    SHOT_DEAD(send(d.fd, "x", 1, 0));
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    WANT(d.fd, "unread");
}

CASE(each_signal_ends_a_poll_before_unread_bytes, .seconds = 120)
{
    struct duo d;
    size_t sent = fill_before_unread_bytes(&d);
    struct pollfd room = {.fd = d.fd, .events = POLLOUT};
    fd_set out;
    FD_ZERO(&out);
    FD_SET(d.fd, &out);
    SHOT_DEAD(poll(&room, 1, -1));
    SHOT_DEAD(select(d.fd + 1, NULL, &out, NULL, NULL));
    sigset_t none, usr1;
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &usr1, NULL));
    SHOT_DEAD(ppoll(&room, 1, NULL, &none)); /* comes through in the call alone */
    MUST(sigprocmask(SIG_UNBLOCK, &usr1, NULL));
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    WANT(d.fd, "unread");
}

/* Sends a byte now and then, until it gets one. */
static long do_trickle(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    for (long sent = 0;; sent++) {
        struct pollfd stop = {.fd = *fd, .events = POLLIN};
        char byte = 't';
        if (poll(&stop, 1, 1) > 0)
            return recv(*fd, &byte, 1, 0) == 1 ? sent : -EPROTO;
        if (send(*fd, &byte, 1, 0) != 1)
            return -errno;
    }
}

CASE(each_signal_ends_a_receive_of_many, .seconds = 120)
{
    struct duo d = duo_open(0);
    struct sniper sniper;
    static char got[1 << 20];
    long received = 0;
    p_start(&d, do_trickle, 0);
    sniper_start(&sniper);
    for (int shot = 1; shot <= SHOTS; shot++) {
        AWAIT(d.fd, POLLIN); /* a part is there from the start */
        atomic_store(&sniper.aimed, shot);
        ssize_t part = recv(d.fd, got, sizeof got, MSG_WAITALL); /* of a megabyte, byte by byte */
        int code = errno;
        atomic_store(&sniper.aimed, 0);
        CHECK(part > 0, "expected a part, saw %zd with errno %d", part, code);
        EQ(hits, shot);
        received += part;
    }
    sniper_stop(&sniper);
    PUT(d.fd, "s");
    long sent = p_finish(&d);
    while (received < sent)
        received += MUST(recv(d.fd, got, sizeof got, 0));
    EQ(received, sent);
}

/* A call that has moved a part returns that when a handler has run, also one that restarts calls. */
CASE(a_part_is_not_restarted)
{
    struct duo d = duo_open(0);
    struct pest pest;
    size_t size = 64 << 20;
    char *big = malloc(size), got[16];
    pattern(0, 0, big, size);
    handle(SIGUSR1, count_hit, SA_RESTART);
    pest_start(&pest, 60, 20000);
    ssize_t part = send(d.fd, big, size, 0);
    pest_stop(&pest);
    CHECK(part > 0 && (size_t)part < size, "expected part of 64 MiB, saw %zd", part);
    EQ(p_do(&d, do_recv_pattern, part), 0);
    free(big);
    p_send(&d, "12345");
    AWAIT_BYTES(d.fd, 5);
    pest_start(&pest, 40, 20000);
    EQ(recv(d.fd, got, 10, MSG_WAITALL), 5);
    pest_stop(&pest);
}

struct writer {
    int fd, ms;
};

static void *write_later(void *arg)
{
    struct writer *w = arg;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    sleep_ms(w->ms);
    EQ(write(w->fd, "late", 4), 4);
    return NULL;
}

CASE(signals_in_a_splice)
{
    struct duo d = duo_open(0);
    int pipes[2];
    pthread_t thread;
    struct pest pest;
    MUST(pipe(pipes));
    handle(SIGUSR1, count_hit, 0);
    INTERRUPTED(splice(pipes[0], NULL, d.fd, NULL, 4, 0));
    handle(SIGUSR1, count_hit, SA_RESTART);
    struct writer writer = {pipes[1], 150};
    EQ(pthread_create(&thread, NULL, write_later, &writer), 0);
    pest_start(&pest, 10, 10000);
    EQ(splice(pipes[0], NULL, d.fd, NULL, 4, 0), 4);
    pest_stop(&pest);
    EQ(pthread_join(thread, NULL), 0);
    TIMELY(hits > 0, "expected signals during the wait, saw none");
    P_WANT(&d, "late");
}

/*
 * Receives beside another thread that is blocked in a send. (Under the shim: a stream was offered meanwhile, and cannot be
 * mapped while somebody is inside the kernel, so a receive that would wait there gives way to the offer for a while.)
 */
struct stuck {
    struct duo duo;
    pthread_t thread;
};

enum { STUCK = 32 << 20 };

static void *send_much(void *arg)
{
    char *bytes = malloc(STUCK);
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    pattern(0, 0, bytes, STUCK);
    EQ(send(*(int *)arg, bytes, STUCK, 0), STUCK);
    free(bytes);
    return NULL;
}

static void get_stuck(struct stuck *s)
{
    s->duo = duo_open(COLD);
    EQ(pthread_create(&s->thread, NULL, send_much, &s->duo.fd), 0);
    while (events_of(s->duo.fd, POLLOUT, 0) & POLLOUT)
        sleep_ms(1);
    for (int i = 0; i < 40; i++) {
        p_send(&s->duo, "x");
        WANT(s->duo.fd, "x");
        sleep_ms(2);
    }
}

static void get_loose(struct stuck *s)
{
    EQ(p_do(&s->duo, do_recv_pattern, STUCK), 0);
    EQ(pthread_join(s->thread, NULL), 0);
    for (int i = 0; i < 40; i++) {
        PUT(s->duo.fd, "out");
        P_WANT(&s->duo, "out");
        p_send(&s->duo, "in");
        WANT(s->duo.fd, "in");
    }
}

CASE(eintr_receive_beside_a_blocked_send)
{
    struct stuck s;
    char got[8];
    get_stuck(&s);
    handle(SIGALRM, count_hit, 0);
    for (int ms = 5; ms < 200; ms += 15) {
        hits = 0;
        tick(ms, 300);
        ERR(recv(s.duo.fd, got, sizeof got, 0), EINTR);
        tick(0, 0);
        TIMELY(hits == 1, "expected the first signal, after %d ms, to interrupt the call, saw number %d do it", ms,
               (int)hits);
    }
    handle(SIGALRM, count_hit, SA_RESTART);
    for (int ms = 5; ms < 200; ms += 50) {
        hits = 0;
        tick(ms, 300);
        p_start(&s.duo, do_send_later, 220);
        EQ(recv(s.duo.fd, got, sizeof got, 0), 4);
        tick(0, 0);
        EQ(p_finish(&s.duo), 0);
        TIMELY(hits > 0, "expected a signal during the wait, saw none");
    }
    get_loose(&s);
}

/* The least time that the call took, in ms, of some: a busy machine makes a few of them late. Each gives EAGAIN. */
#define LEAST_MS(expression)                                                                       ({                                                                                                 int64_t least_ = INT64_MAX;                                                                    for (int i_ = 0; i_ < 5; i_++) {                                                                   int64_t start_ = now_ms();                                                                     ERR(expression, EAGAIN);                                                                       int64_t took_ = now_ms() - start_;                                                             least_ = took_ < least_ ? took_ : least_;                                                  }                                                                                              (long long)least_;                                                                         })

CASE(time_limit_beside_a_blocked_send)
{
    struct stuck s;
    char got[8];
    get_stuck(&s);
    struct timeval limit = {0, 40000};
    MUST(setsockopt(s.duo.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    long long least = LEAST_MS(recv(s.duo.fd, got, sizeof got, 0));
    CHECK(least >= 39, "expected to wait 40 ms, saw %lld", least);
    TIMELY(least < 100, "expected to wait 40 ms, saw %lld", least);
    least = LEAST_MS(read(s.duo.fd, got, sizeof got));
    TIMELY(least >= 39 && least < 100, "expected to wait 40 ms, saw %lld", least);
    get_loose(&s);
}

CASE(no_wait_beside_a_blocked_send)
{
    struct stuck s;
    char got[8];
    struct iovec in = {got, sizeof got};
    struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1};
    get_stuck(&s);
    long long least = LEAST_MS(recv(s.duo.fd, got, sizeof got, MSG_DONTWAIT));
    TIMELY(least < 20, "expected no wait, saw %lld ms", least);
    least = LEAST_MS(recvmsg(s.duo.fd, &msg, MSG_DONTWAIT));
    TIMELY(least < 20, "expected no wait, saw %lld ms", least);
    set_nonblock(s.duo.fd, true);
    least = LEAST_MS(recv(s.duo.fd, got, sizeof got, 0));
    TIMELY(least < 20, "expected no wait, saw %lld ms", least);
    least = LEAST_MS(read(s.duo.fd, got, sizeof got));
    TIMELY(least < 20, "expected no wait, saw %lld ms", least);
    set_nonblock(s.duo.fd, false);
    get_loose(&s);
}

CASE(eintr_waitall_is_partial)
{
    struct duo d = duo_open(0);
    char got[16];
    struct pest pest;
    handle(SIGUSR1, count_hit, 0);
    p_send(&d, "12345");
    AWAIT_BYTES(d.fd, 5);
    pest_start(&pest, 40, 20000);
    EQ(recv(d.fd, got, 10, MSG_WAITALL), 5);
    pest_stop(&pest);
    p_send(&d, "rest");
    WANT(d.fd, "rest");
}

CASE(eintr_accept)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    handle(SIGUSR1, count_hit, 0);
    INTERRUPTED(accept(listener, NULL, NULL));
    INTERRUPTED(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
}

static void write_in_handler(int signal_no)
{
    (void)signal_no;
    if (write(live_fd, "handler.", 8) == 8)
        hits++;
}

CASE(handler_writes_to_the_socket)
{
    struct duo d = duo_open(0);
    struct pest pest;
    live_fd = d.fd;
    handle(SIGUSR1, write_in_handler, 0);
    for (int i = 0; i < 20; i++) {
        char got[8];
        hits = 0;
        pest_start(&pest, 3, 3000);
        ERR(recv(d.fd, got, sizeof got, 0), EINTR);
        pest_stop(&pest);
        for (int k = 0; k < hits; k++)
            P_WANT(&d, "handler.");
    }
}

static char handler_got[64];

static void read_in_handler(int signal_no)
{
    (void)signal_no;
    int kept = errno;
    ssize_t n = recv(live_fd, handler_got + hits, 1, MSG_DONTWAIT);
    if (n == 1)
        hits++;
    errno = kept;
}

CASE(handler_reads_another_socket)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    struct pest pest;
    live_fd = e.fd;
    handle(SIGUSR1, read_in_handler, SA_RESTART);
    p_send(&e, "0123456789abcdefghij");
    AWAIT_BYTES(e.fd, 20);
    pest_start(&pest, 0, 2000);
    p_start(&d, do_echo, 0);
    for (int i = 0; i < 2000 || hits < 20; i++) {
        unsigned char out = (unsigned char)i, in = 0;
        EQ(send(d.fd, &out, 1, 0), 1);
        EQ(recv(d.fd, &in, 1, 0), 1);
        EQ(in, out);
    }
    pest_stop(&pest);
    MUST(shutdown(d.fd, SHUT_WR));
    WANT_EOF(d.fd);
    p_finish(&d);
    EQ(memcmp(handler_got, "0123456789abcdefghij", 20), 0);
}

static sigjmp_buf back;

static void jump_out(int signal_no)
{
    (void)signal_no;
    hits++;
    siglongjmp(back, 1);
}

CASE(jump_out_of_a_blocked_call)
{
    struct duo d = duo_open(0);
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    handle(SIGALRM, jump_out, 0);
    hits = 0;
    for (volatile int i = 0; i < 40; i++) {
        struct itimerval soon = {.it_value = {0, 10000}};
        char got[8];
        if (sigsetjmp(back, 1) == 0) {
            setitimer(ITIMER_REAL, &soon, NULL);
            switch (i % 4) {
            case 0:
                recv(d.fd, got, sizeof got, 0) < 0 ? (void)0 : abort();
                break;
            case 1:
                events_of(d.fd, POLLIN, -1);
                break;
            case 2:
                epoll_wait(set, &event, 1, -1);
                break;
            default:
                if (read(d.fd, got, sizeof got) >= 0)
                    abort();
            }
            fail(HERE, "expected a jump, saw call %d return", i % 4);
        }
        EQ(hits, i + 1);
        p_send(&d, "still");
        AWAIT(d.fd, POLLIN);
        EQ(epoll_wait(set, &event, 1, 1000), 1);
        WANT(d.fd, "still");
        PUT(d.fd, "alive");
        P_WANT(&d, "alive");
    }
}

__attribute__((noinline)) static int count_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 1100; fd++)
        count += raw_call(SYS_fcntl, fd, F_GETFD, 0, 0, 0, 0) >= 0;
    return count;
}

CASE(jump_out_of_a_blocked_send_beside_threads)
{
    struct duo d = duo_open(0);
    struct pest pest;
    size_t sent = fill(d.fd);
    handle(SIGUSR1, count_hit, SA_RESTART);
    pest_start(&pest, 0, 1000000); /* a second thread, which disturbs nobody */
    handle(SIGALRM, jump_out, 0);
    hits = 0;
    int before = count_descriptors();
    for (volatile int i = 0; i < 40; i++) {
        struct itimerval soon = {.it_interval = {0, 5000}, .it_value = {0, 5000}}, never = {0};
        if (sigsetjmp(back, 1) == 0) {
            setitimer(ITIMER_REAL, &soon, NULL);
            fail(HERE, "expected a jump, saw the send return %zd", send(d.fd, "x", 1, 0));
        }
        setitimer(ITIMER_REAL, &never, NULL);
    }
    int more = count_descriptors() - before;
    CHECK(more <= 4, "expected as many descriptors as before, saw %d more", more);
    pest_stop(&pest);
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    PUT(d.fd, "alive");
    P_WANT(&d, "alive");
}

CASE(signal_storm_during_transfer, .seconds = 60)
{
    struct duo d = duo_open(0);
    struct itimerval every = {.it_interval = {0, 500}, .it_value = {0, 500}};
    handle(SIGALRM, count_hit, SA_RESTART);
    MUST(setitimer(ITIMER_REAL, &every, NULL));
    p_start(&d, do_send_chunks, 24 << 20);
    RECV_PATTERN(d.fd, 24 << 20);
    EQ(p_finish(&d), 0);
    p_start(&d, do_recv_pattern, 24 << 20);
    SEND_PATTERN(d.fd, 24 << 20);
    EQ(p_finish(&d), 0);
    handle(SIGALRM, count_hit, 0); /* and when EINTR comes through: the loops try again */
    p_start(&d, do_send_chunks, 24 << 20);
    RECV_PATTERN(d.fd, 24 << 20);
    EQ(p_finish(&d), 0);
    p_start(&d, do_recv_pattern, 24 << 20);
    SEND_PATTERN(d.fd, 24 << 20);
    EQ(p_finish(&d), 0);
    every = (struct itimerval){0};
    MUST(setitimer(ITIMER_REAL, &every, NULL));
    CHECK(hits > 0, "expected signals, saw none");
}

CASE(sigio)
{
    struct duo d = duo_open(0);
    handle(SIGIO, count_hit, 0);
    MUST(fcntl(d.fd, F_SETOWN, getpid()));
    EQ(fcntl(d.fd, F_GETOWN), getpid());
    MUST(fcntl(d.fd, F_SETFL, O_ASYNC | O_NONBLOCK));
    EQ(fcntl(d.fd, F_GETFL), O_RDWR | O_ASYNC | O_NONBLOCK);
    for (int i = 0; i < 20; i++) {
        hits = 0;
        p_send(&d, "x");
        for (int k = 0; k < 2000 && !hits; k++)
            sleep_ms(1);
        CHECK(hits > 0, "expected SIGIO for message %d, saw none", i);
        WANT(d.fd, "x");
    }
    MUST(fcntl(d.fd, F_SETFL, 0));
    p_send(&d, "y");
    WANT(d.fd, "y");
}

CASE(child_ends_while_receiving)
{
    struct duo d = duo_open(0);
    char got[8];
    handle(SIGCHLD, count_hit, 0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        sleep_ms(300); /* its end must find the call blocked */
        _exit(3);
    }
    ERR(recv(d.fd, got, sizeof got, 0), EINTR);
    wait_child(HERE, pid, 3);
    p_send(&d, "on");
    WANT(d.fd, "on");
}

CASE(stop_and_continue)
{
    struct duo d = duo_open(0);
    pid_t here = getpid();
    char got[8];
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        for (int i = 0; i < 5; i++) {
            sleep_ms(30);
            kill(here, SIGSTOP);
            sleep_ms(20);
            kill(here, SIGCONT);
        }
        _exit(0);
    }
    p_start(&d, do_send_later, 400);
    EQ(recv(d.fd, got, 4, 0), 4); /* no handler: a stop is not an interruption */
    p_finish(&d);
    WAIT_CHILD(pid);
}
