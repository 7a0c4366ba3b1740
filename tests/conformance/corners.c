/*
 * Unusual ways to reach a socket, and unusual places to do it from.
 */
#include "sockconf.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

static void exchange(const struct duo *d, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        PUT(d->fd, "question");
        P_WANT(d, "question");
        p_send(d, "answer");
        WANT(d->fd, "answer");
    }
}

CASE(names_of_large_file_programs)
{
    /* What a program that is built with _FILE_OFFSET_BITS=64 calls. */
    struct duo d = duo_open(0);
    char got[8];
    struct iovec out = {"wide", 4}, in = {got, sizeof got};
    EQ(pwritev64v2(d.fd, &out, 1, -1, 0), 4);
    P_WANT(&d, "wide");
    p_send(&d, "back");
    EQ(preadv64v2(d.fd, &in, 1, -1, 0), 4);
    EQ(memcmp(got, "back", 4), 0);
    ERR(pread64(d.fd, got, 1, 0), ESPIPE);
    EQ(fcntl64(d.fd, F_GETFL), O_RDWR);
    int copy = (int)MUST(fcntl64(d.fd, F_DUPFD_CLOEXEC, 100));
    MUST(fcntl64(copy, F_SETFL, O_NONBLOCK));
    ERR(recv(d.fd, got, 1, 0), EAGAIN);
    MUST(close(d.fd));
    PUT(copy, "copy");
    P_WANT(&d, "copy");
}

static int exit_fd;
static void say_goodbye(void) { PUT(exit_fd, "goodbye"); }
static void say_later(void) { PUT(exit_fd, " and more"); }

CASE(used_in_exit_handlers)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        exit_fd = d.fd;
        atexit(say_later);
        atexit(say_goodbye);
        fclose(stdout); /* not ours to flush */
        exit(0);
    }
    MUST(close(d.fd));
    P_WANT(&d, "goodbye and more");
    WAIT_CHILD(pid);
    P_WANT_EOF(&d);
}

static pthread_key_t key;
static void use_in_destructor(void *value)
{
    const struct duo *d = value;
    PUT(d->fd, "destructor");
}

static void *set_key(void *value)
{
    PUT(((const struct duo *)value)->fd, "thread ");
    pthread_setspecific(key, value);
    return NULL;
}

CASE(used_in_thread_destructors)
{
    struct duo d = duo_open(0);
    EQ(pthread_key_create(&key, use_in_destructor), 0);
    for (int i = 0; i < 20; i++) {
        pthread_t thread;
        EQ(pthread_create(&thread, NULL, set_key, &d), 0);
        EQ(pthread_join(thread, NULL), 0);
        P_WANT(&d, "thread destructor");
    }
}

static void *small_stack(void *value)
{
    const struct duo *d = value;
    for (int i = 0; i < 100; i++) {
        char got[8];
        EQ(send(d->fd, "ping", 4, 0), 4);
        EQ(recv(d->fd, got, 4, MSG_WAITALL), 4);
        EQ(events_of(d->fd, POLLIN, 0), 0);
    }
    return NULL;
}

CASE(smallest_thread_stack)
{
    struct duo d = duo_open(0);
    pthread_attr_t attr;
    pthread_t thread;
    EQ(pthread_attr_init(&attr), 0);
    EQ(pthread_attr_setstacksize(&attr, (size_t)sysconf(_SC_THREAD_STACK_MIN)), 0);
    p_start(&d, do_echo, 0);
    EQ(pthread_create(&thread, &attr, small_stack, &d), 0);
    EQ(pthread_join(thread, NULL), 0);
    MUST(shutdown(d.fd, SHUT_WR));
    WANT_EOF(d.fd);
    EQ(p_finish(&d), 400);
}

static volatile sig_atomic_t hits;
static void write_here(int signal_no)
{
    (void)signal_no;
    if (write(exit_fd, "alt", 3) == 3)
        hits++;
}

CASE(handler_on_a_small_stack)
{
    struct duo d = duo_open(0);
    stack_t stack = {.ss_size = (size_t)sysconf(_SC_SIGSTKSZ)};
    stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(sigaltstack(&stack, NULL));
    struct sigaction action = {.sa_handler = write_here, .sa_flags = SA_ONSTACK};
    MUST(sigaction(SIGUSR1, &action, NULL));
    exit_fd = d.fd;
    for (int i = 0; i < 50; i++) {
        raise(SIGUSR1);
        EQ(hits, i + 1);
        P_WANT(&d, "alt");
    }
}

CASE(fast_open)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len), queue = 8;
    setsockopt(listener, IPPROTO_TCP, TCP_FASTOPEN, &queue, sizeof queue);
    for (int i = 0; i < 3; i++) {
        int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
        ssize_t n = sendto(client, "first", 5, MSG_FASTOPEN, (struct sockaddr *)&at, len);
        if (n < 0) { /* turned off on this machine */
            CHECK(errno == EOPNOTSUPP, "expected EOPNOTSUPP, saw %s", strerror(errno));
            return;
        }
        EQ(n, 5);
        int server = (int)MUST(accept(listener, NULL, NULL));
        for (int k = 0; k < 60; k++) {
            WANT(server, k ? "next!" : "first");
            PUT(server, "reply");
            WANT(client, "reply");
            PUT(client, "next!");
        }
        close(client);
        close(server);
    }
}

CASE(fast_open_by_connect)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), on = 1;
    if (setsockopt(client, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof on) < 0)
        return;
    MUST(connect(client, (struct sockaddr *)&at, len)); /* may do nothing until the first bytes are sent */
    PUT(client, "first");
    int server = (int)MUST(accept(listener, NULL, NULL));
    WANT(server, "first");
    for (int k = 0; k < 60; k++) {
        PUT(server, "reply");
        WANT(client, "reply");
        PUT(client, "next!");
        WANT(server, "next!");
    }
}

CASE(deferred_accept)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    set_int(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5);
    set_nonblock(listener, true);
    int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(client, (struct sockaddr *)&at, len));
    EQ(events_of(listener, POLLIN, 20), 0);
    PUT(client, "now");
    AWAIT(listener, POLLIN);
    int server = (int)MUST(accept(listener, NULL, NULL));
    WANT(server, "now");
    for (int k = 0; k < 60; k++) {
        PUT(server, "reply");
        WANT(client, "reply");
        PUT(client, "next!");
        WANT(server, "next!");
    }
}

CASE(accepted_late)
{
    /* The client has sent, and even closed, before the server accepts. */
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len), clients[8];
    for (int i = 0; i < 8; i++) {
        clients[i] = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
        MUST(connect(clients[i], (struct sockaddr *)&at, len));
        for (int k = 0; k < 50; k++)
            PUT(clients[i], "early ");
        if (i % 2)
            MUST(close(clients[i]));
        else
            sleep_ms(2);
    }
    for (int i = 0; i < 8; i++) {
        int server = (int)MUST(accept(listener, NULL, NULL));
        for (int k = 0; k < 50; k++)
            WANT(server, "early ");
        if (i % 2) {
            WANT_EOF(server);
        } else {
            for (int k = 0; k < 50; k++) {
                PUT(server, "late");
                WANT(clients[i], "late");
                PUT(clients[i], "so");
                WANT(server, "so");
            }
        }
        close(server);
    }
}

CASE(upper_layer_protocol)
{
    struct duo d = duo_open(0);
    setsockopt(d.fd, IPPROTO_TCP, TCP_ULP, "tls", sizeof "tls"); /* without keys: plain bytes still */
    exchange(&d, 100);
    ERR2(setsockopt(d.fd, IPPROTO_TCP, TCP_ULP, "no such protocol", 17), ENOENT, EEXIST);
    exchange(&d, 20);
}

/* ---- io_uring, by hand ---- */

struct uring {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

static bool uring_open(struct uring *u)
{
    struct io_uring_params p = {0};
    u->fd = (int)syscall(SYS_io_uring_setup, 8, &p);
    if (u->fd < 0 || !(p.features & IORING_FEAT_SINGLE_MMAP))
        return false;
    size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    char *ring = mmap(NULL, sq_size > cq_size ? sq_size : cq_size, PROT_READ | PROT_WRITE, MAP_SHARED, u->fd,
                      IORING_OFF_SQ_RING);
    u->sqes = mmap(NULL, p.sq_entries * sizeof *u->sqes, PROT_READ | PROT_WRITE, MAP_SHARED, u->fd, IORING_OFF_SQES);
    CHECK(ring != MAP_FAILED && (void *)u->sqes != MAP_FAILED, "expected the rings, saw %s", strerror(errno));
    u->sq_tail = (unsigned *)(ring + p.sq_off.tail);
    u->sq_mask = (unsigned *)(ring + p.sq_off.ring_mask);
    u->sq_array = (unsigned *)(ring + p.sq_off.array);
    u->cq_head = (unsigned *)(ring + p.cq_off.head);
    u->cq_tail = (unsigned *)(ring + p.cq_off.tail);
    u->cq_mask = (unsigned *)(ring + p.cq_off.ring_mask);
    u->cqes = (struct io_uring_cqe *)(ring + p.cq_off.cqes);
    return true;
}

static int uring_do(struct uring *u, int op, int fd, void *bytes, unsigned len)
{
    unsigned tail = *u->sq_tail, at = tail & *u->sq_mask;
    u->sqes[at] = (struct io_uring_sqe){.opcode = (uint8_t)op, .fd = fd, .addr = (uintptr_t)bytes, .len = len};
    u->sq_array[at] = at;
    __atomic_store_n(u->sq_tail, tail + 1, __ATOMIC_RELEASE);
    MUST(syscall(SYS_io_uring_enter, u->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0));
    unsigned head = *u->cq_head;
    CHECK(head != __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE), "expected a completion, saw none");
    int result = u->cqes[head & *u->cq_mask].res;
    __atomic_store_n(u->cq_head, head + 1, __ATOMIC_RELEASE);
    return result;
}

CASE(io_uring)
{
    struct duo d = duo_open(0);
    struct uring u;
    char got[16];
    exchange(&d, 10);
    if (!uring_open(&u)) /* forbidden on this machine */
        return;
    struct duo late = duo_more(&d, COLD);
    for (int i = 0; i < 50; i++) {
        for (int k = 0; k < 2; k++) {
            const struct duo *at = k ? &late : &d;
            EQ(uring_do(&u, IORING_OP_SEND, at->fd, "by ring", 7), 7);
            P_WANT(at, "by ring");
            p_send(at, "answer");
            EQ(uring_do(&u, IORING_OP_RECV, at->fd, got, sizeof got), 6);
            EQ(memcmp(got, "answer", 6), 0);
        }
    }
    exchange(&d, 20);
    exchange(&late, 20);
}

/* ---- A sandbox of the kind that sshd puts its unprivileged half into ---- */

static void allow_only_a_few_calls(void)
{
    static const int allowed[] = {
#ifdef SYS_poll /* machines of the newer kind have only the p-forms */
        SYS_poll,          SYS_select,         SYS_time,
#endif
        SYS_read,          SYS_write,          SYS_ppoll,  SYS_pselect6,
        SYS_close,         SYS_shutdown,       SYS_futex,  SYS_brk,    SYS_mmap,           SYS_munmap,
        SYS_mremap,        SYS_madvise,        SYS_getpid, SYS_gettid, SYS_rt_sigprocmask, SYS_rt_sigreturn,
        SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_getrandom,
        SYS_exit,          SYS_exit_group,
    };
    enum { count = sizeof allowed / sizeof *allowed };
    struct sock_filter code[2 * count + 2];
    int n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < count; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)allowed[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

/* Its parent has the connection as well, so that at the end it would have to be found out who does. */
CASE(sandboxed_by_seccomp_until_exit, .process = true)
{
    struct duo d = duo_open(0);
    exchange(&d, 20);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        allow_only_a_few_calls();
        exit(0);
    }
    WAIT_CHILD(pid);
    exchange(&d, 20);
}

CASE(sandboxed_by_seccomp, .process = true)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        char block[64];
        allow_only_a_few_calls();
        for (;;) {
            AWAIT(d.fd, POLLIN);
            ssize_t n = read(d.fd, block, sizeof block);
            if (n <= 0)
                _exit(n ? 1 : 0);
            for (ssize_t done = 0; done < n;)
                done += MUST(write(d.fd, block + done, (size_t)(n - done)));
        }
    }
    MUST(close(d.fd));
    for (int i = 0; i < 100; i++) {
        p_send(&d, "to the sandbox");
        P_WANT(&d, "to the sandbox");
        if (i % 20 == 0)
            sleep_ms(10); /* it sleeps, and must be woken */
    }
    p_shutdown(&d, SHUT_WR);
    P_WANT_EOF(&d);
    WAIT_CHILD(pid);
}
