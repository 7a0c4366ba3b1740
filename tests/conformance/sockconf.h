/*
 * sockconf: what Linux does with a loopback TCP connection, as a list of small cases.
 *
 * The program is plain libc and knows nothing of rdsock. It is run by itself (Linux is the oracle: every
 * case must pass there) and under the preloaded library, where every case must pass as well.
 *
 * A case is a function. It runs in a process of its own, under a time limit, and talks to a puppet: a second
 * process (or, with --peer thread, a second thread) that holds the other end of each connection and carries
 * out orders. An order is a function pointer, so a case can have its puppet do anything.
 */
#ifndef SOCKCONF_H
#define SOCKCONF_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- The table of cases (main.c) ---- */

struct case_def {
    const char *name;
    void (*run)(void);
    int seconds;  /* time limit; 0 is the default */
    bool process; /* the puppet must be a process (it is killed, or descriptors are closed wholesale) */
    bool root;    /* skipped unless run by root */
    struct case_def *next;
};

void case_add(struct case_def *def);

#define CASE(name_, ...)                                                                       \
    static void case_##name_(void);                                                            \
    __attribute__((constructor)) static void add_##name_(void)                                 \
    {                                                                                          \
        static struct case_def def = {.name = #name_, .run = case_##name_, __VA_ARGS__};       \
        case_add(&def);                                                                        \
    }                                                                                          \
    static void case_##name_(void)

/* What the command line asked for. */
struct settings {
    int warm;         /* round trips before a case starts; 0: none, so promotion happens in its middle */
    bool swap;        /* the puppet listens and the case connects, instead of the other way round */
    bool thread_peer; /* the puppet is a thread */
    bool need_rings;  /* a warmed connection that still moves its bytes through the kernel is a failure */
    char folder[PATH_MAX]; /* where this program and its companions lie */
};
extern struct settings settings;

/* ---- Checks (main.c). The first failure of any process of a case is the one that is reported. ---- */

void step(const char *here);
void fail(const char *here, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
void check_equal(const char *here, const char *what, long long want, long long got, int code);
void check_error(const char *here, const char *what, int want, int other, long long got, int code);
long long check_good(const char *here, const char *what, long long got, int code);
void count_pair(bool on_rings);

#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
#define HERE __FILE__ ":" TEXT(__LINE__)

/* The condition holds, else the message (printf style) says what was expected and what was seen. */
#define CHECK(condition, ...)                                                                  \
    do {                                                                                       \
        step(HERE);                                                                            \
        if (!(condition))                                                                      \
            fail(HERE, __VA_ARGS__);                                                           \
    } while (0)
/*
 * As CHECK, for an expectation that a busy machine may miss though every byte and every wake-up is right: how long
 * something took, or what came first. The tests try a case again only when it failed in one of these.
 */
#define TIMELY(condition, ...) CHECK(condition, TIMING __VA_ARGS__)
#define TIMING "timing: "
/* The expression has this value. */
#define EQ(expression, want)                                                                   \
    do {                                                                                       \
        step(HERE);                                                                            \
        errno = 0;                                                                             \
        long long got_ = (long long)(expression);                                              \
        check_equal(HERE, #expression, (long long)(want), got_, errno);                        \
    } while (0)
/* The call returns -1 with this errno (or the other one). */
#define ERR2(expression, want, other)                                                          \
    do {                                                                                       \
        step(HERE);                                                                            \
        errno = 0;                                                                             \
        long long got_ = (long long)(expression);                                              \
        check_error(HERE, #expression, want, other, got_, errno);                              \
    } while (0)
#define ERR(expression, want) ERR2(expression, want, want)
/* The call does not return -1; the value is its result. */
#define MUST(expression)                                                                       \
    ({                                                                                         \
        step(HERE);                                                                            \
        errno = 0;                                                                             \
        long long got_ = (long long)(expression);                                              \
        check_good(HERE, #expression, got_, errno);                                            \
    })

/* ---- Connections and puppets (peer.c) ---- */

struct peer;

/* One connection: this end, and the number that the puppet knows its own end by. */
struct duo {
    struct peer *peer;
    int fd;
    int at;
};

enum { COLD = 1, V6 = 2, MAPPED = 4, NONBLOCK = 8 };

struct duo duo_open(int flags);                     /* a new puppet and a connection to it */
struct duo duo_more(const struct duo *d, int flags); /* one more connection to the same puppet */
struct duo duo_prepare(void);                       /* a new puppet without a connection: fd is -1 */
void duo_warm(const struct duo *d);                 /* what duo_open does unless COLD */
void duo_warm_all(const struct duo *d, int count);  /* the same for many connections at once */
pid_t peer_pid(const struct duo *d);                /* 0 if the puppet is a thread */
void peer_kill(const struct duo *d);                /* kill -9, and wait until it is gone */

/* An order: runs in the puppet; `fd` is its end (set it to -1 after closing it). Negative errno on failure. */
typedef long (*order_fn)(int *fd, void *bytes, size_t len, long arg);

long p_do(const struct duo *d, order_fn fn, long arg);
long p_give(const struct duo *d, order_fn fn, const void *bytes, size_t len, long arg);
void p_start(const struct duo *d, order_fn fn, long arg); /* the order runs while the case goes on ... */
long p_finish(const struct duo *d);                       /* ... until here */

void p_send(const struct duo *d, const char *text);            /* sends the text */
void p_want(const char *here, const struct duo *d, const char *text); /* receives exactly that text */
void p_want_end(const char *here, const struct duo *d, int code);     /* next comes EOF (0) or this errno */
#define P_WANT(d, text) p_want(HERE, d, text)
#define P_WANT_EOF(d) p_want_end(HERE, d, 0)
#define P_WANT_ERROR(d, code) p_want_end(HERE, d, code)
void p_shutdown(const struct duo *d, int how);
void p_close(const struct duo *d);
void p_reset(const struct duo *d); /* closes with a zero linger time: RST */

/* Orders for p_start and p_do. */
long do_send_pattern(int *fd, void *bytes, size_t len, long count); /* `count` pattern bytes from position 0 */
long do_recv_pattern(int *fd, void *bytes, size_t len, long count);
long do_send_chunks(int *fd, void *bytes, size_t len, long count); /* ... in writes of 1 to 5000 bytes */
long do_echo(int *fd, void *bytes, size_t len, long unused); /* until EOF, then shuts its side down */
long do_send_later(int *fd, void *bytes, size_t len, long ms); /* sleeps, then sends "late" */
long do_close_later(int *fd, void *bytes, size_t len, long ms);
long do_shutdown_later(int *fd, void *bytes, size_t len, long ms); /* SHUT_WR */
long do_discard(int *fd, void *bytes, size_t len, long unused); /* reads until the end or an error */

/* ---- This end (peer.c) ---- */

void put(const char *here, int fd, const void *bytes, size_t len);
void want(const char *here, int fd, const char *text); /* receives exactly that text */
#define PUT(fd, text) put(HERE, fd, text, strlen(text))
#define WANT(fd, text) want(HERE, fd, text)
#define WANT_EOF(fd)                                                                           \
    do {                                                                                       \
        char eof_[8];                                                                          \
        EQ(recv(fd, eof_, sizeof eof_, 0), 0);                                                 \
    } while (0)
int events_of(int fd, int events, int ms); /* poll() of one descriptor: revents */
void await(const char *here, int fd, int events); /* poll() until there */
#define AWAIT(fd, events) await(HERE, fd, events)
void await_bytes(const char *here, int fd, size_t count); /* until that many can be read at once */
#define AWAIT_BYTES(fd, count) await_bytes(HERE, fd, count)
void set_nonblock(int fd, bool on);
void set_int(int fd, int level, int name, int value);
int get_int(int fd, int level, int name);
int64_t now_ms(void);
void sleep_ms(int ms);
int listen_on(int flags, struct sockaddr_storage *at, socklen_t *len); /* a listener on a free loopback port */
size_t fill(int fd); /* sends pattern bytes, without waiting, until nothing more fits; the count */
size_t fill_on(int fd, size_t from); /* the same, from this position of the pattern on */

long raw_call(long number, long a, long b, long c, long d, long e, long f); /* past every library */
uint64_t kernel_bytes(int fd); /* what the kernel's socket itself has moved */

/* Byte `position` of direction `seed`. Every big transfer is checked against it, byte by byte. */
void pattern(uint64_t seed, uint64_t position, void *out, size_t len);
/* The first position where the bytes differ from the pattern, or -1. */
int64_t pattern_differs(uint64_t seed, uint64_t position, const void *bytes, size_t len);
void send_pattern(const char *here, int fd, uint64_t seed, size_t count);
void recv_pattern(const char *here, int fd, uint64_t seed, size_t count);
#define SEND_PATTERN(fd, count) send_pattern(HERE, fd, 0, count)
#define RECV_PATTERN(fd, count) recv_pattern(HERE, fd, 0, count)
uint32_t dice(uint32_t *state); /* a small repeatable generator */

void wait_child(const char *here, pid_t pid, int want_status); /* reaps; the exit status must be this */
#define WAIT_CHILD(pid) wait_child(HERE, pid, 0)

#endif
