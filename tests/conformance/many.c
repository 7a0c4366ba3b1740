/*
 * epoll with many connections, several sets and several threads: who has something to read, or room to write, is told.
 * With few connections each look looks at all of them, and hides a sign that is missing.
 */
#include "sockconf.h"

enum { MANY = 12 };

struct crowd {
    struct duo d[MANY];
    int set, other; /* two sets, of which each has all of them */
};

static void both(struct crowd *c, int op, int i, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u64 = (uint64_t)i};
    MUST(epoll_ctl(c->set, op, c->d[i].fd, &event));
    if (c->other >= 0)
        MUST(epoll_ctl(c->other, op, c->d[i].fd, &event));
}

/* Takes what there is in a set. */
static void drain(int set)
{
    struct epoll_event seen[MANY];
    while (epoll_wait(set, seen, MANY, 20) > 0)
        ;
}

static struct crowd gather(uint32_t events, bool two)
{
    struct crowd c = {.set = (int)MUST(epoll_create1(EPOLL_CLOEXEC)), .other = -1};
    if (two)
        c.other = (int)MUST(epoll_create1(EPOLL_CLOEXEC));
    c.d[0] = duo_open(COLD);
    for (int i = 1; i < MANY; i++)
        c.d[i] = duo_more(&c.d[0], COLD);
    duo_warm_all(c.d, MANY);
    for (int i = 0; i < MANY; i++) {
        set_nonblock(c.d[i].fd, true);
        both(&c, EPOLL_CTL_ADD, i, events);
    }
    drain(c.set);
    if (two)
        drain(c.other);
    return c;
}

/* Waits for these events (at least) of one connection; others may have some. */
static void see(const char *here, int set, int i, uint32_t events)
{
    step(here);
    int64_t end = now_ms() + 10000;
    for (;;) {
        struct epoll_event seen[MANY];
        int n = epoll_wait(set, seen, MANY, 10000);
        for (int k = 0; k < n; k++)
            if (seen[k].data.u64 == (uint64_t)i && (seen[k].events & events) == events)
                return;
        if (n <= 0 || now_ms() > end)
            fail(here, "no event %#x of connection %d", events, i);
    }
}
#define SEE(set, i, events) see(HERE, set, i, events)

/* Receives until there is nothing; how much. */
static size_t empty(int fd)
{
    char got[64];
    size_t all = 0;
    ssize_t n;
    while ((n = recv(fd, got, sizeof got, 0)) > 0)
        all += (size_t)n;
    return all;
}

CASE(epoll_two_sets_have_each_edge)
{
    struct crowd c = gather(EPOLLIN | EPOLLRDHUP | EPOLLET, true);
    for (int round = 0; round < 30; round++) {
        int i = round % 2 ? MANY - 1 : 3;
        p_send(&c.d[i], "abc");
        SEE(c.set, i, EPOLLIN);
        SEE(c.other, i, EPOLLIN);
        EQ(empty(c.d[i].fd), 3);
    }
}

CASE(epoll_edge_comes_though_a_receive_looked_first)
{
    /* The program looks for more until there is nothing, and a little longer: it finds what the sign was of. */
    struct crowd c = gather(EPOLLIN | EPOLLRDHUP | EPOLLET, true);
    int i = MANY - 1;
    for (int round = 0; round < 60; round++) {
        p_send(&c.d[i], "abc");
        SEE(c.set, i, EPOLLIN);
        size_t got = 0;
        for (int64_t end = now_ms() + 2; now_ms() < end || got < 3;)
            got += empty(c.d[i].fd);
        EQ(got, 3);
    }
}

CASE(epoll_edge_of_an_own_shutdown)
{
    struct crowd c = gather(EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, true);
    int i = MANY - 1;
    fill(c.d[i].fd);
    drain(c.set);
    drain(c.other);
    MUST(shutdown(c.d[i].fd, SHUT_WR));
    SEE(c.set, i, EPOLLOUT);
    SEE(c.other, i, EPOLLOUT);
}

CASE(epoll_edge_of_room_in_two_sets)
{
    struct crowd c = gather(EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, true);
    int i = MANY - 1;
    for (int round = 0; round < 3; round++) {
        size_t sent = fill(c.d[i].fd);
        drain(c.set);
        drain(c.other);
        sent += fill_on(c.d[i].fd, sent); /* room may have come meanwhile */
        EQ(p_do(&c.d[i], do_recv_pattern, (long)sent), 0);
        SEE(c.set, i, EPOLLOUT);
        SEE(c.other, i, EPOLLOUT);
    }
}

CASE(epoll_hangup_is_told_unasked)
{
    static const uint32_t asked[] = {0, EPOLLOUT, EPOLLET, EPOLLPRI};
    for (int k = 0; k < 4; k++) {
        struct crowd c = gather(EPOLLIN, false);
        /* The end comes while nobody looks, and while somebody sleeps. */
        for (int late = 0; late < 2; late++) {
            int i = late ? MANY - 1 : 3;
            both(&c, EPOLL_CTL_MOD, i, asked[k]);
            MUST(shutdown(c.d[i].fd, SHUT_WR));
            struct epoll_event seen[MANY];
            epoll_wait(c.set, seen, MANY, 0);
            if (late) {
                p_start(&c.d[i], do_shutdown_later, 50);
            } else {
                p_shutdown(&c.d[i], SHUT_WR);
            }
            SEE(c.set, i, EPOLLHUP);
            if (late)
                EQ(p_finish(&c.d[i]), 0);
            MUST(epoll_ctl(c.set, EPOLL_CTL_DEL, c.d[i].fd, NULL));
        }
        for (int i = 0; i < MANY; i++)
            close(c.d[i].fd);
        close(c.set);
    }
}

/* A thread that sleeps, and takes what comes. */
struct sleeper {
    int set;
    bool by_poll; /* asleep in poll(), on the set itself */
    atomic_int taken;
    pthread_t thread;
};

static void *sleep_and_take(void *arg)
{
    struct sleeper *s = arg;
    for (;;) {
        struct epoll_event seen[MANY];
        struct pollfd one = {.fd = s->set, .events = POLLIN};
        if (s->by_poll)
            poll(&one, 1, -1);
        int n = epoll_wait(s->set, seen, MANY, s->by_poll ? 0 : -1);
        for (int k = 0; k < n; k++) {
            char got[16];
            ssize_t size = recv((int)seen[k].data.u64, got, sizeof got, MSG_DONTWAIT);
            if (size > 0)
                atomic_fetch_add(&s->taken, (int)size);
            if (size == 0)
                return NULL;
        }
    }
}

enum again { NOT, MODIFIED, DELETED_AND_ADDED };

/* One sleeps, the other arms the registration again and looks once; then a request comes, for the one that sleeps. */
static void look_while_another_sleeps(const char *here, uint32_t flags, enum again again, bool by_poll, int connections)
{
    struct duo d[MANY];
    d[0] = duo_open(COLD);
    for (int i = 1; i < connections; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, connections);
    struct sleeper s = {.set = (int)MUST(epoll_create1(EPOLL_CLOEXEC)), .by_poll = by_poll};
    struct epoll_event event[MANY];
    for (int i = 0; i < connections; i++) {
        event[i] = (struct epoll_event){.events = EPOLLIN | flags, .data.u64 = (uint64_t)d[i].fd};
        MUST(epoll_ctl(s.set, EPOLL_CTL_ADD, d[i].fd, &event[i]));
    }
    EQ(pthread_create(&s.thread, NULL, sleep_and_take, &s), 0);
    int i = connections - 1, wanted = 0;
    for (int round = 0; round < 40; round++) {
        sleep_ms(2);
        struct epoll_event seen[MANY];
        p_send(&d[i], "abc");
        wanted += 3;
        for (int64_t end = now_ms() + 10000; atomic_load(&s.taken) < wanted;) {
            if (now_ms() > end)
                fail(here, "round %d: the thread that sleeps is not told", round);
            sched_yield();
        }
        if (again == DELETED_AND_ADDED) {
            MUST(epoll_ctl(s.set, EPOLL_CTL_DEL, d[i].fd, NULL));
            sleep_ms(1);
            MUST(epoll_ctl(s.set, EPOLL_CTL_ADD, d[i].fd, &event[i]));
        } else if (again == MODIFIED) {
            MUST(epoll_ctl(s.set, EPOLL_CTL_MOD, d[i].fd, &event[i]));
        }
        EQ(epoll_wait(s.set, seen, MANY, 0), 0);
    }
    p_shutdown(&d[i], SHUT_WR);
    pthread_join(s.thread, NULL);
    for (int k = 0; k < connections; k++)
        close(d[k].fd);
    close(s.set);
}
#define LOOK_WHILE_ANOTHER_SLEEPS(...) look_while_another_sleeps(HERE, __VA_ARGS__)

CASE(epoll_oneshot_is_armed_while_another_sleeps, .seconds = 60)
{
    for (int connections = 1; connections <= MANY; connections += MANY - 1)
        for (uint32_t edge = 0; edge < 2; edge++)
            LOOK_WHILE_ANOTHER_SLEEPS(EPOLLONESHOT | (edge ? EPOLLET : 0), MODIFIED, false, connections);
}

CASE(epoll_added_again_while_another_sleeps, .seconds = 60)
{
    for (int connections = 1; connections <= MANY; connections += MANY - 1)
        for (uint32_t edge = 0; edge < 2; edge++)
            LOOK_WHILE_ANOTHER_SLEEPS(edge ? EPOLLET : 0, DELETED_AND_ADDED, false, connections);
}

CASE(epoll_looked_at_while_another_sleeps, .seconds = 60)
{
    for (int connections = 1; connections <= MANY; connections += MANY - 1)
        for (uint32_t edge = 0; edge < 2; edge++)
            LOOK_WHILE_ANOTHER_SLEEPS(edge ? EPOLLET : 0, edge ? NOT : MODIFIED, false, connections);
}

CASE(epoll_armed_while_another_sleeps_in_poll, .seconds = 60)
{
    for (int connections = 1; connections <= MANY; connections += MANY - 1) {
        LOOK_WHILE_ANOTHER_SLEEPS(EPOLLONESHOT, MODIFIED, true, connections);
        LOOK_WHILE_ANOTHER_SLEEPS(EPOLLET, DELETED_AND_ADDED, true, connections);
    }
}
