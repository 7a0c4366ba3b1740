/*
 * The calls that move bytes, one by one: what they return, what they leave in the caller's memory.
 */
#include "sockconf.h"
#include <sys/uio.h>

CASE(send_recv)
{
    struct duo d = duo_open(0);
    char got[16];
    EQ(send(d.fd, "hello", 5, 0), 5);
    P_WANT(&d, "hello");
    p_send(&d, "world!");
    AWAIT_BYTES(d.fd, 6);
    EQ(recv(d.fd, got, 3, 0), 3);
    EQ(memcmp(got, "wor", 3), 0);
    EQ(recv(d.fd, got, sizeof got, 0), 3);
    EQ(memcmp(got, "ld!", 3), 0);
    ERR(recv(d.fd, got, sizeof got, MSG_DONTWAIT), EAGAIN);
}

CASE(write_read)
{
    struct duo d = duo_open(0);
    char got[16];
    EQ(write(d.fd, "hello", 5), 5);
    P_WANT(&d, "hello");
    p_send(&d, "world");
    EQ(read(d.fd, got, 2), 2);
    EQ(read(d.fd, got + 2, 3), 3);
    EQ(memcmp(got, "world", 5), 0);
    p_close(&d);
    EQ(read(d.fd, got, sizeof got), 0);
    EQ(read(d.fd, got, sizeof got), 0);
}

CASE(blocking_recv_waits)
{
    struct duo d = duo_open(0);
    char got[16];
    int64_t start = now_ms();
    p_start(&d, do_send_later, 60);
    EQ(recv(d.fd, got, sizeof got, 0), 4);
    CHECK(now_ms() - start >= 55, "expected recv() to wait 60 ms, saw %lld", (long long)(now_ms() - start));
    EQ(memcmp(got, "late", 4), 0);
    p_finish(&d);
}

CASE(ping_pong_one_byte)
{
    struct duo d = duo_open(0);
    p_start(&d, do_echo, 0);
    for (int i = 0; i < 5000; i++) {
        unsigned char out = (unsigned char)i, in = 0;
        EQ(send(d.fd, &out, 1, 0), 1);
        EQ(recv(d.fd, &in, 1, 0), 1);
        EQ(in, out);
    }
    MUST(shutdown(d.fd, SHUT_WR));
    WANT_EOF(d.fd);
    p_finish(&d);
}

CASE(writev_readv)
{
    struct duo d = duo_open(0);
    char a[4] = "", b[8] = "";
    struct iovec out[] = {{"one", 3}, {"", 0}, {NULL, 0}, {"two", 3}, {"three", 5}};
    EQ(writev(d.fd, out, 5), 11);
    P_WANT(&d, "onetwothree");
    p_send(&d, "abcdefghij");
    AWAIT_BYTES(d.fd, 10);
    struct iovec in[] = {{a, 3}, {NULL, 0}, {b, 8}};
    EQ(readv(d.fd, in, 3), 10);
    EQ(memcmp(a, "abc", 4), 0);
    EQ(memcmp(b, "defghij", 8), 0);
    EQ(writev(d.fd, out, 0), 0);
    EQ(writev(d.fd, out + 1, 2), 0);
    EQ(readv(d.fd, in, 0), 0);
}

CASE(iov_limits)
{
    struct duo d = duo_open(0);
    static struct iovec many[IOV_MAX + 1];
    static char bytes[IOV_MAX + 1];
    pattern(3, 0, bytes, sizeof bytes);
    for (int i = 0; i <= IOV_MAX; i++)
        many[i] = (struct iovec){bytes + i, 1};
    ERR(writev(d.fd, many, IOV_MAX + 1), EINVAL);
    ERR(readv(d.fd, many, IOV_MAX + 1), EINVAL);
    volatile int negative_count = -1;
    ERR(writev(d.fd, many, negative_count), EINVAL);
    struct msghdr msg = {.msg_iov = many, .msg_iovlen = IOV_MAX + 1};
    ERR(sendmsg(d.fd, &msg, 0), EMSGSIZE);
    ERR(recvmsg(d.fd, &msg, 0), EMSGSIZE);
    p_start(&d, do_echo, 0);
    EQ(writev(d.fd, many, IOV_MAX), IOV_MAX);
    AWAIT_BYTES(d.fd, IOV_MAX);
    memset(bytes, 0, sizeof bytes);
    EQ(readv(d.fd, many, IOV_MAX), IOV_MAX);
    EQ(pattern_differs(3, 0, bytes, IOV_MAX), -1);
    struct iovec negative[] = {{bytes, 1}, {bytes, (size_t)-1}};
    ERR(writev(d.fd, negative, 2), EINVAL);
    ERR(readv(d.fd, negative, 2), EINVAL);
}

CASE(preadv2_pwritev2)
{
    struct duo d = duo_open(0);
    char got[8];
    struct iovec out = {"vector", 6}, in = {got, sizeof got};
    EQ(pwritev2(d.fd, &out, 1, -1, 0), 6);
    P_WANT(&d, "vector");
    p_send(&d, "back");
    EQ(preadv2(d.fd, &in, 1, -1, 0), 4);
    EQ(memcmp(got, "back", 4), 0);
    ERR(preadv2(d.fd, &in, 1, -1, RWF_NOWAIT), EAGAIN);
    ERR(preadv2(d.fd, &in, 1, 0, 0), ESPIPE);
    ERR(pwritev2(d.fd, &out, 1, 0, 0), ESPIPE);
    ERR(preadv(d.fd, &in, 1, 0), ESPIPE);
    ERR(pwritev(d.fd, &out, 1, 0), ESPIPE);
    ERR2(preadv2(d.fd, &in, 1, -1, 0x40000000), EOPNOTSUPP, EINVAL);
}

CASE(pread_pwrite_lseek)
{
    struct duo d = duo_open(0);
    char got[8];
    ERR(pread(d.fd, got, sizeof got, 0), ESPIPE);
    ERR(pwrite(d.fd, "x", 1, 0), ESPIPE);
    ERR(lseek(d.fd, 0, SEEK_CUR), ESPIPE);
    EQ(send(d.fd, "still", 5, 0), 5);
    P_WANT(&d, "still");
}

CASE(sendto_recvfrom)
{
    struct duo d = duo_open(0);
    char got[8];
    struct sockaddr_storage from;
    memset(&from, 0xab, sizeof from);
    socklen_t len = sizeof from;
    EQ(sendto(d.fd, "plain", 5, 0, NULL, 0), 5);
    P_WANT(&d, "plain");
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(9)};
    EQ(sendto(d.fd, "named", 5, 0, (struct sockaddr *)&any, sizeof any), 5); /* a stream ignores the name */
    P_WANT(&d, "named");
    p_send(&d, "abcd");
    EQ(recvfrom(d.fd, got, sizeof got, 0, (struct sockaddr *)&from, &len), 4);
    EQ(len, 0);
    EQ(((unsigned char *)&from)[0], 0xab);
    p_send(&d, "efgh");
    EQ(recvfrom(d.fd, got, sizeof got, 0, NULL, NULL), 4);
    EQ(memcmp(got, "efgh", 4), 0);
}

CASE(sendmsg_recvmsg)
{
    struct duo d = duo_open(0);
    char a[4], b[16], control[128];
    struct sockaddr_storage name;
    struct iovec out[] = {{"head", 4}, {"body", 4}};
    struct msghdr msg = {.msg_iov = out, .msg_iovlen = 2};
    EQ(sendmsg(d.fd, &msg, 0), 8);
    P_WANT(&d, "headbody");
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    struct iovec in[] = {{a, 4}, {b, 16}};
    msg = (struct msghdr){.msg_name = &name, .msg_namelen = sizeof name, .msg_iov = in, .msg_iovlen = 2,
                          .msg_control = control, .msg_controllen = sizeof control, .msg_flags = ~0};
    EQ(recvmsg(d.fd, &msg, 0), 10);
    EQ(memcmp(a, "0123", 4), 0);
    EQ(memcmp(b, "456789", 6), 0);
    EQ(msg.msg_namelen, 0);
    EQ(msg.msg_controllen, 0);
    EQ(msg.msg_flags, 0);
    p_send(&d, "z");
    EQ(recvmsg(d.fd, &msg, MSG_CMSG_CLOEXEC), 1);
    EQ(msg.msg_flags, MSG_CMSG_CLOEXEC);
    msg.msg_iovlen = 0;
    EQ(sendmsg(d.fd, &msg, 0), 0);
}

CASE(sendmsg_control)
{
    struct duo d = duo_open(0);
    char control[CMSG_SPACE(sizeof(int))] = "";
    struct iovec out = {"body", 4};
    struct msghdr msg = {.msg_iov = &out, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
    *head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(head), &d.fd, sizeof(int));
    EQ(sendmsg(d.fd, &msg, 0), 4); /* TCP passes no descriptors: sent as if they were not there */
    P_WANT(&d, "body");
    head->cmsg_type = 0x7777;
    ERR(sendmsg(d.fd, &msg, 0), EINVAL);
    head->cmsg_len = 1;
    ERR(sendmsg(d.fd, &msg, 0), EINVAL);
    EQ(send(d.fd, "more", 4, 0), 4);
    P_WANT(&d, "more");
}

CASE(sendmmsg_recvmmsg)
{
    struct duo d = duo_open(0);
    char buf[4][4] = {"", "", "", ""};
    struct iovec out[] = {{"aa", 2}, {"bbb", 3}, {"c", 1}}, in[4];
    struct mmsghdr msgs[4] = {0};
    for (int i = 0; i < 3; i++)
        msgs[i].msg_hdr = (struct msghdr){.msg_iov = &out[i], .msg_iovlen = 1};
    EQ(sendmmsg(d.fd, msgs, 3, 0), 3);
    EQ(msgs[0].msg_len, 2);
    EQ(msgs[1].msg_len, 3);
    EQ(msgs[2].msg_len, 1);
    P_WANT(&d, "aabbbc");
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    for (int i = 0; i < 4; i++) {
        in[i] = (struct iovec){buf[i], 4};
        msgs[i].msg_hdr = (struct msghdr){.msg_iov = &in[i], .msg_iovlen = 1};
    }
    EQ(recvmmsg(d.fd, msgs, 4, MSG_DONTWAIT, NULL), 3);
    EQ(msgs[2].msg_len, 2);
    EQ(memcmp(buf[0], "0123", 4) || memcmp(buf[1], "4567", 4) || memcmp(buf[2], "89", 2), 0);
    ERR(recvmmsg(d.fd, msgs, 4, MSG_DONTWAIT, NULL), EAGAIN);
    p_send(&d, "ab");
    EQ(recvmmsg(d.fd, msgs, 4, MSG_WAITFORONE, NULL), 1);
    EQ(msgs[0].msg_len, 2);
    p_start(&d, do_send_later, 30);
    EQ(recvmmsg(d.fd, msgs, 1, 0, NULL), 1);
    EQ(msgs[0].msg_len, 4);
    p_finish(&d);
    EQ(sendmmsg(d.fd, msgs, 0, 0), 0);
}

CASE(recvmmsg_timeout)
{
    struct duo d = duo_open(0);
    char buf[2][4];
    struct iovec in[] = {{buf[0], 4}, {buf[1], 4}};
    struct mmsghdr msgs[2] = {{.msg_hdr = {.msg_iov = &in[0], .msg_iovlen = 1}},
                              {.msg_hdr = {.msg_iov = &in[1], .msg_iovlen = 1}}};
    struct timespec limit = {0, 20000000};
    p_start(&d, do_send_later, 300); /* the limit is looked at only after a message has come */
    EQ(recvmmsg(d.fd, msgs, 2, 0, &limit), 1);
    EQ(msgs[0].msg_len, 4);
    p_finish(&d);
    limit.tv_nsec = -1;
    ERR(recvmmsg(d.fd, msgs, 2, 0, &limit), EINVAL);
}

static int temp_file(size_t count)
{
    int fd = (int)MUST(syscall(SYS_memfd_create, "sockconf", 0));
    char *bytes = malloc(count);
    pattern(0, 0, bytes, count);
    EQ(write(fd, bytes, count), count);
    free(bytes);
    return fd;
}

CASE(sendfile_offsets)
{
    struct duo d = duo_open(0);
    int file = temp_file(100000);
    off_t at = 0;
    p_start(&d, do_recv_pattern, 100000);
    EQ(sendfile(d.fd, file, &at, 60000), 60000);
    EQ(at, 60000);
    EQ(lseek(file, 0, SEEK_CUR), 100000);
    MUST(lseek(file, 60000, SEEK_SET));
    EQ(sendfile(d.fd, file, NULL, 1 << 20), 40000); /* to the end of the file */
    EQ(lseek(file, 0, SEEK_CUR), 100000);
    EQ(sendfile(d.fd, file, NULL, 10), 0);
    EQ(p_finish(&d), 0);
    off64_t wide = 99990;
    char tail[11] = "";
    pattern(0, 99990, tail, 10);
    EQ(sendfile64(d.fd, file, &wide, 10), 10);
    EQ(wide, 100000);
    EQ(sendfile(d.fd, file, &at, 0), 0);
    ERR(sendfile(d.fd, -1, NULL, 10), EBADF);
    wide = -1;
    ERR(sendfile64(d.fd, file, &wide, 10), EINVAL);
}

CASE(sendfile_nonblock)
{
    struct duo d = duo_open(NONBLOCK);
    int file = temp_file(32 << 20);
    off_t at = 0;
    ssize_t n;
    while (at < 32 << 20 && (n = sendfile(d.fd, file, &at, (32 << 20) - (size_t)at)) > 0)
        ;
    CHECK(at < 32 << 20, "expected a full buffer before 32 MiB, saw all of it sent");
    ERR(sendfile(d.fd, file, &at, 1 << 20), EAGAIN);
    p_start(&d, do_recv_pattern, 32 << 20);
    while (at < 32 << 20) {
        AWAIT(d.fd, POLLOUT);
        n = sendfile(d.fd, file, &at, (32 << 20) - (size_t)at);
        CHECK(n > 0 || errno == EAGAIN, "expected progress, saw %s", strerror(errno));
    }
    EQ(p_finish(&d), 0);
}

CASE(sendfile_from_socket)
{
    struct duo d = duo_open(0);
    int file = temp_file(10);
    p_send(&d, "kept");
    ERR2(sendfile(file, d.fd, NULL, 4), EINVAL, ESPIPE);
    WANT(d.fd, "kept");
}

CASE(splice_both_ways)
{
    struct duo d = duo_open(0);
    int in[2];
    char got[32];
    MUST(pipe(in));
    EQ(write(in[1], "through a pipe", 14), 14);
    EQ(splice(in[0], NULL, d.fd, NULL, 14, 0), 14);
    P_WANT(&d, "through a pipe");
    p_send(&d, "and back");
    AWAIT_BYTES(d.fd, 8);
    EQ(splice(d.fd, NULL, in[1], NULL, 4096, SPLICE_F_MOVE), 8);
    EQ(read(in[0], got, sizeof got), 8);
    EQ(memcmp(got, "and back", 8), 0);
    set_nonblock(d.fd, true); /* SPLICE_F_NONBLOCK speaks of the pipe only */
    ERR(splice(d.fd, NULL, in[1], NULL, 10, 0), EAGAIN);
    set_nonblock(d.fd, false);
    ERR(splice(in[0], NULL, d.fd, NULL, 10, SPLICE_F_NONBLOCK), EAGAIN);
    EQ(splice(d.fd, NULL, in[1], NULL, 0, 0), 0);
    off64_t at = 0;
    ERR2(splice(d.fd, &at, in[1], NULL, 10, 0), EINVAL, ESPIPE);
    ERR(splice(d.fd, NULL, d.fd, NULL, 10, 0), EINVAL);
    PUT(d.fd, "ping");
    P_WANT(&d, "ping");
    p_close(&d);
    EQ(splice(d.fd, NULL, in[1], NULL, 10, 0), 0);
}

CASE(syscall_function)
{
    struct duo d = duo_open(0);
    char got[16];
    EQ(syscall(SYS_write, d.fd, "raw1", 4L), 4);
    P_WANT(&d, "raw1");
    EQ(syscall(SYS_sendto, d.fd, "raw2", 4L, 0L, NULL, 0L), 4);
    P_WANT(&d, "raw2");
    p_send(&d, "abcdef");
    AWAIT_BYTES(d.fd, 6);
    EQ(syscall(SYS_read, d.fd, got, 2L), 2);
    EQ(syscall(SYS_recvfrom, d.fd, got + 2, 2L, 0L, NULL, NULL), 2);
    struct iovec in = {got + 4, 2};
    EQ(syscall(SYS_readv, d.fd, &in, 1L), 2);
    EQ(memcmp(got, "abcdef", 6), 0);
    ERR(syscall(SYS_recvfrom, d.fd, got, 2L, (long)MSG_DONTWAIT, NULL, NULL), EAGAIN);
    struct pollfd watch = {.fd = d.fd, .events = POLLIN};
    struct timespec none = {0, 0};
    EQ(syscall(SYS_ppoll, &watch, 1L, &none, NULL, 0L), 0);
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    EQ(syscall(SYS_ppoll, &watch, 1L, &none, NULL, 0L), 1);
    int copy = (int)MUST(syscall(SYS_dup, d.fd));
    EQ(syscall(SYS_close, d.fd), 0);
    EQ(syscall(SYS_read, copy, got, 1L), 1);
    EQ(syscall(SYS_shutdown, copy, (long)SHUT_WR), 0);
    P_WANT_EOF(&d);
    EQ(syscall(SYS_getpid), getpid());
    ERR(syscall(SYS_read, -1L, got, 1L), EBADF);
}

/* The names that a fortified program calls when the length is not known at compile time. */
extern ssize_t __read_chk(int, void *, size_t, size_t);
extern ssize_t __recv_chk(int, void *, size_t, size_t, int);
extern ssize_t __recvfrom_chk(int, void *, size_t, size_t, int, struct sockaddr *, socklen_t *);
extern int __poll_chk(struct pollfd *, nfds_t, int, size_t);
extern int __ppoll_chk(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *, size_t);
extern long __fdelt_chk(long);

CASE(fortified_calls)
{
    struct duo d = duo_open(0);
    char got[8];
    p_send(&d, "abcdef");
    AWAIT_BYTES(d.fd, 6);
    struct pollfd watch = {.fd = d.fd, .events = POLLIN};
    struct timespec none = {0, 0};
    EQ(__poll_chk(&watch, 1, 1000, sizeof watch), 1);
    EQ(watch.revents, POLLIN);
    EQ(__ppoll_chk(&watch, 1, &none, NULL, sizeof watch), 1);
    EQ(__read_chk(d.fd, got, 2, sizeof got), 2);
    EQ(__recv_chk(d.fd, got + 2, 2, sizeof got - 2, 0), 2);
    EQ(__recvfrom_chk(d.fd, got + 4, 4, sizeof got - 4, 0, NULL, NULL), 2);
    EQ(memcmp(got, "abcdef", 6), 0);
    EQ(__poll_chk(&watch, 1, 0, sizeof watch), 0);
    ERR(__recv_chk(d.fd, got, 2, sizeof got, MSG_DONTWAIT), EAGAIN);
    EQ(__fdelt_chk(70), 70 / (8 * (long)sizeof(long)));
}

static void overflow(int which, int fd)
{
    char got[4];
    struct pollfd watch = {.fd = fd, .events = POLLIN};
    struct timespec none = {0, 0};
    volatile size_t more = 5;
    volatile nfds_t two = 2;
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(open("/dev/null", O_WRONLY), 2); /* glibc's complaint is not for our reader */
    setsid();
    if (which == 0)
        (void)!__read_chk(fd, got, more, 4);
    if (which == 1)
        __recv_chk(fd, got, more, 4, MSG_DONTWAIT);
    if (which == 2)
        __recvfrom_chk(fd, got, more, 4, MSG_DONTWAIT, NULL, NULL);
    if (which == 3)
        __poll_chk(&watch, two, 0, sizeof watch);
    if (which == 4)
        __ppoll_chk(&watch, two, &none, NULL, sizeof watch);
    if (which == 5)
        __fdelt_chk(FD_SETSIZE);
}

CASE(fortified_overflow)
{
    struct duo d = duo_open(0);
    for (int which = 0; which < 6; which++) {
        pid_t pid = (pid_t)MUST(fork());
        if (pid == 0) {
            overflow(which, d.fd);
            _exit(0);
        }
        int status = 0;
        MUST(waitpid(pid, &status, 0));
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "expected an abort of check %d, saw status %#x", which,
              (unsigned)status);
    }
    PUT(d.fd, "fine");
    P_WANT(&d, "fine");
}

CASE(zero_length)
{
    struct duo d = duo_open(0);
    char got[8];
    EQ(send(d.fd, "", 0, 0), 0);
    EQ(write(d.fd, "", 0), 0);
    EQ(send(d.fd, NULL, 0, 0), 0);
    EQ(read(d.fd, got, 0), 0); /* nothing there: read() of nothing does not wait ... */
    ERR(recv(d.fd, got, 0, MSG_DONTWAIT), EAGAIN); /* ... but recv() of nothing does */
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    EQ(recv(d.fd, got, 0, 0), 0);
    EQ(recv(d.fd, NULL, 0, 0), 0);
    EQ(recv(d.fd, got, sizeof got, 0), 1);
    ERR(recv(d.fd, got, sizeof got, MSG_DONTWAIT), EAGAIN);
    PUT(d.fd, "y");
    P_WANT(&d, "y"); /* the empty sends were not seen as anything */
}

/* Two pages, the second of which cannot be touched. */
static char *cliff(size_t *page)
{
    *page = (size_t)sysconf(_SC_PAGESIZE);
    char *at = mmap(NULL, 2 * *page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED, "expected memory, saw %s", strerror(errno));
    MUST(mprotect(at + *page, *page, PROT_NONE));
    return at;
}

CASE(bad_pointers)
{
    struct duo d = duo_open(0);
    size_t page;
    char *edge = cliff(&page);
    void *volatile nowhere = edge + page; /* mapped without rights */
    void *volatile low = (void *)16;      /* not mapped */
    char got[8];
    ERR(send(d.fd, nowhere, 10, 0), EFAULT);
    ERR(write(d.fd, low, 10), EFAULT);
    p_send(&d, "kept");
    AWAIT_BYTES(d.fd, 4);
    ERR(recv(d.fd, nowhere, 10, 0), EFAULT);
    ERR(read(d.fd, low, 10), EFAULT);
    EQ(recv(d.fd, got, sizeof got, 0), 4);
    EQ(memcmp(got, "kept", 4), 0);
    ERR(writev(d.fd, nowhere, 2), EFAULT);
    ERR(readv(d.fd, low, 2), EFAULT);
    ERR(sendmsg(d.fd, nowhere, 0), EFAULT);
    ERR(recvmsg(d.fd, low, 0), EFAULT);
    struct iovec bad = {nowhere, 4};
    ERR(writev(d.fd, &bad, 1), EFAULT);
    struct msghdr msg = {.msg_iov = &bad, .msg_iovlen = 1};
    ERR(sendmsg(d.fd, &msg, 0), EFAULT);
    PUT(d.fd, "alive");
    P_WANT(&d, "alive");
}

CASE(bad_pointers_in_wait_calls)
{
    struct duo d = duo_open(0);
    size_t page;
    void *volatile nowhere = cliff(&page) + page;
    int set = (int)MUST(epoll_create1(0));
    struct epoll_event event = {.events = EPOLLIN, .data.fd = d.fd};
    MUST(epoll_ctl(set, EPOLL_CTL_ADD, d.fd, &event));
    p_send(&d, "x");
    AWAIT(d.fd, POLLIN);
    ERR(epoll_wait(set, nowhere, 4, 1000), EFAULT);
    ERR(poll(nowhere, 1, 0), EFAULT);
    ERR(epoll_ctl(set, EPOLL_CTL_MOD, d.fd, nowhere), EFAULT);
    ERR(select(d.fd + 1, nowhere, NULL, NULL, NULL), EFAULT);
    socklen_t len = 16;
    ERR(getsockname(d.fd, nowhere, &len), EFAULT);
    ERR(getpeername(d.fd, nowhere, &len), EFAULT);
    ERR(getsockopt(d.fd, SOL_SOCKET, SO_ERROR, nowhere, &len), EFAULT);
    ERR(setsockopt(d.fd, SOL_SOCKET, SO_KEEPALIVE, nowhere, 4), EFAULT);
    ERR(ioctl(d.fd, FIONREAD, nowhere), EFAULT);
    WANT(d.fd, "x");
}

CASE(half_bad_buffers)
{
    struct duo d = duo_open(0);
    size_t page;
    char *edge = cliff(&page);
    /* What was readable may be sent, or nothing; never anything else. */
    pattern(0, 0, edge, page);
    ssize_t sent = send(d.fd, edge, 2 * page, MSG_NOSIGNAL);
    CHECK(sent == -1 ? errno == EFAULT : sent > 0 && (size_t)sent <= page, "expected EFAULT or part of a page, saw %zd",
          sent);
    if (sent > 0)
        EQ(p_do(&d, do_recv_pattern, sent), 0);
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    ssize_t got = recv(d.fd, edge + page - 4, 10, 0);
    CHECK(got == -1 ? errno == EFAULT : got > 0 && got <= 4, "expected EFAULT or at most 4 bytes, saw %zd", got);
    char rest[11] = "0123456789";
    WANT(d.fd, rest + (got > 0 ? got : 0)); /* no byte is lost */
    p_send(&d, "end");
    WANT(d.fd, "end");
}

/* The same pointer, with its size hidden from the fortified headers. */
static void *unsized(void *volatile at) { return at; }

CASE(huge_lengths)
{
    struct duo d = duo_open(0);
    char *got = malloc(4096);
    volatile size_t huge = (size_t)1 << 40, absurd = (size_t)-1;
    got = unsized(got);
    p_send(&d, "abc");
    EQ(recv(d.fd, got, huge, 0), 3);
    p_send(&d, "def");
    EQ(read(d.fd, got, huge / 500), 3);
    EQ(memcmp(got, "def", 3), 0);
    p_send(&d, "ghi");
    AWAIT_BYTES(d.fd, 3);
    ERR(read(d.fd, got, absurd), EFAULT);
    EQ(recv(d.fd, got, absurd, 0), 3);
    ERR(write(d.fd, got, absurd), EFAULT);
    /* 3 GiB, only the start of which exists: some of it may go, then EFAULT; the connection is not to hang. */
    struct iovec in[] = {{got, huge}, {got, huge}};
    p_send(&d, "jkl");
    EQ(readv(d.fd, in, 2), 3);
    EQ(memcmp(got, "jkl", 3), 0);
}

CASE(bad_descriptors)
{
    char got[4];
    struct pollfd watch = {.fd = 900, .events = POLLIN};
    int file = (int)MUST(open("/dev/null", O_RDWR));
    int set = (int)MUST(epoll_create1(0));
    struct duo d = duo_open(0);
    int gone = d.fd;
    MUST(close(gone));
    for (int i = 0; i < 3; i++) {
        int fd = i == 0 ? -1 : i == 1 ? gone : 900;
        ERR(send(fd, "x", 1, 0), EBADF);
        ERR(recv(fd, got, 1, 0), EBADF);
        ERR(read(fd, got, 1), EBADF);
        ERR(write(fd, "x", 1), EBADF);
        ERR(close(fd), EBADF);
        ERR(shutdown(fd, SHUT_RDWR), EBADF);
        ERR(dup(fd), EBADF);
        ERR(fcntl(fd, F_GETFL), EBADF);
        ERR(ioctl(fd, FIONREAD, got), EBADF);
        ERR(epoll_ctl(set, EPOLL_CTL_DEL, fd, NULL), EBADF);
    }
    EQ(poll(&watch, 1, 0), 1);
    EQ(watch.revents, POLLNVAL);
    ERR(send(file, "x", 1, 0), ENOTSOCK);
    ERR(recv(file, got, 1, 0), ENOTSOCK);
    ERR(shutdown(file, SHUT_WR), ENOTSOCK);
    ERR(sockatmark(file), ENOTTY);
    struct epoll_event event = {.events = EPOLLIN};
    ERR(epoll_ctl(set, EPOLL_CTL_ADD, file, &event), EPERM);
    P_WANT_EOF(&d);
}

CASE(not_connected)
{
    char got[4];
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    ERR(recv(fd, got, 1, 0), ENOTCONN);
    ERR(send(fd, "x", 1, MSG_NOSIGNAL), EPIPE);
    EQ(events_of(fd, POLLIN | POLLOUT, 0), POLLOUT | POLLHUP);
    ERR(shutdown(fd, SHUT_RDWR), ENOTCONN);
    struct sockaddr_in peer;
    socklen_t len = sizeof peer;
    ERR(getpeername(fd, (struct sockaddr *)&peer, &len), ENOTCONN);
    ERR(accept(fd, NULL, NULL), EINVAL);
    struct sockaddr_in closed = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(1)};
    ERR(connect(fd, (struct sockaddr *)&closed, sizeof closed), ECONNREFUSED);
    close(fd);
}

CASE(stdio_on_socket)
{
    struct duo d = duo_open(0);
    char line[64];
    p_send(&d, "first line\nsecond ");
    FILE *in = fdopen(d.fd, "r"), *out = fdopen(dup(d.fd), "w");
    CHECK(in && out, "expected streams, saw %s", strerror(errno));
    CHECK(fgets(line, sizeof line, in) && !strcmp(line, "first line\n"), "expected the first line, saw \"%s\"", line);
    EQ(fprintf(out, "number %d\n", 42), 10);
    EQ(fflush(out), 0);
    P_WANT(&d, "number 42\n");
    p_send(&d, "line\n");
    CHECK(fgets(line, sizeof line, in) && !strcmp(line, "second line\n"), "expected the second line, saw \"%s\"", line);
    for (int i = 0; i < 20000; i++)
        fprintf(out, "%c", 'a' + i % 26);
    p_start(&d, do_discard, 0);
    EQ(fclose(out), 0);
    MUST(shutdown(fileno(in), SHUT_WR));
    EQ(p_finish(&d), 0);
    p_close(&d);
    EQ(fgetc(in), EOF);
    EQ(feof(in) != 0, 1);
    EQ(fclose(in), 0);
    ERR(fcntl(d.fd, F_GETFD), EBADF);
}

CASE(stdio_with_unread_bytes)
{
    /* fdopen() when bytes are waiting, some of them already looked at. */
    struct duo d = duo_open(0);
    char got[8], line[64];
    p_send(&d, "abcdef\nrest\n");
    AWAIT_BYTES(d.fd, 12);
    EQ(recv(d.fd, got, 3, 0), 3);
    FILE *both = fdopen(d.fd, "r+");
    CHECK(both && fgets(line, sizeof line, both) && !strcmp(line, "def\n"), "expected \"def\", saw \"%s\"", line);
    CHECK(fgets(line, sizeof line, both) && !strcmp(line, "rest\n"), "expected \"rest\", saw \"%s\"", line);
    p_start(&d, do_echo, 0);
    for (int i = 0; i < 50; i++) {
        fprintf(both, "round %d\n", i);
        fflush(both);
        int n = -1;
        CHECK(fgets(line, sizeof line, both) && sscanf(line, "round %d", &n) == 1 && n == i, "expected round %d, saw %s",
              i, line);
    }
    EQ(fclose(both), 0);
    p_finish(&d);
}

CASE(dprintf_on_socket)
{
    struct duo d = duo_open(0);
    PUT(d.fd, "a");
    EQ(dprintf(d.fd, "%s-%d", "text", 7), 6);
    PUT(d.fd, "z");
    P_WANT(&d, "atext-7z");
}
