/*
 * Descriptors: dup and its family, closing in bulk, numbers used again for something else.
 */
#include "sockconf.h"
#include <linux/close_range.h>

static int close_all_from(unsigned first, unsigned last, int flags)
{
    return close_range(first, last, flags);
}

CASE(dup_outlives_original)
{
    struct duo d = duo_open(0);
    int copy = (int)MUST(dup(d.fd));
    PUT(d.fd, "one ");
    PUT(copy, "two");
    P_WANT(&d, "one two");
    p_send(&d, "abcd");
    WANT(d.fd, "ab");
    MUST(close(d.fd));
    WANT(copy, "cd");
    p_start(&d, do_echo, 0);
    for (int i = 0; i < 300; i++) {
        PUT(copy, "ping");
        WANT(copy, "ping");
    }
    MUST(close(copy));
    EQ(p_finish(&d), 1200);
}

CASE(close_of_a_dup_is_no_eof)
{
    struct duo d = duo_open(0);
    int copy = (int)MUST(dup(d.fd));
    MUST(close(copy));
    PUT(d.fd, "alive");
    P_WANT(&d, "alive");
    MUST(close(d.fd));
    P_WANT_EOF(&d);
}

CASE(dup_cold_then_both_used)
{
    struct duo d = duo_open(COLD);
    int copy = (int)MUST(dup(d.fd));
    p_start(&d, do_echo, 0);
    for (int i = 0; i < 300; i++) {
        PUT(i % 2 ? copy : d.fd, "ping");
        WANT(i % 3 ? copy : d.fd, "ping");
    }
    MUST(close(d.fd));
    for (int i = 0; i < 100; i++) {
        PUT(copy, "ping");
        WANT(copy, "ping");
    }
    MUST(shutdown(copy, SHUT_WR));
    WANT_EOF(copy);
    p_finish(&d);
}

CASE(dup2_moves_a_connection)
{
    struct duo d = duo_open(0);
    int at = (int)MUST(open("/dev/null", O_RDWR));
    EQ(dup2(d.fd, at), at);
    MUST(close(d.fd));
    PUT(at, "moved");
    P_WANT(&d, "moved");
    p_send(&d, "back");
    WANT(at, "back");
    EQ(dup2(at, at), at);
    ERR(dup2(-1, at), EBADF);
    ERR(dup2(at, -1), EBADF);
    ERR(dup2(at, 1 << 30), EBADF);
    PUT(at, "still");
    P_WANT(&d, "still");
}

CASE(dup2_over_a_connection)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    p_send(&e, "for e");
    AWAIT_BYTES(e.fd, 5);
    EQ(dup2(d.fd, e.fd), e.fd); /* closes e's connection: with unread bytes, a reset */
    P_WANT_ERROR(&e, ECONNRESET);
    PUT(e.fd, "by number e");
    P_WANT(&d, "by number e");
    p_send(&d, "to d");
    WANT(e.fd, "to d");
    int file = (int)MUST(open("/dev/null", O_RDWR));
    EQ(dup2(file, d.fd), d.fd);
    EQ(write(d.fd, "gone", 4), 4);
    PUT(e.fd, "last");
    P_WANT(&d, "last");
    EQ(dup2(file, e.fd), e.fd);
    P_WANT_EOF(&d);
}

CASE(dup3_and_fcntl_dup)
{
    struct duo d = duo_open(0);
    EQ(dup3(d.fd, 200, O_CLOEXEC), 200);
    EQ(fcntl(200, F_GETFD), FD_CLOEXEC);
    ERR(dup3(d.fd, d.fd, 0), EINVAL);
    ERR(dup3(d.fd, 201, 0x40000000), EINVAL);
    int a = (int)MUST(fcntl(d.fd, F_DUPFD, 100)), b = (int)MUST(fcntl(d.fd, F_DUPFD_CLOEXEC, 100));
    EQ(a, 100);
    EQ(b, 101);
    EQ(fcntl(a, F_GETFD), 0);
    EQ(fcntl(b, F_GETFD), FD_CLOEXEC);
    MUST(close(d.fd));
    PUT(200, "x");
    PUT(a, "y");
    PUT(b, "z");
    P_WANT(&d, "xyz");
    p_send(&d, "123");
    WANT(b, "1");
    WANT(a, "2");
    WANT(200, "3");
    close(200);
    close(a);
    PUT(b, "end");
    close(b);
    P_WANT(&d, "end");
    P_WANT_EOF(&d);
}

CASE(dup_of_one_in_select)
{
    struct duo d = duo_open(0);
    EQ(dup2(d.fd, 1000), 1000);
    fd_set in;
    FD_ZERO(&in);
    FD_SET(1000, &in);
    p_start(&d, do_send_later, 30);
    EQ(select(1001, &in, NULL, NULL, NULL), 1);
    EQ(p_finish(&d), 0);
    WANT(1000, "late");
}

/* Takes every free number below `fd`, so that the next descriptor after its close() gets its number. */
static void plug_below(int fd)
{
    int got;
    while ((got = (int)MUST(open("/dev/null", O_RDONLY))) < fd)
        ;
    MUST(close(got));
}

CASE(number_used_again_for_a_file, .process = true)
{
    struct duo d = duo_open(0);
    int fd = d.fd;
    char path[] = "/tmp/sockconf-XXXXXX", got[16] = "";
    for (int i = 0; i < 20; i++) {
        plug_below(fd);
        MUST(close(fd));
        P_WANT_EOF(&d);
        p_close(&d);
        strcpy(path, "/tmp/sockconf-XXXXXX");
        EQ(mkstemp(path), fd);
        unlink(path);
        EQ(write(fd, "to the file", 11), 11);
        EQ(lseek(fd, 0, SEEK_SET), 0);
        EQ(read(fd, got, 16), 11);
        EQ(memcmp(got, "to the file", 11), 0);
        ERR(send(fd, "x", 1, 0), ENOTSOCK);
        ERR(recv(fd, got, 1, 0), ENOTSOCK);
        MUST(close(fd));
        d = duo_more(&d, i % 2 ? COLD : 0);
        fd = d.fd;
        PUT(fd, "to the peer");
        P_WANT(&d, "to the peer");
    }
}

CASE(number_used_again_for_a_connection)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 20; i++) {
        p_send(&d, "never read");
        MUST(close(d.fd));
        struct duo e = duo_more(&d, i % 2 ? COLD : 0);
        PUT(e.fd, "fresh");
        P_WANT(&e, "fresh");
        p_send(&e, "bytes");
        WANT(e.fd, "bytes");
        d = e;
    }
}

CASE(close_range_over_a_connection, .process = true)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    /* Keep the lower one and the order channel: move what closes to the top. */
    EQ(dup2(e.fd, 500), 500);
    MUST(close(e.fd));
    EQ(dup2(d.fd, 501), 501);
    EQ(close_all_from(500, 600, 0), 0);
    P_WANT_EOF(&e);
    ERR(send(500, "x", 1, 0), EBADF);
    ERR(send(501, "x", 1, 0), EBADF);
    PUT(d.fd, "the original lives");
    P_WANT(&d, "the original lives");
    ERR(close_all_from(10, 5, 0), EINVAL);
    EQ(close_all_from((unsigned)d.fd, (unsigned)d.fd, CLOSE_RANGE_CLOEXEC), 0);
    EQ(fcntl(d.fd, F_GETFD), FD_CLOEXEC);
    EQ(close_all_from((unsigned)d.fd, (unsigned)d.fd, 0), 0);
    P_WANT_EOF(&d);
}

CASE(close_range_unshared, .process = true)
{
    struct duo d = duo_open(0);
    EQ(dup2(d.fd, 500), 500);
    EQ(close_all_from(500, ~0u, CLOSE_RANGE_UNSHARE), 0);
    ERR(fcntl(500, F_GETFD), EBADF);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

CASE(closefrom_keeps_the_rest, .process = true)
{
    struct duo d = duo_open(0);
    EQ(dup2(d.fd, 500), 500);
    closefrom(400);
    ERR(fcntl(500, F_GETFD), EBADF);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
}

/* A fresh connection, made with nothing of the harness left: to a child of our own. */
static void prove_that_sockets_still_work(int rounds)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
        MUST(connect(fd, (struct sockaddr *)&at, len));
        for (int i = 0; i < rounds; i++) {
            WANT(fd, "question");
            PUT(fd, "answer");
        }
        WANT_EOF(fd);
        _exit(0);
    }
    int fd = (int)MUST(accept(listener, NULL, NULL));
    for (int i = 0; i < rounds; i++) {
        PUT(fd, "question");
        WANT(fd, "answer");
        if (i % 8 == 7)
            sleep_ms(1);
    }
    MUST(close(fd));
    MUST(close(listener));
    WAIT_CHILD(pid);
}

CASE(close_all_one_by_one, .process = true)
{
    struct duo d = duo_open(0), e = duo_more(&d, 0);
    (void)e;
    for (int fd = 3; fd < 1024; fd++)
        close(fd);
    ERR(send(d.fd, "x", 1, 0), EBADF);
    prove_that_sockets_still_work(100);
}

CASE(close_all_by_range, .process = true)
{
    struct duo d = duo_open(0);
    EQ(close_all_from(3, ~0u, 0), 0);
    ERR(send(d.fd, "x", 1, 0), EBADF);
    prove_that_sockets_still_work(100);
    EQ(close_all_from(3, ~0u, 0), 0);
    prove_that_sockets_still_work(100);
}

CASE(close_all_by_proc, .process = true)
{
    struct duo d = duo_open(0);
    char path[64];
    for (int fd = 1023; fd >= 3; fd--) { /* as shells and daemons do it: only what /proc/self/fd names */
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        if (access(path, F_OK) == 0)
            close(fd);
    }
    ERR(recv(d.fd, path, 1, 0), EBADF);
    prove_that_sockets_still_work(100);
}

CASE(low_descriptor_numbers_are_ours, .process = true)
{
    /* open() gives the lowest free number; nobody else may sit there. */
    struct duo d = duo_open(0);
    plug_below(d.fd);
    int first = (int)MUST(open("/dev/null", O_RDONLY));
    CHECK(first < 40, "expected the numbers after %d to be free, saw the next one at %d", d.fd, first);
    int last = first;
    for (int i = 1; i < 20; i++)
        last = (int)MUST(open("/dev/null", O_RDONLY));
    CHECK(last < first + 24, "expected 20 numbers in a row (but for a few inherited), saw %d to %d", first, last);
    for (int fd = first; fd <= last; fd++)
        close(fd);
    PUT(d.fd, "x");
    P_WANT(&d, "x");
    EQ(open("/dev/null", O_RDONLY), first);
}

static void exchange(const struct duo *d, int rounds)
{
    for (int i = 0; i < rounds; i++) {
        PUT(d->fd, "question");
        P_WANT(d, "question");
        p_send(d, "answer");
        WANT(d->fd, "answer");
        if (i % 8 == 7)
            sleep_ms(1);
    }
}

CASE(standard_descriptors_closed, .process = true)
{
    /* A socket that becomes 0, 1 and 2. */
    struct duo first = duo_open(0);
    close(0);
    close(1);
    close(2);
    struct duo d = duo_more(&first, COLD); /* lies at 0 or 1 */
    CHECK(d.fd < 3, "expected a standard number, saw %d", d.fd);
    for (int fd = 0; fd < 3; fd++)
        EQ(dup2(d.fd, fd), fd);
    exchange(&d, 50); /* on rings or not: stdio must agree with the calls */
    printf("by stdio\n");
    fflush(stdout);
    fprintf(stderr, "and stderr\n");
    P_WANT(&d, "by stdio\nand stderr\n");
    p_send(&d, "input\n");
    char line[32];
    CHECK(fgets(line, sizeof line, stdin) && !strcmp(line, "input\n"), "expected \"input\", saw \"%s\"", line);
}

CASE(few_descriptors_allowed, .process = true)
{
    struct duo d = duo_open(COLD);
    int top = 1023;
    while (fcntl(top, F_GETFD) < 0)
        top--;
    struct rlimit few = {(rlim_t)top + 3, (rlim_t)top + 3};
    MUST(setrlimit(RLIMIT_NOFILE, &few));
    exchange(&d, 50); /* kernel or rings: it works */
    static int fds[2048];
    int count = 0;
    while (count < 2048 && (fds[count] = dup(0)) >= 0)
        count++;
    CHECK(errno == EMFILE, "expected EMFILE, saw %s", strerror(errno));
    CHECK(count >= 2, "expected room for two more descriptors, saw %d", count);
    ERR(socket(AF_INET, SOCK_STREAM, 0), EMFILE);
    ERR(dup(d.fd), EMFILE);
    exchange(&d, 200);
    while (count)
        MUST(close(fds[--count]));
}

CASE(passed_through_a_unix_socket)
{
    for (int way = 0; way < 4; way++) {
        int cold = way & 1;
        int first = way & 2; /* the receiver has closed what it inherited by then, so that the sender closes last */
        struct duo d = duo_open(cold ? COLD : 0);
        int ends[2];
        MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends));
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            MUST(close(d.fd)); /* what it uses comes by message */
            EQ(send(ends[1], "", 1, 0), 1);
            char byte, control[CMSG_SPACE(sizeof(int))];
            struct iovec in = {&byte, 1};
            struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
            EQ(recvmsg(ends[1], &msg, 0), 1);
            int fd;
            memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof fd);
            WANT(fd, "early late");
            for (int i = 0; i < 100; i++) {
                PUT(fd, "hi");
                P_WANT(&d, "hi");
            }
            _exit(0);
        }
        p_send(&d, "early ");
        char ready;
        if (first)
            EQ(recv(ends[0], &ready, 1, 0), 1);
        char control[CMSG_SPACE(sizeof(int))] = "";
        struct iovec out = {"!", 1};
        struct msghdr msg = {.msg_iov = &out, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
        *head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(head), &d.fd, sizeof(int));
        EQ(sendmsg(ends[0], &msg, 0), 1);
        MUST(close(d.fd));
        p_send(&d, "late");
        WAIT_CHILD(pid);
        P_WANT_EOF(&d);
    }
}

CASE(passed_to_a_process_without_history)
{
    /* The receiver was there before the connection, so it inherited nothing of it. */
    int ends[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        char byte, control[CMSG_SPACE(sizeof(int))];
        struct iovec in = {&byte, 1};
        struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        EQ(recvmsg(ends[1], &msg, MSG_CMSG_CLOEXEC), 1);
        int fd;
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof fd);
        char block[256];
        ssize_t n;
        while ((n = read(fd, block, sizeof block)) > 0)
            EQ(write(fd, block, (size_t)n), n);
        EQ(n, 0);
        _exit(0);
    }
    struct duo d = duo_open(0);
    char control[CMSG_SPACE(sizeof(int))] = "";
    struct iovec out = {"!", 1};
    struct msghdr msg = {.msg_iov = &out, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
    *head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(head), &d.fd, sizeof(int));
    EQ(sendmsg(ends[0], &msg, 0), 1);
    MUST(close(d.fd));
    for (int i = 0; i < 100; i++) {
        p_send(&d, "there and back");
        P_WANT(&d, "there and back");
    }
    p_shutdown(&d, SHUT_WR);
    WAIT_CHILD(pid);
    P_WANT_EOF(&d);
}

CASE(bulk_closing_without_the_kernels_call)
{
    /* Every descriptor from a number on, whatever the kernel has for it (see `deny`). */
    struct duo d = duo_open(0);
    pid_t pid = (pid_t)MUST(fork());
    if (pid == 0) {
        int open_at[100];
        for (int i = 0; i < 100; i++)
            open_at[i] = (int)MUST(fcntl(i % 2 ? d.fd : 1, F_DUPFD, 400));
        closefrom(open_at[1]);
        for (int i = 0; i < 100; i++)
            EQ(fcntl(open_at[i], F_GETFD) == 0, i < 1);
        PUT(d.fd, "from below");
        _exit(0);
    }
    WAIT_CHILD(pid);
    P_WANT(&d, "from below");
    PUT(d.fd, "still here");
    P_WANT(&d, "still here");
    int result = close_all_from((unsigned)d.fd, (unsigned)d.fd, 0);
    if (result == 0)
        P_WANT_EOF(&d);
    else { /* it closed nothing */
        PUT(d.fd, "not closed");
        P_WANT(&d, "not closed");
    }
}
