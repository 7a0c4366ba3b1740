/*
 * Several threads of one process on the same connections; threads that are cancelled.
 */
#include "sockconf.h"
#include <sched.h>

struct worker {
    pthread_t thread;
    const struct duo *d;
    int fd, other, set;
    size_t count;
    uint64_t seed;
    long sum;
    atomic_int *left;
};

static void *read_bytes(void *arg)
{
    struct worker *w = arg;
    unsigned char block[100];
    ssize_t n;
    while ((n = recv(w->fd, block, sizeof block, 0)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            w->sum += block[i];
        w->count += (size_t)n;
    }
    EQ(n, 0);
    return NULL;
}

CASE(two_threads_read_one_socket)
{
    struct duo d = duo_open(0);
    struct worker w[2];
    size_t size = 4 << 20;
    long right = 0;
    unsigned char *all = malloc(size);
    pattern(0, 0, all, size);
    for (size_t i = 0; i < size; i++)
        right += all[i];
    for (int i = 0; i < 2; i++) {
        w[i] = (struct worker){.fd = d.fd};
        EQ(pthread_create(&w[i].thread, NULL, read_bytes, &w[i]), 0);
    }
    EQ(p_do(&d, do_send_chunks, (long)size), 0);
    p_shutdown(&d, SHUT_WR);
    for (int i = 0; i < 2; i++)
        pthread_join(w[i].thread, NULL);
    EQ(w[0].count + w[1].count, size);
    EQ(w[0].sum + w[1].sum, right);
}

/* Messages of one size and one byte each: a blocking write() of a small message is not cut up. */
static void *write_records(void *arg)
{
    struct worker *w = arg;
    char record[64];
    memset(record, (int)w->seed, sizeof record);
    for (size_t i = 0; i < w->count; i++)
        EQ(write(w->fd, record, sizeof record), sizeof record);
    return NULL;
}

static long do_check_records(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    char record[64];
    for (long i = 0; i < count; i++) {
        EQ(recv(*fd, record, sizeof record, MSG_WAITALL), sizeof record);
        for (size_t k = 1; k < sizeof record; k++)
            CHECK(record[k] == record[0], "expected whole records, saw %c after %c in record %ld", record[k], record[0], i);
    }
    return 0;
}

CASE(threads_write_one_socket)
{
    for (int cold = 0; cold < 2; cold++) {
        struct duo d = duo_open(cold ? COLD : 0);
        struct worker w[3];
        p_start(&d, do_check_records, 3 * 20000);
        for (int i = 0; i < 3; i++) {
            w[i] = (struct worker){.fd = d.fd, .seed = 'a' + (uint64_t)i, .count = 20000};
            EQ(pthread_create(&w[i].thread, NULL, write_records, &w[i]), 0);
        }
        for (int i = 0; i < 3; i++)
            pthread_join(w[i].thread, NULL);
        EQ(p_finish(&d), 0);
    }
}

static void *send_pattern_thread(void *arg)
{
    struct worker *w = arg;
    send_pattern(HERE, w->fd, w->seed, w->count);
    MUST(shutdown(w->fd, SHUT_WR));
    return NULL;
}

static void *recv_pattern_thread(void *arg)
{
    struct worker *w = arg;
    recv_pattern(HERE, w->fd, w->seed, w->count);
    WANT_EOF(w->fd);
    return NULL;
}

static long do_echo_many(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    pthread_t threads[64];
    struct worker w[64];
    extern void *echo_thread(void *);
    for (long i = 0; i < count; i++) {
        w[i] = (struct worker){.fd = fd[i]};
        EQ(pthread_create(&threads[i], NULL, echo_thread, &w[i]), 0);
    }
    for (long i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    return 0;
}

void *echo_thread(void *arg);
void *echo_thread(void *arg)
{
    int fd = ((struct worker *)arg)->fd;
    do_echo(&fd, NULL, 0, 0);
    return NULL;
}

CASE(many_threads_many_connections, .seconds = 60)
{
    enum { count = 24 };
    struct duo d[count];
    struct worker out[count], in[count];
    d[0] = duo_open(0);
    for (int i = 1; i < count; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, count / 2); /* half of them are promoted in the middle */
    p_start(&d[0], do_echo_many, count);
    for (int i = 0; i < count; i++) {
        out[i] = (struct worker){.fd = d[i].fd, .seed = 100 + (uint64_t)i, .count = 3 << 20};
        in[i] = out[i];
        EQ(pthread_create(&out[i].thread, NULL, send_pattern_thread, &out[i]), 0);
        EQ(pthread_create(&in[i].thread, NULL, recv_pattern_thread, &in[i]), 0);
    }
    for (int i = 0; i < count; i++) {
        pthread_join(out[i].thread, NULL);
        pthread_join(in[i].thread, NULL);
    }
    EQ(p_finish(&d[0]), 0);
}

CASE(threads_ping_pong, .seconds = 60)
{
    /* Both ends in this process, in two threads: a server thread for each client thread. */
    enum { count = 8 };
    struct duo d[count];
    struct worker w[count];
    d[0] = duo_open(0);
    for (int i = 1; i < count; i++)
        d[i] = duo_more(&d[0], 0);
    p_start(&d[0], do_echo_many, count);
    for (int i = 0; i < count; i++) {
        void *ping(void *);
        w[i] = (struct worker){.fd = d[i].fd, .count = 1500};
        EQ(pthread_create(&w[i].thread, NULL, ping, &w[i]), 0);
    }
    for (int i = 0; i < count; i++)
        pthread_join(w[i].thread, NULL);
    EQ(p_finish(&d[0]), 0);
}

void *ping(void *arg);
void *ping(void *arg)
{
    struct worker *w = arg;
    for (size_t i = 0; i < w->count; i++) {
        PUT(w->fd, "ping");
        WANT(w->fd, "ping");
    }
    MUST(shutdown(w->fd, SHUT_WR));
    WANT_EOF(w->fd);
    return NULL;
}

/* ---- Cancellation ---- */

static void *blocked(void *arg)
{
    struct worker *w = arg;
    char got[8];
    struct epoll_event event;
    atomic_fetch_sub(w->left, 1);
    for (;;) {
        if (w->count == 0)
            recv(w->fd, got, sizeof got, 0) < 0 ? abort() : abort();
        else if (w->count == 1)
            epoll_wait(w->set, &event, 1, -1);
        else if (w->count == 2)
            events_of(w->fd, POLLIN, -1);
        else if (read(w->fd, got, sizeof got) != 4)
            abort();
    }
}

CASE(cancel_a_blocked_thread)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    for (int i = 0; i < 24; i++) {
        atomic_int left = 1;
        void *result;
        struct worker w = {.fd = d.fd, .set = set, .count = (size_t)(i % 4), .left = &left};
        EQ(pthread_create(&w.thread, NULL, blocked, &w), 0);
        while (atomic_load(&left))
            sched_yield();
        sleep_ms(i % 3 * 10);
        EQ(pthread_cancel(w.thread), 0);
        EQ(pthread_join(w.thread, &result), 0);
        EQ((long)result, (long)PTHREAD_CANCELED);
        /* Both the connection that it waited on and another one go on. */
        PUT(d.fd, "same");
        P_WANT(&d, "same");
        p_send(&d, "back");
        WANT(d.fd, "back");
        PUT(e.fd, "other");
        P_WANT(&e, "other");
        p_send(&e, "more");
        EQ(epoll_wait(set, &event, 1, 10), 0);
        WANT(e.fd, "more");
    }
}

static void *blocked_sender(void *arg)
{
    int fd = *(int *)arg;
    char block[65536] = "";
    for (;;)
        EQ(send(fd, block, sizeof block, 0) > 0, 1);
    return NULL;
}

CASE(cancel_a_blocked_sender)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    pthread_t thread;
    void *result;
    EQ(pthread_create(&thread, NULL, blocked_sender, &d.fd), 0);
    sleep_ms(100);
    EQ(pthread_cancel(thread), 0);
    EQ(pthread_join(thread, &result), 0);
    EQ((long)result, (long)PTHREAD_CANCELED);
    PUT(e.fd, "other");
    P_WANT(&e, "other");
    p_start(&d, do_discard, 0);
    PUT(d.fd, "still usable");
    MUST(shutdown(d.fd, SHUT_WR));
    EQ(p_finish(&d), 0);
}

static void *pending_cancel(void *arg)
{
    struct worker *w = arg;
    char got[8];
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    atomic_fetch_sub(w->left, 1);
    EQ(recv(w->fd, got, sizeof got, 0), 4); /* disabled: the cancel waits */
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    recv(w->fd, got, sizeof got, 0) < 0 ? abort() : abort(); /* a cancellation point */
    return NULL;
}

CASE(cancel_disabled_then_pending)
{
    struct duo d = duo_open(0);
    atomic_int left = 1;
    void *result;
    struct worker w = {.fd = d.fd, .left = &left};
    EQ(pthread_create(&w.thread, NULL, pending_cancel, &w), 0);
    while (atomic_load(&left))
        sched_yield();
    sleep_ms(20);
    EQ(pthread_cancel(w.thread), 0);
    sleep_ms(20);
    p_send(&d, "here");
    EQ(pthread_join(w.thread, &result), 0);
    EQ((long)result, (long)PTHREAD_CANCELED);
    p_send(&d, "kept");
    WANT(d.fd, "kept");
}

static atomic_int cleaned;
static void clean(void *arg)
{
    (void)arg;
    atomic_fetch_add(&cleaned, 1);
}

static void *blocked_with_cleanup(void *arg)
{
    char got[8];
    pthread_cleanup_push(clean, NULL);
    recv(*(int *)arg, got, sizeof got, 0) < 0 ? abort() : abort();
    pthread_cleanup_pop(0);
    return NULL;
}

CASE(cancel_runs_cleanup)
{
    struct duo d = duo_open(0);
    pthread_t thread;
    EQ(pthread_create(&thread, NULL, blocked_with_cleanup, &d.fd), 0);
    sleep_ms(50);
    EQ(pthread_cancel(thread), 0);
    EQ(pthread_join(thread, NULL), 0);
    EQ(cleaned, 1);
    p_send(&d, "on");
    WANT(d.fd, "on");
}

static void *exit_now(void *arg)
{
    (void)arg;
    PUT(((struct worker *)arg)->fd, "thread");
    pthread_exit(NULL);
}

CASE(threads_come_and_go)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 300; i++) {
        struct worker w = {.fd = d.fd};
        EQ(pthread_create(&w.thread, NULL, exit_now, &w), 0);
        EQ(pthread_join(w.thread, NULL), 0);
        P_WANT(&d, "thread");
    }
}

static void *close_later(void *arg)
{
    sleep_ms(40);
    MUST(close(*(int *)arg));
    return NULL;
}

CASE(close_under_a_blocked_receive)
{
    /* Linux: the blocked call keeps the file; it ends with what the peer does, not with the close. */
    struct duo d = duo_open(0);
    pthread_t thread;
    char got[8];
    EQ(pthread_create(&thread, NULL, close_later, &d.fd), 0);
    p_start(&d, do_send_later, 150);
    EQ(recv(d.fd, got, sizeof got, 0), 4);
    EQ(p_finish(&d), 0);
    pthread_join(thread, NULL);
    ERR(recv(d.fd, got, sizeof got, 0), EBADF);
    P_WANT_EOF(&d);
}

static void *dup_over(void *arg)
{
    int *fds = arg;
    sleep_ms(40);
    MUST(dup2(fds[1], fds[0]));
    return NULL;
}

CASE(dup2_under_a_blocked_receive)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    pthread_t thread;
    char got[8];
    int fds[] = {d.fd, e.fd};
    EQ(pthread_create(&thread, NULL, dup_over, fds), 0);
    p_start(&d, do_send_later, 150);
    EQ(recv(d.fd, got, sizeof got, 0), 4);
    EQ(p_finish(&d), 0);
    pthread_join(thread, NULL);
    P_WANT_EOF(&d);
    PUT(d.fd, "to e");
    P_WANT(&e, "to e");
}
