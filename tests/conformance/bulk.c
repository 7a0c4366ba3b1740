/*
 * Big transfers, both directions at once, every byte checked: by each way of waiting and each call.
 */
#include "sockconf.h"

enum wait { BY_THREADS, BY_POLL, BY_SELECT, BY_LEVEL, BY_EDGE, BY_ONESHOT, BY_EXCLUSIVE, BY_SPINNING };
enum call { SEND, WRITE, VECTOR, MSG, MMSG, SENDFILE, SPLICE, PEEK, WAITALL, ANY };

/* What one end does. The other end's plan has the seeds exchanged. */
struct plan {
    enum wait wait;
    enum call call;
    size_t out, in;     /* bytes to move */
    size_t chunk;       /* at most this much in one call */
    uint64_t seed_out, seed_in;
};

struct flow {
    const struct plan *plan;
    int fd, file, pipe[2];
    size_t done;
    char *block;
    size_t have, used; /* of `block`, when sending */
    uint32_t dice;
    bool nonblock;
};

static enum call choose(struct flow *f)
{
    static const enum call kinds[] = {SEND, WRITE, VECTOR, MSG, MMSG, SEND, PEEK, WAITALL};
    return f->plan->call == ANY ? kinds[dice(&f->dice) % 8] : f->plan->call;
}

/* All that the plan sends, as a file: its pages must stay as they are, since they are sent without a copy. */
static int whole_file(const struct plan *plan)
{
    int fd = (int)MUST(syscall(SYS_memfd_create, "bulk", 0));
    char block[65536];
    for (size_t done = 0; done < plan->out; done += sizeof block) {
        pattern(plan->seed_out, done, block, sizeof block);
        EQ(write(fd, block, sizeof block), sizeof block);
    }
    return fd;
}

static void flow_open(struct flow *f, const struct plan *plan, int fd, uint32_t seed)
{
    *f = (struct flow){.plan = plan, .fd = fd, .dice = seed, .block = malloc(plan->chunk), .file = -1};
    f->nonblock = plan->wait != BY_THREADS;
    if (plan->call == SENDFILE)
        f->file = whole_file(plan);
    if (plan->call == SPLICE)
        MUST(pipe(f->pipe));
}

/* One call that sends; its result, or -1. */
static ssize_t send_once(struct flow *f, const char *bytes, size_t len)
{
    size_t third = len / 3;
    struct iovec parts[] = {{(void *)bytes, third}, {NULL, 0}, {(void *)(bytes + third), len - third}};
    struct mmsghdr msgs[] = {{.msg_hdr = {.msg_iov = parts, .msg_iovlen = 1}},
                             {.msg_hdr = {.msg_iov = parts + 2, .msg_iovlen = 1}}};
    struct msghdr msg = {.msg_iov = parts, .msg_iovlen = 3};
    int n;
    switch (choose(f)) {
    case WRITE:
        return write(f->fd, bytes, len);
    case VECTOR:
        return writev(f->fd, parts, 3);
    case MSG:
        return sendmsg(f->fd, &msg, 0);
    case MMSG: /* a short first message would make a hole: only as one message then */
        if (f->nonblock)
            return sendto(f->fd, bytes, len, 0, NULL, 0);
        n = sendmmsg(f->fd, msgs, 2, 0);
        if (n < 0)
            return n;
        return (ssize_t)(msgs[0].msg_len + (n > 1 ? msgs[1].msg_len : 0));
    case SENDFILE: {
        off_t at = (off_t)f->done;
        return sendfile(f->fd, f->file, &at, len);
    }
    case SPLICE: {
        size_t piece = len < 4096 ? len : 4096;
        int held = 0;
        MUST(ioctl(f->pipe[0], FIONREAD, &held));
        if (!held)
            held = (int)MUST(write(f->pipe[1], bytes, piece));
        return splice(f->pipe[0], NULL, f->fd, NULL, (size_t)held, 0);
    }
    default:
        return send(f->fd, bytes, len, 0);
    }
}

static ssize_t recv_once(struct flow *f, char *bytes, size_t len)
{
    size_t third = len / 3;
    struct iovec parts[] = {{bytes, third}, {bytes + third, len - third}};
    struct mmsghdr msgs[] = {{.msg_hdr = {.msg_iov = parts, .msg_iovlen = 2}}};
    struct msghdr msg = {.msg_iov = parts, .msg_iovlen = 2};
    switch (choose(f)) {
    case WRITE:
        return read(f->fd, bytes, len);
    case VECTOR:
        return readv(f->fd, parts, 2);
    case MSG:
        return recvmsg(f->fd, &msg, 0);
    case MMSG: {
        int n = recvmmsg(f->fd, msgs, 1, 0, NULL);
        return n < 0 ? n : (ssize_t)msgs[0].msg_len;
    }
    case SPLICE: {
        ssize_t n = splice(f->fd, NULL, f->pipe[1], NULL, len < 4096 ? len : 4096, 0);
        return n <= 0 ? n : read(f->pipe[0], bytes, (size_t)n);
    }
    case PEEK: {
        ssize_t n = recv(f->fd, bytes, len, MSG_PEEK);
        if (n <= 0)
            return n;
        int64_t wrong = pattern_differs(f->plan->seed_in, f->done, bytes, (size_t)n);
        CHECK(wrong < 0, "expected the pattern in a peek, saw another byte at %lld", (long long)wrong);
        return recv(f->fd, bytes, (size_t)n, 0);
    }
    case WAITALL:
        return recv(f->fd, bytes, len, MSG_WAITALL);
    default:
        return recv(f->fd, bytes, len, 0);
    }
}

/* Sends a piece. False: would block. */
static bool send_some(struct flow *f)
{
    const struct plan *p = f->plan;
    if (f->used == f->have) {
        f->have = 1 + dice(&f->dice) % p->chunk;
        if (f->have > p->out - f->done)
            f->have = p->out - f->done;
        f->used = 0;
        pattern(p->seed_out, f->done, f->block, f->have);
    }
    ssize_t n = send_once(f, f->block + f->used, f->have - f->used);
    if (n < 0 && (errno == EAGAIN || errno == EINTR) && f->nonblock)
        return false;
    CHECK(n > 0 && (size_t)n <= f->have - f->used, "expected to send up to %zu bytes at %zu, saw %zd %s",
          f->have - f->used, f->done, n, n < 0 ? strerror(errno) : "");
    f->used += (size_t)n;
    f->done += (size_t)n;
    return true;
}

static bool recv_some(struct flow *f)
{
    const struct plan *p = f->plan;
    size_t len = 1 + dice(&f->dice) % p->chunk;
    if (len > p->in - f->done)
        len = p->in - f->done;
    ssize_t n = recv_once(f, f->block, len);
    if (n < 0 && (errno == EAGAIN || errno == EINTR) && f->nonblock)
        return false;
    CHECK(n > 0 && (size_t)n <= len, "expected up to %zu bytes at %zu of %zu, saw %zd %s", len, f->done, p->in, n,
          n < 0 ? strerror(errno) : "");
    int64_t wrong = pattern_differs(p->seed_in, f->done, f->block, (size_t)n);
    CHECK(wrong < 0, "expected the pattern, saw another byte at position %lld", (long long)wrong);
    f->done += (size_t)n;
    return true;
}

static void *send_all(void *arg)
{
    struct flow *f = arg;
    while (f->done < f->plan->out)
        send_some(f);
    return NULL;
}

/* How the event loop waits: 1 readable, 2 writable, as the descriptor's state or its edge says. */
static int wait_for(const struct plan *p, int fd, int set, int wanted)
{
    struct epoll_event event = {.events = 0, .data.u64 = 0xabcdef0123456789};
    struct timeval limit = {15, 0};
    fd_set in, out;
    int seen = 0;
    switch (p->wait) {
    case BY_POLL:
        seen = events_of(fd, (wanted & 1 ? POLLIN : 0) | (wanted & 2 ? POLLOUT : 0), 15000);
        return (seen & POLLIN ? 1 : 0) | (seen & POLLOUT ? 2 : 0) | (seen & (POLLHUP | POLLERR) ? 3 : 0);
    case BY_SELECT:
        FD_ZERO(&in);
        FD_ZERO(&out);
        if (wanted & 1)
            FD_SET(fd, &in);
        if (wanted & 2)
            FD_SET(fd, &out);
        select(fd + 1, &in, &out, NULL, &limit);
        return (FD_ISSET(fd, &in) ? 1 : 0) | (FD_ISSET(fd, &out) ? 2 : 0);
    case BY_SPINNING:
        return wanted;
    case BY_ONESHOT:
    case BY_LEVEL:
        event.events = (wanted & 1 ? EPOLLIN : 0) | (wanted & 2 ? EPOLLOUT : 0);
        if (p->wait == BY_ONESHOT)
            event.events |= EPOLLONESHOT;
        MUST(epoll_ctl(set, EPOLL_CTL_MOD, fd, &event));
        break;
    default:
        break;
    }
    event.data.u64 = 0;
    int n = epoll_wait(set, &event, 1, 15000);
    if (n < 1)
        return 0;
    EQ(event.data.u64, 0xabcdef0123456789);
    seen = (int)event.events;
    return (seen & EPOLLIN ? 1 : 0) | (seen & EPOLLOUT ? 2 : 0) | (seen & (EPOLLHUP | EPOLLERR) ? 3 : 0);
}

static void event_loop(struct flow *out, struct flow *in)
{
    const struct plan *p = out->plan;
    int fd = out->fd, set = -1;
    bool edge = p->wait == BY_EDGE;
    set_nonblock(fd, true);
    if (p->wait != BY_POLL && p->wait != BY_SELECT && p->wait != BY_SPINNING) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.u64 = 0xabcdef0123456789};
        if (edge)
            event.events |= EPOLLET;
        if (p->wait == BY_EXCLUSIVE)
            event.events |= EPOLLEXCLUSIVE;
        set = (int)MUST(epoll_create1(0));
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event));
    }
    while (out->done < p->out || in->done < p->in) {
        int wanted = (in->done < p->in ? 1 : 0) | (out->done < p->out ? 2 : 0);
        int ready = wait_for(p, fd, set, wanted);
        CHECK(ready, "expected readiness within 15 s (sent %zu of %zu, got %zu of %zu), saw none", out->done, p->out,
              in->done, p->in);
        /* An edge is told once, so all of it must be taken; a state is told again. */
        while (ready & 2 && out->done < p->out && send_some(out) && edge)
            ;
        while (ready & 1 && in->done < p->in && recv_some(in) && edge)
            ;
    }
    if (set >= 0)
        close(set);
    set_nonblock(fd, false);
}

static void run_plan(int fd, const struct plan *plan)
{
    struct flow out, in;
    flow_open(&out, plan, fd, (uint32_t)plan->seed_out * 7 + 1);
    flow_open(&in, plan, fd, (uint32_t)plan->seed_in * 13 + 5);
    if (plan->wait == BY_THREADS) {
        pthread_t thread;
        EQ(pthread_create(&thread, NULL, send_all, &out), 0);
        while (in.done < plan->in)
            recv_some(&in);
        pthread_join(thread, NULL);
    } else {
        event_loop(&out, &in);
    }
    free(out.block);
    free(in.block);
}

static long do_plan(int *fd, void *bytes, size_t len, long unused)
{
    (void)len, (void)unused;
    run_plan(*fd, bytes);
    return 0;
}

struct far_end {
    struct duo d;
    struct plan plan;
    pthread_t thread;
};

static void *order_plan(void *arg)
{
    struct far_end *f = arg;
    p_give(&f->d, do_plan, &f->plan, sizeof f->plan, 0);
    return NULL;
}

/* Runs `here` at this end and its mirror image, waiting and calling in its own way, at the other. */
static void both(const struct duo *d, struct plan here, enum wait far_wait, enum call far_call)
{
    here.seed_out = 1, here.seed_in = 2;
    struct far_end far = {.d = *d, .plan = here};
    far.plan.wait = far_wait, far.plan.call = far_call;
    far.plan.out = here.in, far.plan.in = here.out;
    far.plan.seed_out = 2, far.plan.seed_in = 1;
    EQ(pthread_create(&far.thread, NULL, order_plan, &far), 0);
    run_plan(d->fd, &here);
    pthread_join(far.thread, NULL);
    MUST(shutdown(d->fd, SHUT_WR));
    P_WANT_EOF(d);
    p_shutdown(d, SHUT_WR);
    WANT_EOF(d->fd);
}

#define MIB ((size_t)1 << 20)
#define BULK(name, mib, chunk_, wait_, call_, far_wait, far_call, open_flags)                  \
    CASE(bulk_##name, .seconds = 90)                                                           \
    {                                                                                          \
        struct duo d = duo_open(open_flags);                                                   \
        both(&d, (struct plan){wait_, call_, (mib) * MIB + 4321, (mib) * MIB + 77, chunk_, 0, 0}, far_wait, far_call); \
    }

BULK(blocking, 64, 150000, BY_THREADS, SEND, BY_THREADS, SEND, 0)
BULK(blocking_cold, 64, 150000, BY_THREADS, SEND, BY_THREADS, SEND, COLD)
BULK(blocking_small, 4, 300, BY_THREADS, SEND, BY_THREADS, SEND, 0)
BULK(blocking_small_cold, 4, 300, BY_THREADS, WRITE, BY_THREADS, WRITE, COLD)
BULK(huge_writes, 96, 20 << 20, BY_THREADS, WRITE, BY_THREADS, WRITE, 0)
BULK(poll, 64, 150000, BY_POLL, SEND, BY_POLL, SEND, 0)
BULK(poll_cold, 64, 150000, BY_POLL, WRITE, BY_THREADS, WRITE, COLD)
BULK(select, 64, 150000, BY_SELECT, WRITE, BY_SELECT, WRITE, 0)
BULK(epoll_level, 64, 150000, BY_LEVEL, SEND, BY_LEVEL, SEND, 0)
BULK(epoll_level_cold, 64, 150000, BY_LEVEL, SEND, BY_LEVEL, SEND, COLD)
BULK(epoll_edge, 64, 150000, BY_EDGE, WRITE, BY_EDGE, WRITE, 0)
BULK(epoll_edge_cold, 64, 150000, BY_EDGE, WRITE, BY_EDGE, WRITE, COLD)
BULK(epoll_edge_small, 4, 500, BY_EDGE, WRITE, BY_EDGE, SEND, 0)
BULK(epoll_oneshot, 64, 150000, BY_ONESHOT, SEND, BY_ONESHOT, SEND, 0)
BULK(epoll_exclusive, 64, 150000, BY_EXCLUSIVE, SEND, BY_EXCLUSIVE, SEND, 0)
BULK(spinning, 64, 150000, BY_SPINNING, SEND, BY_SPINNING, SEND, 0)
BULK(spinning_small_cold, 4, 200, BY_SPINNING, SEND, BY_SPINNING, SEND, COLD)
BULK(blocking_to_edge, 64, 150000, BY_THREADS, SEND, BY_EDGE, WRITE, 0)
BULK(poll_to_level, 64, 60000, BY_POLL, SEND, BY_LEVEL, VECTOR, 0)
BULK(vectors, 64, 150000, BY_THREADS, VECTOR, BY_POLL, VECTOR, 0)
BULK(messages, 64, 150000, BY_THREADS, MSG, BY_LEVEL, MSG, 0)
BULK(many_messages, 64, 150000, BY_THREADS, MMSG, BY_EDGE, MMSG, 0)
BULK(peek_then_read, 64, 150000, BY_THREADS, PEEK, BY_EDGE, PEEK, 0)
BULK(waitall, 64, 500000, BY_THREADS, WAITALL, BY_POLL, WAITALL, 0)
BULK(sendfile, 64, 500000, BY_THREADS, SENDFILE, BY_EDGE, SENDFILE, 0)
BULK(splice, 32, 4096, BY_THREADS, SPLICE, BY_THREADS, SPLICE, 0)
BULK(any_call, 64, 100000, BY_THREADS, ANY, BY_EDGE, ANY, 0)
BULK(any_call_cold, 64, 100000, BY_EDGE, ANY, BY_THREADS, ANY, COLD)
BULK(any_call_small, 8, 3000, BY_LEVEL, ANY, BY_THREADS, ANY, 0)
BULK(v6, 64, 150000, BY_THREADS, SEND, BY_EDGE, WRITE, V6)
BULK(one_way_sizes, 0, 70000, BY_THREADS, SEND, BY_THREADS, SEND, 0)

/* One thread sends on one descriptor, another receives on its duplicate; the first is closed in the middle. */
CASE(bulk_on_two_descriptors, .seconds = 60)
{
    struct duo d = duo_open(0);
    struct plan plan = {BY_THREADS, SEND, 48 * MIB, 48 * MIB, 100000, 1, 2};
    struct far_end far = {.d = d, .plan = plan};
    struct flow out, in;
    pthread_t thread;
    int copy = (int)MUST(dup(d.fd));
    far.plan.seed_out = 2, far.plan.seed_in = 1;
    EQ(pthread_create(&far.thread, NULL, order_plan, &far), 0);
    flow_open(&out, &plan, copy, 3);
    flow_open(&in, &plan, d.fd, 4);
    EQ(pthread_create(&thread, NULL, send_all, &out), 0);
    while (in.done < plan.in / 2)
        recv_some(&in);
    in.fd = (int)MUST(dup(d.fd));
    MUST(close(d.fd));
    while (in.done < plan.in)
        recv_some(&in);
    pthread_join(thread, NULL);
    pthread_join(far.thread, NULL);
    MUST(close(copy));
    PUT(in.fd, "last");
    P_WANT(&d, "last");
    MUST(close(in.fd));
    P_WANT_EOF(&d);
}

CASE(bulk_request_reply, .seconds = 60)
{
    struct duo d = duo_open(0);
    p_start(&d, do_echo, 0);
    char *out = malloc(MIB), *in = malloc(MIB);
    uint32_t state = 3;
    for (int i = 0; i < 2000; i++) {
        size_t len = i % 50 == 0 ? 1 + dice(&state) % MIB : 1 + dice(&state) % 2000;
        pattern((uint64_t)i, 0, out, len);
        size_t sent = 0, got = 0;
        set_nonblock(d.fd, true);
        while (got < len) { /* the echo may fill up both ways: send and receive in turn */
            AWAIT(d.fd, POLLIN | (sent < len ? POLLOUT : 0));
            ssize_t n = sent < len ? send(d.fd, out + sent, len - sent, 0) : 0;
            sent += n > 0 ? (size_t)n : 0;
            n = recv(d.fd, in + got, len - got, 0);
            CHECK(n > 0 || (n < 0 && errno == EAGAIN), "expected the reply, saw %zd %s", n, strerror(errno));
            got += n > 0 ? (size_t)n : 0;
        }
        CHECK(!memcmp(in, out, len), "expected request %d of %zu bytes back, saw other bytes", i, len);
    }
    MUST(shutdown(d.fd, SHUT_WR));
    set_nonblock(d.fd, false);
    WANT_EOF(d.fd);
    p_finish(&d);
}

CASE(bulk_idle_between_bursts, .seconds = 60)
{
    struct duo d = duo_open(0);
    for (int round = 0; round < 12; round++) {
        size_t size = round % 2 ? 5 * MIB : 100;
        p_start(&d, round % 3 ? do_send_pattern : do_send_chunks, (long)size);
        sleep_ms(round % 4 * 10); /* the receiver comes late, so the sender must wait for room */
        RECV_PATTERN(d.fd, size);
        EQ(p_finish(&d), 0);
        sleep_ms(30);
        p_start(&d, do_recv_pattern, (long)size);
        SEND_PATTERN(d.fd, size);
        EQ(p_finish(&d), 0);
    }
}

/* Many connections in one epoll set, all busy both ways, each with its own pattern. */
CASE(bulk_many_in_one_epoll, .seconds = 90)
{
    enum { count = 16 };
    struct duo d[count];
    struct flow out[count], in[count];
    struct plan plan[count];
    struct far_end far[count];
    size_t size = 4 * MIB;
    int set = (int)MUST(epoll_create1(0)), open = count;
    for (int i = 0; i < count; i++) /* a puppet takes one order at a time: one puppet each */
        d[i] = duo_open(i % 2 ? 0 : COLD);
    for (int i = 0; i < count; i++) {
        uint64_t seed = 10 + 2 * (uint64_t)i;
        plan[i] = (struct plan){BY_EDGE, SEND, size, size, 100000, seed, seed + 1};
        far[i] = (struct far_end){.d = d[i], .plan = plan[i]};
        far[i].plan.wait = i % 3 ? BY_THREADS : BY_EDGE;
        far[i].plan.seed_out = seed + 1, far[i].plan.seed_in = seed;
        flow_open(&out[i], &plan[i], d[i].fd, (uint32_t)i + 1);
        flow_open(&in[i], &plan[i], d[i].fd, (uint32_t)i + 100);
        set_nonblock(d[i].fd, true);
        EQ(pthread_create(&far[i].thread, NULL, order_plan, &far[i]), 0);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = (uint32_t)i};
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, d[i].fd, &event));
    }
    while (open) {
        struct epoll_event seen[8];
        int n = (int)MUST(epoll_wait(set, seen, 8, 15000));
        CHECK(n > 0, "expected readiness within 15 s, saw none with %d open", open);
        for (int k = 0; k < n; k++) {
            int i = (int)seen[k].data.u32;
            bool before = out[i].done < size || in[i].done < size;
            while (out[i].done < size && send_some(&out[i]))
                ;
            while (in[i].done < size && recv_some(&in[i]))
                ;
            open -= before && out[i].done == size && in[i].done == size;
        }
    }
    for (int i = 0; i < count; i++)
        pthread_join(far[i].thread, NULL);
}
