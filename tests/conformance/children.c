/*
 * Children that are made past fork(), and programs that are started: both go on with the connection when the parent has
 * closed it.
 */
#include "sockconf.h"
#include <linux/sched.h>
#include <sched.h>
#include <spawn.h>

extern char **environ;

static long child_serves(const struct duo *d)
{
    for (int i = 0; i < 100; i++) {
        WANT(d->fd, "question");
        PUT(d->fd, "answer");
    }
    return 0;
}

static int serve_and_end(void *arg)
{
    _exit((int)child_serves(arg));
}

enum maker { BY_CLONE, BY_FORK_WITHOUT_HANDLERS, BY_NUMBER, BY_CLONE3, BY_OLD_NUMBER, MAKERS };

/* Makes a child that serves the connection, in this way. */
static pid_t make_child(enum maker how, const struct duo *d)
{
    static char stack[256 << 10] __attribute__((aligned(16)));
    pid_t pid = -1;
    struct clone_args args = {.exit_signal = SIGCHLD};
    switch (how) {
    case BY_CLONE:
        return (pid_t)MUST(clone(serve_and_end, stack + sizeof stack, SIGCHLD, (void *)d));
    case BY_FORK_WITHOUT_HANDLERS:
        pid = _Fork();
        break;
    case BY_NUMBER:
        pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
        break;
    case BY_CLONE3:
        pid = (pid_t)syscall(SYS_clone3, &args, sizeof args);
        break;
#ifdef SYS_fork
    case BY_OLD_NUMBER:
        pid = (pid_t)syscall(SYS_fork);
        break;
#endif
    default:
        pid = fork();
    }
    if (pid == 0)
        serve_and_end((void *)d);
    return (pid_t)MUST(pid);
}

CASE(children_past_fork)
{
    for (int how = 0; how < MAKERS; how++) {
        struct duo d = duo_open(0);
        pid_t pid = make_child((enum maker)how, &d);
        MUST(close(d.fd));
        for (int i = 0; i < 100; i++) {
            p_send(&d, "question");
            P_WANT(&d, "answer");
        }
        WAIT_CHILD(pid);
        P_WANT_EOF(&d);
    }
}

CASE(child_in_another_pid_namespace, .root = true)
{
    /* It does not see its parent, nor its parent it under the same number; each must not take the other for dead. */
    static char stack[256 << 10] __attribute__((aligned(16)));
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(clone(serve_and_end, stack + sizeof stack, SIGCHLD | CLONE_NEWPID, &d));
    MUST(close(d.fd));
    for (int i = 0; i < 100; i++) {
        p_send(&d, "question");
        P_WANT(&d, "answer");
    }
    WAIT_CHILD(pid);
    P_WANT_EOF(&d);
}

CASE(clone_that_fails)
{
    static char stack[4096] __attribute__((aligned(16)));
    struct duo d = duo_open(0);
    ERR(clone(serve_and_end, stack + sizeof stack, CLONE_THREAD, &d), EINVAL);
    ERR(clone(serve_and_end, stack + sizeof stack, CLONE_NEWNS | CLONE_FS, &d), EINVAL);
    PUT(d.fd, "alone");
    P_WANT(&d, "alone");
    MUST(close(d.fd));
    P_WANT_EOF(&d);
}

static int close_it(void *arg)
{
    const struct duo *d = arg;
    close(d->fd);
    return 0;
}

CASE(child_that_shares_descriptors)
{
    /* What it closes is closed here, too. */
    static char stack[64 << 10] __attribute__((aligned(16)));
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    pid_t pid = (pid_t)MUST(clone(close_it, stack + sizeof stack, SIGCHLD | CLONE_FILES, &d));
    WAIT_CHILD(pid);
    ERR(send(d.fd, "x", 1, MSG_NOSIGNAL), EBADF);
    P_WANT_EOF(&d);
    PUT(e.fd, "other");
    P_WANT(&e, "other");
    p_send(&e, "reply");
    WANT(e.fd, "reply");
}

/* ---- Programs ---- */

static char *mate_path(void)
{
    static char path[PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/mate", settings.folder);
    return path;
}

CASE(spawned_program_keeps_what_the_parent_closes)
{
    for (int i = 0; i < 5; i++) {
        struct duo d = duo_open(0);
        char number[16], *argv[] = {"mate", "echo", number, NULL};
        snprintf(number, sizeof number, "%d", d.fd);
        pid_t pid;
        EQ(posix_spawn(&pid, mate_path(), NULL, NULL, argv, environ), 0);
        MUST(close(d.fd));
        for (int k = 0; k < 100; k++) {
            p_send(&d, "from far");
            P_WANT(&d, "FROM FAR");
        }
        p_shutdown(&d, SHUT_WR);
        P_WANT_EOF(&d);
        WAIT_CHILD(pid);
    }
}

CASE(spawn_that_fails_changes_nothing)
{
    struct duo d = duo_open(0);
    char *argv[] = {"nothing", NULL};
    pid_t pid;
    EQ(posix_spawn(&pid, "/nonexistent/program", NULL, NULL, argv, environ), ENOENT);
    PUT(d.fd, "alive");
    P_WANT(&d, "alive");
    MUST(close(d.fd));
    P_WANT_EOF(&d);
}

enum { COPIES = 40, FIRST = 100 };

CASE(spawn_with_many_file_actions, .seconds = 40)
{
    /* Each connection under another number, some as a copy of a copy. */
    struct duo d[COPIES];
    char numbers[COPIES][16], *argv[COPIES + 3] = {"mate", "numbers"};
    posix_spawn_file_actions_t actions;
    EQ(posix_spawn_file_actions_init(&actions), 0);
    d[0] = duo_open(COLD);
    for (int i = 1; i < COPIES; i++)
        d[i] = duo_more(&d[0], COLD);
    duo_warm_all(d, COPIES);
    for (int i = 0; i < COPIES; i++) {
        int from = d[i].fd;
        MUST(fcntl(from, F_SETFD, FD_CLOEXEC));
        if (i % 3 == 0) {
            EQ(posix_spawn_file_actions_adddup2(&actions, from, FIRST + COPIES + i), 0);
            from = FIRST + COPIES + i;
        }
        EQ(posix_spawn_file_actions_adddup2(&actions, from, FIRST + i), 0);
        snprintf(numbers[i], sizeof numbers[i], "%d", FIRST + i);
        argv[i + 2] = numbers[i];
    }
    pid_t pid;
    EQ(posix_spawn(&pid, mate_path(), &actions, NULL, argv, environ), 0);
    EQ(posix_spawn_file_actions_destroy(&actions), 0);
    for (int i = 0; i < COPIES; i++)
        MUST(close(d[i].fd));
    for (int i = 0; i < COPIES; i++) {
        P_WANT(&d[i], numbers[i]);
        P_WANT_EOF(&d[i]);
    }
    WAIT_CHILD(pid);
}

struct starter {
    struct duo d;
    posix_spawn_file_actions_t actions;
    pthread_barrier_t *barrier;
    pid_t pid;
};

static void *prepare_and_spawn(void *arg)
{
    struct starter *s = arg;
    char *argv[] = {"mate", "echo", "50", NULL};
    EQ(posix_spawn_file_actions_init(&s->actions), 0);
    EQ(posix_spawn_file_actions_adddup2(&s->actions, s->d.fd, 50), 0);
    pthread_barrier_wait(s->barrier); /* both have prepared before either spawns */
    EQ(posix_spawn(&s->pid, mate_path(), &s->actions, NULL, argv, environ), 0);
    EQ(posix_spawn_file_actions_destroy(&s->actions), 0);
    MUST(close(s->d.fd));
    return NULL;
}

CASE(two_threads_prepare_to_spawn)
{
    for (int round = 0; round < 5; round++) {
        struct starter s[2];
        pthread_t threads[2];
        pthread_barrier_t barrier;
        EQ(pthread_barrier_init(&barrier, NULL, 2), 0);
        s[0].d = duo_open(0);
        s[1].d = duo_more(&s[0].d, 0);
        for (int i = 0; i < 2; i++) {
            s[i].barrier = &barrier;
            MUST(fcntl(s[i].d.fd, F_SETFD, FD_CLOEXEC));
            EQ(pthread_create(&threads[i], NULL, prepare_and_spawn, &s[i]), 0);
        }
        for (int i = 0; i < 2; i++)
            EQ(pthread_join(threads[i], NULL), 0);
        for (int i = 0; i < 2; i++) {
            for (int k = 0; k < 20; k++) {
                p_send(&s[i].d, "one of two");
                P_WANT(&s[i].d, "ONE OF TWO");
            }
            p_shutdown(&s[i].d, SHUT_WR);
            P_WANT_EOF(&s[i].d);
            WAIT_CHILD(s[i].pid);
        }
    }
}

CASE(shell_that_inherits_ends_nothing)
{
    /* bash ends by exit(), dash by _exit(). */
    struct duo d = duo_open(0);
    for (int i = 0; i < 3; i++) {
        EQ(system("exec bash -c 'exit 4'"), 4 << 8);
        PUT(d.fd, "after bash");
        P_WANT(&d, "after bash");
        p_send(&d, "reply");
        WANT(d.fd, "reply");
    }
    MUST(close(d.fd));
    P_WANT_EOF(&d);
}

CASE(last_words_of_a_program)
{
    for (int i = 0; i < 5; i++) {
        struct duo d = duo_open(0);
        char number[16];
        snprintf(number, sizeof number, "%d", d.fd);
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            execl(mate_path(), "mate", "words", number, NULL);
            fail(HERE, "expected another program, saw %s", strerror(errno));
        }
        MUST(close(d.fd));
        P_WANT(&d, "from main, from atexit, from a destructor");
        P_WANT_EOF(&d);
        WAIT_CHILD(pid);
    }
}
