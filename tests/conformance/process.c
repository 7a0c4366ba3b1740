/*
 * Other processes: fork with both using the stream, exec, spawn, death of one of several holders.
 */
#include "sockconf.h"
#include <spawn.h>

extern char **environ;

CASE(fork_child_uses_it)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        for (int i = 0; i < 200; i++) {
            PUT(d.fd, "child");
            WANT(d.fd, "reply");
        }
        _exit(0);
    }
    MUST(close(d.fd));
    for (int i = 0; i < 200; i++) {
        P_WANT(&d, "child");
        p_send(&d, "reply");
    }
    WAIT_CHILD(pid);
    P_WANT_EOF(&d);
}

CASE(fork_before_first_use, .process = true)
{
    struct duo d = duo_open(COLD); /* the forking server: accept, fork, the parent closes */
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        duo_warm(&d);
        for (int i = 0; i < 200; i++) {
            PUT(d.fd, "child");
            P_WANT(&d, "child");
        }
        SEND_PATTERN(d.fd, 1000);
        _exit(0);
    }
    MUST(close(d.fd));
    WAIT_CHILD(pid);
    EQ(p_do(&d, do_recv_pattern, 1000), 0);
    P_WANT_EOF(&d);
}

CASE(fork_interleaved)
{
    for (int cold = 0; cold < 2; cold++) {
        struct duo d = duo_open(cold ? COLD : 0);
        int turn[2], back[2];
        char byte;
        MUST(pipe(turn));
        MUST(pipe(back));
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            for (int i = 0; i < 50; i++) {
                EQ(read(turn[0], &byte, 1), 1);
                PUT(d.fd, "from child");
                WANT(d.fd, "to child");
                EQ(write(back[1], "t", 1), 1);
            }
            EQ(read(turn[0], &byte, 1), 1); /* the parent has closed its copy */
            for (int i = 0; i < 50; i++) {
                PUT(d.fd, "alone");
                WANT(d.fd, "reply");
            }
            _exit(0);
        }
        for (int i = 0; i < 50; i++) {
            PUT(d.fd, "from parent");
            P_WANT(&d, "from parent");
            p_send(&d, "to parent");
            WANT(d.fd, "to parent");
            EQ(write(turn[1], "t", 1), 1);
            P_WANT(&d, "from child");
            p_send(&d, "to child");
            EQ(read(back[0], &byte, 1), 1);
        }
        MUST(close(d.fd));
        EQ(write(turn[1], "t", 1), 1);
        for (int i = 0; i < 50; i++) {
            P_WANT(&d, "alone");
            p_send(&d, "reply");
        }
        WAIT_CHILD(pid);
        P_WANT_EOF(&d);
    }
}

CASE(fork_eof_at_the_last_close)
{
    struct duo d = duo_open(0);
    int hold[2];
    MUST(pipe(hold));
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        char byte;
        close(hold[1]);
        EQ(read(hold[0], &byte, 1), 0);
        PUT(d.fd, "last words");
        _exit(0);
    }
    MUST(close(hold[0]));
    PUT(d.fd, "parent's ");
    MUST(close(d.fd));
    p_start(&d, do_send_later, 0);
    EQ(p_finish(&d), 0);
    sleep_ms(50);
    MUST(close(hold[1]));
    P_WANT(&d, "parent's last words");
    WAIT_CHILD(pid);
    /* The child ended with "late" unread: a reset, not an EOF. */
    P_WANT_ERROR(&d, ECONNRESET);
}

CASE(fork_child_ends_after_it_was_woken)
{
    /* It has sent nothing since the stream was promoted, and leaves nothing unread: no reset. */
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        for (int i = 0; i < 60; i++)
            WANT(d.fd, "x");
        _exit(0);
    }
    MUST(close(d.fd));
    for (int i = 0; i < 60; i++) {
        sleep_ms(2);
        p_send(&d, "x");
    }
    WAIT_CHILD(pid);
    P_WANT_EOF(&d);
}

CASE(fork_child_exits_parent_goes_on)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 20; i++) {
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            if (i % 2)
                PUT(d.fd, "child");
            _exit(0);
        }
        WAIT_CHILD(pid);
        if (i % 2)
            P_WANT(&d, "child");
        PUT(d.fd, "parent");
        P_WANT(&d, "parent");
        p_send(&d, "answer");
        WANT(d.fd, "answer");
    }
}

CASE(fork_child_killed_parent_goes_on)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 10; i++) {
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            char got[4];
            recv(d.fd, got, sizeof got, 0) < 0 ? _exit(1) : _exit(0); /* blocks, and is killed there */
        }
        sleep_ms(20);
        MUST(kill(pid, SIGKILL));
        MUST(waitpid(pid, NULL, 0));
        p_send(&d, "on");
        WANT(d.fd, "on");
        PUT(d.fd, "we go");
        P_WANT(&d, "we go");
    }
}

CASE(fork_one_reads_one_writes)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        SEND_PATTERN(d.fd, 32 << 20);
        _exit(0);
    }
    p_start(&d, do_echo, 0);
    RECV_PATTERN(d.fd, 32 << 20);
    WAIT_CHILD(pid);
    MUST(shutdown(d.fd, SHUT_WR));
    WANT_EOF(d.fd);
    EQ(p_finish(&d), 32 << 20);
}

CASE(fork_shares_blocked_receive)
{
    /* Each byte goes to exactly one of two processes that wait for it. */
    struct duo d = duo_open(0);
    int sums[2];
    MUST(pipe(sums));
    pid_t pids[2];
    for (int i = 0; i < 2; i++) {
        pids[i] = (pid_t)MUST(fork());
        if (pids[i] == 0) {
            long sum = 0;
            unsigned char byte;
            while (recv(d.fd, &byte, 1, 0) == 1)
                sum += byte + 1000000L;
            EQ(write(sums[1], &sum, sizeof sum), sizeof sum);
            _exit(0);
        }
    }
    long right = 0, sum = 0, part;
    for (int i = 0; i < 1000; i++) {
        char byte[2] = {(char)(1 + i % 100), 0};
        right += byte[0] + 1000000L;
        p_send(&d, byte);
    }
    p_shutdown(&d, SHUT_WR);
    for (int i = 0; i < 2; i++) {
        EQ(read(sums[0], &part, sizeof part), sizeof part);
        sum += part;
        WAIT_CHILD(pids[i]);
    }
    EQ(sum, right);
}

CASE(prefork_accept, .process = true)
{
    /* Several processes wait in accept() on one listener. */
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    pid_t pids[3];
    for (int i = 0; i < 3; i++) {
        pids[i] = (pid_t)MUST(fork());
        if (pids[i] == 0) {
            for (;;) {
                int fd = (int)MUST(accept(listener, NULL, NULL));
                char got[8];
                ssize_t n;
                bool quit = false;
                while ((n = recv(fd, got, 4, MSG_WAITALL)) == 4) {
                    quit = !memcmp(got, "quit", 4);
                    put(HERE, fd, got, 4);
                }
                EQ(n, 0);
                close(fd);
                if (quit)
                    _exit(0);
            }
        }
    }
    for (int i = 0; i < 33; i++) {
        int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
        MUST(connect(fd, (struct sockaddr *)&at, len));
        for (int k = 0; k < 20; k++) {
            PUT(fd, i < 30 ? "ping" : "quit");
            WANT(fd, i < 30 ? "ping" : "quit");
            if (k % 5 == 0)
                sleep_ms(1);
        }
        close(fd);
    }
    for (int i = 0; i < 3; i++)
        WAIT_CHILD(pids[i]);
}

/* ---- exec ---- */

enum how { EXECVE, EXECLE_EMPTY, EXECVP, VFORK, SPAWN, SPAWN_EMPTY, EXECL, EXECLP, EXECV, EXECVPE, FEXECVE, SPAWNP };

/* Starts the copy program with the connection as its standard input and output. */
static pid_t start_copy(const struct duo *d, const char *name, enum how how)
{
    static char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", settings.folder, name);
    char *argv[] = {path, NULL}, *none[] = {NULL};
    pid_t pid;
    if (how == SPAWN || how == SPAWN_EMPTY || how == SPAWNP) {
        posix_spawn_file_actions_t actions;
        EQ(posix_spawn_file_actions_init(&actions), 0);
        EQ(posix_spawn_file_actions_adddup2(&actions, d->fd, 0), 0);
        EQ(posix_spawn_file_actions_adddup2(&actions, d->fd, 1), 0);
        EQ(posix_spawn_file_actions_addclose(&actions, d->fd), 0);
        if (how == SPAWNP)
            EQ(posix_spawnp(&pid, path, &actions, NULL, argv, environ), 0);
        else
            EQ(posix_spawn(&pid, path, &actions, NULL, argv, how == SPAWN ? environ : none), 0);
        posix_spawn_file_actions_destroy(&actions);
        return pid;
    }
    pid = (pid_t)MUST(how == VFORK ? vfork() : fork());
    if (pid == 0) {
        dup2(d->fd, 0);
        dup2(d->fd, 1);
        close(d->fd);
        if (how == EXECLE_EMPTY)
            execle(path, path, (char *)NULL, none);
        else if (how == EXECVP)
            execvp(path, argv);
        else if (how == EXECL)
            execl(path, path, (char *)NULL);
        else if (how == EXECLP)
            execlp(path, path, (char *)NULL);
        else if (how == EXECV)
            execv(path, argv);
        else if (how == EXECVPE)
            execvpe(path, argv, environ);
        else if (how == FEXECVE)
            fexecve(open(path, O_RDONLY | O_CLOEXEC), argv, environ);
        else
            execve(path, argv, environ);
        _exit(127);
    }
    return pid;
}

static void talk_to_copy(int open_flags, const char *name, enum how how, bool unread)
{
    struct duo d = duo_open(open_flags);
    if (unread) { /* bytes that came before the exec and were not read, some looked at, belong to the new program */
        char got[4];
        p_send(&d, "xy before exec ");
        AWAIT_BYTES(d.fd, 15);
        EQ(recv(d.fd, got, 2, 0), 2);
    }
    pid_t pid = start_copy(&d, name, how);
    MUST(close(d.fd));
    if (unread)
        P_WANT(&d, " BEFORE EXEC ");
    for (int i = 0; i < 30; i++) {
        p_send(&d, "spoken aloud");
        P_WANT(&d, "SPOKEN ALOUD");
    }
    p_shutdown(&d, SHUT_WR);
    P_WANT_EOF(&d);
    WAIT_CHILD(pid);
}

CASE(exec_dynamic) { talk_to_copy(0, "copy-dynamic", EXECVE, false); }
CASE(exec_dynamic_cold) { talk_to_copy(COLD, "copy-dynamic", EXECVE, false); }
CASE(exec_dynamic_unread) { talk_to_copy(0, "copy-dynamic", EXECVE, true); }
CASE(exec_dynamic_empty_environment) { talk_to_copy(0, "copy-dynamic", EXECLE_EMPTY, false); }
CASE(exec_dynamic_empty_environment_unread) { talk_to_copy(0, "copy-dynamic", EXECLE_EMPTY, true); }
CASE(exec_static) { talk_to_copy(0, "copy-static", EXECVE, false); }
CASE(exec_static_cold) { talk_to_copy(COLD, "copy-static", EXECVE, false); }
CASE(exec_static_unread) { talk_to_copy(0, "copy-static", EXECVE, true); }
CASE(exec_by_path) { talk_to_copy(0, "copy-dynamic", EXECVP, false); }
CASE(vfork_exec) { talk_to_copy(0, "copy-dynamic", VFORK, false); }
CASE(vfork_exec_static) { talk_to_copy(0, "copy-static", VFORK, true); }
CASE(exec_family)
{
    static const enum how all[] = {EXECL, EXECLP, EXECV, EXECVPE, FEXECVE, SPAWNP};
    for (int i = 0; i < 6; i++)
        talk_to_copy(0, "copy-dynamic", all[i], false);
}
CASE(spawn) { talk_to_copy(0, "copy-dynamic", SPAWN, false); }
CASE(spawn_unread) { talk_to_copy(0, "copy-dynamic", SPAWN, true); }
CASE(spawn_empty_environment) { talk_to_copy(0, "copy-dynamic", SPAWN_EMPTY, true); }
CASE(spawn_static) { talk_to_copy(0, "copy-static", SPAWN, true); }

/* The process that made the connection becomes another program itself, with no fork in between. */
static void become_copy(const char *name, bool empty, bool unread)
{
    struct duo prepared = duo_prepare();
    int gone[2];
    char byte;
    MUST(pipe2(gone, O_CLOEXEC));
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        char path[PATH_MAX + 32], *argv[] = {path, NULL}, *none[] = {NULL};
        struct duo d = duo_more(&prepared, 0);
        if (unread) {
            p_send(&d, "before exec ");
            AWAIT_BYTES(d.fd, 12);
        }
        MUST(dup2(d.fd, 0));
        MUST(dup2(d.fd, 1));
        MUST(close(d.fd));
        snprintf(path, sizeof path, "%s/%s", settings.folder, name);
        execve(path, argv, empty ? none : environ);
        fail(HERE, "expected another program, saw %s", strerror(errno));
    }
    MUST(close(gone[1]));
    EQ(read(gone[0], &byte, 1), 0); /* the exec has happened, and the orders are ours to give */
    if (unread)
        P_WANT(&prepared, "BEFORE EXEC ");
    for (int i = 0; i < 30; i++) {
        p_send(&prepared, "spoken aloud");
        P_WANT(&prepared, "SPOKEN ALOUD");
    }
    p_shutdown(&prepared, SHUT_WR);
    P_WANT_EOF(&prepared);
    WAIT_CHILD(pid);
}

CASE(become_dynamic) { become_copy("copy-dynamic", false, false); }
CASE(become_dynamic_unread) { become_copy("copy-dynamic", false, true); }
CASE(become_dynamic_empty_environment) { become_copy("copy-dynamic", true, true); }
CASE(become_static) { become_copy("copy-static", false, false); }
CASE(become_static_unread) { become_copy("copy-static", false, true); }

CASE(exec_closes_marked_descriptors)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    MUST(fcntl(e.fd, F_SETFD, FD_CLOEXEC));
    pid_t pid = start_copy(&d, "copy-dynamic", EXECVE); /* which inherits e.fd until the exec */
    MUST(close(d.fd));
    MUST(close(e.fd));
    P_WANT_EOF(&e);
    p_send(&d, "x");
    P_WANT(&d, "X");
    p_shutdown(&d, SHUT_WR);
    WAIT_CHILD(pid);
}

CASE(failed_exec_changes_nothing)
{
    struct duo d = duo_open(0);
    char *argv[] = {"nothing", NULL};
    p_send(&d, "early");
    AWAIT_BYTES(d.fd, 5);
    ERR(execve("/nonexistent/program", argv, environ), ENOENT);
    ERR(execv("/dev/null", argv), EACCES);
    WANT(d.fd, "early");
    for (int i = 0; i < 100; i++) {
        PUT(d.fd, "alive");
        P_WANT(&d, "alive");
        p_send(&d, "both");
        WANT(d.fd, "both");
    }
    pid_t pid = vfork();
    if (pid == 0) {
        execve("/nonexistent/program", argv, environ);
        _exit(errno == ENOENT ? 5 : 6);
    }
    wait_child(HERE, pid, 5);
    PUT(d.fd, "alive");
    P_WANT(&d, "alive");
}

CASE(system_and_popen)
{
    struct duo d = duo_open(0);
    char line[32];
    for (int i = 0; i < 3; i++) {
        EQ(system("exit 3"), 3 << 8);
        PUT(d.fd, "after system");
        P_WANT(&d, "after system");
        FILE *pipe = popen("echo from a shell", "r");
        CHECK(pipe && fgets(line, sizeof line, pipe), "expected a line from popen(), saw none");
        EQ(pclose(pipe), 0);
        p_send(&d, "after popen");
        WANT(d.fd, "after popen");
    }
    char command[64];
    snprintf(command, sizeof command, "echo through fd >&%d", d.fd);
    EQ(system(command), 0); /* a shell writes to the connection that it inherited */
    P_WANT(&d, "through fd\n");
    PUT(d.fd, "end");
    P_WANT(&d, "end");
}

CASE(fork_while_others_run)
{
    /* Forks from one thread while another is in the middle of transfers. */
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    p_start(&d, do_send_pattern, 48 << 20);
    pthread_t thread;
    struct receiver {
        int fd;
    } r = {d.fd};
    void *receive(void *arg);
    EQ(pthread_create(&thread, NULL, receive, &r), 0);
    for (int i = 0; i < 40; i++) {
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            PUT(e.fd, "c");
            _exit(0);
        }
        WAIT_CHILD(pid);
    }
    pthread_join(thread, NULL);
    EQ(p_finish(&d), 0);
    for (int i = 0; i < 40; i++)
        P_WANT(&e, "c");
}

void *receive(void *arg);
void *receive(void *arg)
{
    RECV_PATTERN(*(int *)arg, 48 << 20);
    return NULL;
}

CASE(daemonize, .process = true)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        MUST(setsid());
        if (MUST(fork()) > 0)
            _exit(0);
        MUST(chdir("/"));
        int null = (int)MUST(open("/dev/null", O_RDWR));
        for (int fd = 0; fd < 3; fd++)
            MUST(dup2(null, fd));
        for (int i = 0; i < 100; i++) {
            WANT(d.fd, "to the daemon");
            PUT(d.fd, "from the daemon");
        }
        SEND_PATTERN(d.fd, 5 << 20);
        _exit(0);
    }
    WAIT_CHILD(pid);
    MUST(close(d.fd));
    for (int i = 0; i < 100; i++) {
        p_send(&d, "to the daemon");
        P_WANT(&d, "from the daemon");
    }
    EQ(p_do(&d, do_recv_pattern, 5 << 20), 0);
    P_WANT_EOF(&d);
}

CASE(daemon_function, .process = true)
{
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        MUST(daemon(0, 0));
        PUT(d.fd, "daemonized");
        WANT(d.fd, "bye");
        _exit(0);
    }
    WAIT_CHILD(pid);
    MUST(close(d.fd));
    P_WANT(&d, "daemonized");
    p_send(&d, "bye");
    P_WANT_EOF(&d);
}

/* ---- Rights given up ---- */

CASE(setuid_nobody, .root = true, .process = true)
{
    struct duo d = duo_open(0), cold = duo_more(&d, COLD);
    MUST(setgid(65534));
    MUST(setuid(65534));
    for (int i = 0; i < 100; i++) {
        PUT(d.fd, "as nobody");
        P_WANT(&d, "as nobody");
        PUT(cold.fd, "cold");
        P_WANT(&cold, "cold");
        p_send(&cold, "answer");
        WANT(cold.fd, "answer");
    }
    struct duo e = duo_more(&d, COLD);
    for (int i = 0; i < 100; i++) {
        PUT(e.fd, "new");
        P_WANT(&e, "new");
    }
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        PUT(d.fd, "child");
        _exit(0);
    }
    WAIT_CHILD(pid);
    P_WANT(&d, "child");
}

CASE(chroot_and_setuid, .root = true, .process = true)
{
    struct duo d = duo_open(0);
    MUST(chroot(settings.folder));
    MUST(chdir("/"));
    struct duo e = duo_more(&d, COLD);
    MUST(setuid(65534));
    struct duo f = duo_more(&d, COLD);
    for (int i = 0; i < 100; i++) {
        PUT(d.fd, "d");
        P_WANT(&d, "d");
        PUT(e.fd, "e");
        P_WANT(&e, "e");
        PUT(f.fd, "f");
        P_WANT(&f, "f");
        p_send(&f, "answer");
        WANT(f.fd, "answer");
    }
}

CASE(no_new_memory, .process = true)
{
    /* RLIMIT_MEMLOCK and RLIMIT_AS at what is in use: whatever carries the bytes, they arrive. */
    struct duo d = duo_open(COLD);
    struct rlimit none = {0, 0};
    MUST(setrlimit(RLIMIT_MEMLOCK, &none));
    MUST(setrlimit(RLIMIT_FSIZE, &none));
    signal(SIGXFSZ, SIG_DFL);
    for (int i = 0; i < 200; i++) {
        PUT(d.fd, "x");
        P_WANT(&d, "x");
        if (i % 20 == 0)
            sleep_ms(2);
    }
    p_start(&d, do_recv_pattern, 4 << 20);
    SEND_PATTERN(d.fd, 4 << 20);
    EQ(p_finish(&d), 0);
}

/* The kilobytes that a line of /proc/self/status tells. */
static long status_kb(const char *name)
{
    char line[256];
    long kb = -1;
    FILE *file = fopen("/proc/self/status", "re");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name)))
            kb = strtol(line + strlen(name) + 1, NULL, 10);
    if (file)
        fclose(file);
    return kb;
}

CASE(memory_that_is_locked, .process = true, .root = true)
{
    enum { MANY = 20, MOST_KB = 1024 };
    struct duo d[MANY];
    for (int future = 0; future < 2; future++) {
        d[0] = duo_open(0);
        if (future) { /* what is mapped from now on */
            MUST(mlockall(MCL_CURRENT | MCL_FUTURE));
        }
        long before = status_kb("VmRSS"), locked = status_kb("VmLck");
        for (int i = 1; i < MANY; i++)
            d[i] = duo_more(&d[0], 0);
        if (!future) /* what is mapped already */
            MUST(mlockall(MCL_CURRENT));
        CHECK(status_kb("VmRSS") - before < MANY * MOST_KB + (future ? 0 : 16384),
              "expected %d connections to take less, saw %ld kB", MANY, status_kb("VmRSS") - before);
        CHECK(status_kb("VmLck") - locked < MANY * MOST_KB + (future ? 0 : 65536),
              "expected %d connections to lock less, saw %ld kB", MANY, status_kb("VmLck") - locked);
        for (int i = 0; i < MANY; i++) {
            PUT(d[i].fd, "in memory");
            P_WANT(&d[i], "in memory");
            MUST(close(d[i].fd));
        }
        MUST(munlockall());
    }
}
