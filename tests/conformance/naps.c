/*
 * Receives that sleep for a short time, again and again, and what ends such a sleep besides bytes.
 */
#include "sockconf.h"

/* Answers each byte after so long, but for 'w' (never) and 'q' (the end). */
static long answer_later(int *fd, void *bytes, size_t len, long us)
{
    (void)bytes, (void)len;
    char byte;
    while (recv(*fd, &byte, 1, 0) == 1 && byte != 'q') {
        usleep((useconds_t)us);
        if (byte != 'w')
            EQ(send(*fd, &byte, 1, MSG_NOSIGNAL), 1);
    }
    return 0;
}

static void doze(const struct duo *d, int times)
{
    for (int i = 0; i < times; i++) {
        char byte = (char)('a' + i % 16), got = 0;
        EQ(send(d->fd, &byte, 1, 0), 1);
        EQ(recv(d->fd, &got, 1, 0), 1);
        EQ(got, byte);
    }
}

static void quit(const struct duo *d)
{
    PUT(d->fd, "q");
    EQ(p_finish(d), 0);
}

CASE(nap_bytes)
{
    struct duo d = duo_open(0);
    long pauses[] = {0, 20, 100, 400, 3000, 100};
    for (size_t i = 0; i < sizeof pauses / sizeof *pauses; i++) {
        p_start(&d, answer_later, pauses[i]);
        doze(&d, 40);
        quit(&d);
    }
}

CASE(nap_kill_peer, .process = true)
{
    for (int i = 0; i < 10; i++) {
        struct duo d = duo_open(0);
        char got;
        p_start(&d, answer_later, 100);
        doze(&d, 20);
        PUT(d.fd, "w");
        sleep_ms(i % 2); /* so that it has read that, or not */
        kill(peer_pid(&d), SIGKILL);
        int64_t start = now_ms();
        ssize_t n = recv(d.fd, &got, 1, 0);
        CHECK(n == 0 || (n < 0 && errno == ECONNRESET), "expected the end or a reset, saw %zd", n);
        TIMELY(now_ms() - start < 300, "expected to hear of it at once, after %d ms", (int)(now_ms() - start));
        close(d.fd);
    }
}

static atomic_int hits;

static void count_hit(int signal_no)
{
    (void)signal_no;
    hits++;
}

static void tick(int us)
{
    struct itimerval often = {.it_interval = {0, us}, .it_value = {0, us}};
    MUST(setitimer(ITIMER_REAL, &often, NULL));
}

CASE(nap_signals)
{
    struct duo d = duo_open(0);
    for (int restart = 0; restart < 2; restart++) {
        struct sigaction action = {.sa_handler = count_hit, .sa_flags = restart ? SA_RESTART : 0};
        int interrupted = 0;
        MUST(sigaction(SIGALRM, &action, NULL));
        p_start(&d, answer_later, 300);
        doze(&d, 20);
        hits = 0;
        tick(700);
        for (int i = 0; i < 300; i++) {
            char byte = 'x', got = 0;
            EQ(send(d.fd, &byte, 1, 0), 1);
            ssize_t n;
            while ((n = recv(d.fd, &got, 1, 0)) < 0 && errno == EINTR)
                interrupted++;
            EQ(n, 1);
            EQ(got, 'x');
        }
        if (restart)
            EQ(interrupted, 0);
        else
            TIMELY(interrupted > 0, "expected signals in the sleeps, saw none of %d", hits);
        /* Nothing comes: a signal ends that, or does not. */
        if (!restart)
            for (int i = 0; i < 50; i++) {
                char got;
                ERR(recv(d.fd, &got, 1, 0), EINTR);
            }
        tick(0);
        quit(&d);
    }
}

CASE(nap_time_limit)
{
    struct duo d = duo_open(0);
    p_start(&d, answer_later, 100);
    for (int i = 0; i < 3; i++) {
        struct timeval limit = {0, 60000}, none = {0, 0};
        char got;
        doze(&d, 20);
        MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
        PUT(d.fd, "w");
        int64_t start = now_ms();
        ERR(recv(d.fd, &got, 1, 0), EAGAIN);
        CHECK(now_ms() - start >= 59, "expected 60 ms, saw %d", (int)(now_ms() - start));
        TIMELY(now_ms() - start < 200, "expected 60 ms, saw %d", (int)(now_ms() - start));
        MUST(setsockopt(d.fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none));
    }
    quit(&d);
}

static void *doze_for_ever(void *arg)
{
    for (;;)
        doze(arg, 1);
    return NULL;
}

CASE(nap_cancel)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 10; i++) {
        pthread_t thread;
        void *result;
        char got[64];
        p_start(&d, answer_later, 100);
        EQ(pthread_create(&thread, NULL, doze_for_ever, &d), 0);
        sleep_ms(20 + i);
        EQ(pthread_cancel(thread), 0);
        EQ(pthread_join(thread, &result), 0);
        EQ((long)result, (long)PTHREAD_CANCELED);
        quit(&d);
        while (recv(d.fd, got, sizeof got, MSG_DONTWAIT) > 0) /* the answer that it did not take */
            ;
    }
}

static void *shut_soon(void *arg)
{
    usleep(300);
    MUST(shutdown(((struct duo *)arg)->fd, SHUT_RD));
    return NULL;
}

CASE(nap_shutdown)
{
    struct duo d = duo_open(0);
    pthread_t thread;
    char got;
    p_start(&d, answer_later, 100);
    doze(&d, 20);
    EQ(pthread_create(&thread, NULL, shut_soon, &d), 0);
    PUT(d.fd, "w");
    EQ(recv(d.fd, &got, 1, 0), 0);
    pthread_join(thread, NULL);
    quit(&d);
}

/* A process that sleeps on the same connection is killed in that; the other one goes on. */
CASE(nap_kill_holder)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 5; i++) {
        p_start(&d, answer_later, 100);
        doze(&d, 20);
        pid_t child = (pid_t)MUST(fork());
        if (child == 0) {
            doze(&d, 20);
            char got;
            recv(d.fd, &got, 1, 0);
            abort();
        }
        sleep_ms(10 + i);
        MUST(kill(child, SIGKILL));
        EQ(waitpid(child, NULL, 0), child);
        char got[8];
        sleep_ms(20); /* the answer that it did not take */
        while (recv(d.fd, got, sizeof got, MSG_DONTWAIT) > 0)
            ;
        doze(&d, 40);
        quit(&d);
    }
}

/* Two processes receive in turns on one connection, each from its own sleeps. */
CASE(nap_two_holders)
{
    struct duo d = duo_open(0);
    p_start(&d, answer_later, 100);
    doze(&d, 20);
    char got;
    pid_t child = (pid_t)MUST(fork());
    if (child == 0)
        _exit(recv(d.fd, &got, 1, 0) == 1 && recv(d.fd, &got, 1, 0) == 1 ? 0 : 1);
    for (int i = 0; i < 4; i++) {
        PUT(d.fd, "x");
        usleep(500);
    }
    EQ(recv(d.fd, &got, 1, 0), 1);
    EQ(recv(d.fd, &got, 1, 0), 1);
    WAIT_CHILD(child);
    quit(&d);
}
