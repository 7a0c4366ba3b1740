/*
 * Socket options, names, counts: what can be asked about a connection and set on it, before and in its middle.
 */
#include "sockconf.h"
#include <linux/sockios.h>

CASE(names)
{
    struct duo d = duo_open(0);
    for (int i = 0; i < 2; i++) {
        struct sockaddr_in here, there;
        socklen_t len = sizeof here;
        MUST(getsockname(d.fd, (struct sockaddr *)&here, &len));
        EQ(len, sizeof here);
        EQ(here.sin_family, AF_INET);
        EQ(ntohl(here.sin_addr.s_addr), INADDR_LOOPBACK);
        MUST(getpeername(d.fd, (struct sockaddr *)&there, &len));
        EQ(len, sizeof there);
        EQ(ntohl(there.sin_addr.s_addr), INADDR_LOOPBACK);
        CHECK(here.sin_port != there.sin_port, "expected two ports, saw one");
        len = 4; /* a short buffer: cut, and the true length told */
        memset(&here, 0xee, sizeof here);
        MUST(getsockname(d.fd, (struct sockaddr *)&here, &len));
        EQ(len, sizeof here);
        EQ(((unsigned char *)&here)[4], 0xee);
        p_start(&d, do_echo, 0);
        for (int k = 0; k < 50; k++) {
            PUT(d.fd, "x");
            WANT(d.fd, "x");
        }
        MUST(shutdown(d.fd, SHUT_WR));
        WANT_EOF(d.fd);
        p_finish(&d);
        if (i == 0)
            d = duo_more(&d, COLD);
    }
}

CASE(accept_gives_the_name)
{
    struct sockaddr_storage at;
    socklen_t len, size;
    int listener = listen_on(0, &at, &len);
    int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(client, (struct sockaddr *)&at, len));
    struct sockaddr_in from, own;
    size = sizeof from;
    int server = (int)MUST(accept(listener, (struct sockaddr *)&from, &size));
    EQ(size, sizeof from);
    size = sizeof own;
    MUST(getsockname(client, (struct sockaddr *)&own, &size));
    EQ(from.sin_port, own.sin_port);
    EQ(fcntl(server, F_GETFL), O_RDWR);
    EQ(fcntl(server, F_GETFD), 0);
    ERR(accept4(listener, NULL, NULL, 0x7000000), EINVAL);
    ERR(listen(client, 5), EINVAL);
    ERR(accept(client, NULL, NULL), EINVAL);
    int type = get_int(server, SOL_SOCKET, SO_TYPE);
    EQ(type, SOCK_STREAM);
    EQ(get_int(listener, SOL_SOCKET, SO_ACCEPTCONN), 1);
    EQ(get_int(server, SOL_SOCKET, SO_ACCEPTCONN), 0);
    EQ(get_int(server, SOL_SOCKET, SO_DOMAIN), AF_INET);
    EQ(get_int(server, SOL_SOCKET, SO_PROTOCOL), IPPROTO_TCP);
}

static void exchange(const struct duo *d)
{
    p_start(d, do_echo, 0);
    for (int i = 0; i < 100; i++) {
        PUT(d->fd, "round trip");
        WANT(d->fd, "round trip");
    }
    SEND_PATTERN(d->fd, 50000);
    RECV_PATTERN(d->fd, 50000);
    MUST(shutdown(d->fd, SHUT_WR));
    WANT_EOF(d->fd);
    p_finish(d);
}

CASE(ipv6)
{
    struct duo d = duo_open(V6);
    struct sockaddr_in6 here;
    socklen_t len = sizeof here;
    MUST(getsockname(d.fd, (struct sockaddr *)&here, &len));
    EQ(here.sin6_family, AF_INET6);
    EQ(IN6_IS_ADDR_LOOPBACK(&here.sin6_addr) != 0, 1);
    exchange(&d);
}

CASE(v4_mapped)
{
    struct duo d = duo_open(MAPPED);
    struct sockaddr_in6 there;
    socklen_t len = sizeof there;
    MUST(getpeername(d.fd, (struct sockaddr *)&there, &len));
    EQ(there.sin6_family, AF_INET6);
    EQ(IN6_IS_ADDR_V4MAPPED(&there.sin6_addr) != 0, 1);
    exchange(&d);
}

static void accept_one(int listener, const struct sockaddr *at, socklen_t len)
{
    int client = (int)MUST(socket(at->sa_family, SOCK_STREAM, 0));
    MUST(connect(client, at, len));
    int server = (int)MUST(accept(listener, NULL, NULL));
    char got[8];
    for (int i = 0; i < 60; i++) {
        EQ(send(client, "abcd", 4, 0), 4);
        EQ(recv(server, got, 4, MSG_WAITALL), 4);
        EQ(send(server, "efgh", 4, 0), 4);
        EQ(recv(client, got, 4, MSG_WAITALL), 4);
        if (i % 10 == 0)
            sleep_ms(1);
    }
    EQ(memcmp(got, "efgh", 4), 0);
    close(client);
    close(server);
}

CASE(v4_client_of_v6_listener)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6};
    socklen_t len = sizeof any;
    int listener = (int)MUST(socket(AF_INET6, SOCK_STREAM, 0));
    set_int(listener, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    MUST(bind(listener, (struct sockaddr *)&any, len));
    MUST(listen(listener, 8));
    MUST(getsockname(listener, (struct sockaddr *)&any, &len));
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = any.sin6_port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    for (int i = 0; i < 3; i++)
        accept_one(listener, (struct sockaddr *)&four, sizeof four);
}

CASE(any_address_and_other_loopback)
{
    struct sockaddr_in any = {.sin_family = AF_INET};
    socklen_t len = sizeof any;
    int listener = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(bind(listener, (struct sockaddr *)&any, len));
    MUST(listen(listener, 8));
    MUST(getsockname(listener, (struct sockaddr *)&any, &len));
    any.sin_addr.s_addr = htonl(0x7f00002a); /* 127.0.0.42 */
    accept_one(listener, (struct sockaddr *)&any, sizeof any);
    any.sin_addr.s_addr = htonl(INADDR_ANY); /* Linux: this host */
    accept_one(listener, (struct sockaddr *)&any, sizeof any);
}

CASE(reuseport)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listeners[3];
    for (int i = 0; i < 3; i++) {
        listeners[i] = (int)MUST(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
        set_int(listeners[i], SOL_SOCKET, SO_REUSEPORT, 1);
        MUST(bind(listeners[i], (struct sockaddr *)&at, len));
        MUST(listen(listeners[i], 16));
        MUST(getsockname(listeners[i], (struct sockaddr *)&at, &len));
    }
    int strict = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    ERR(bind(strict, (struct sockaddr *)&at, len), EADDRINUSE);
    for (int i = 0; i < 24; i++) {
        int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0)), server = -1;
        MUST(connect(client, (struct sockaddr *)&at, len));
        struct pollfd set[3];
        for (int k = 0; k < 3; k++)
            set[k] = (struct pollfd){.fd = listeners[k], .events = POLLIN};
        EQ(poll(set, 3, 5000), 1);
        for (int k = 0; k < 3; k++)
            if (set[k].revents)
                server = (int)MUST(accept(listeners[k], NULL, NULL));
        EQ(send(client, "hi", 2, 0), 2);
        WANT(server, "hi");
        PUT(server, "ho");
        WANT(client, "ho");
        close(client);
        close(server);
    }
}

CASE(bind_before_connect)
{
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    int client = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000007)}, seen;
    MUST(bind(client, (struct sockaddr *)&own, sizeof own));
    MUST(connect(client, (struct sockaddr *)&at, len));
    socklen_t size = sizeof seen;
    int server = (int)MUST(accept(listener, (struct sockaddr *)&seen, &size));
    EQ(ntohl(seen.sin_addr.s_addr), 0x7f000007);
    for (int i = 0; i < 100; i++) {
        PUT(client, "a");
        WANT(server, "a");
        PUT(server, "b");
        WANT(client, "b");
    }
}

CASE(connected_to_itself)
{
    /* A TCP socket that connects to its own port: both ends are one socket. */
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof own;
    MUST(bind(fd, (struct sockaddr *)&own, len));
    MUST(getsockname(fd, (struct sockaddr *)&own, &len));
    MUST(connect(fd, (struct sockaddr *)&own, len));
    for (int i = 0; i < 100; i++) {
        PUT(fd, "echo");
        WANT(fd, "echo");
        if (i % 10 == 0)
            sleep_ms(1);
    }
    MUST(shutdown(fd, SHUT_WR));
    WANT_EOF(fd);
}

CASE(bytes_waiting)
{
    struct duo d = duo_open(0);
    int count = -1;
    MUST(ioctl(d.fd, FIONREAD, &count));
    EQ(count, 0);
    p_send(&d, "0123456789");
    AWAIT_BYTES(d.fd, 10);
    MUST(ioctl(d.fd, FIONREAD, &count));
    EQ(count, 10);
    WANT(d.fd, "0123");
    MUST(ioctl(d.fd, FIONREAD, &count));
    EQ(count, 6);
    WANT(d.fd, "456789");
    MUST(ioctl(d.fd, FIONREAD, &count));
    EQ(count, 0);
    p_shutdown(&d, SHUT_WR);
    AWAIT(d.fd, POLLRDHUP);
    MUST(ioctl(d.fd, FIONREAD, &count));
    EQ(count, 0);
}

CASE(bytes_unsent)
{
    struct duo d = duo_open(0);
    int count = -1;
    size_t sent = fill(d.fd);
    MUST(ioctl(d.fd, SIOCOUTQ, &count));
    CHECK(count >= 0 && (size_t)count <= sent, "expected between 0 and %zu bytes unsent, saw %d", sent, count);
    EQ(p_do(&d, do_recv_pattern, (long)sent), 0);
    for (int i = 0; i < 1000; i++) {
        MUST(ioctl(d.fd, SIOCOUTQ, &count));
        if (count == 0)
            break;
        sleep_ms(2);
    }
    EQ(count, 0);
}

CASE(options_in_the_middle)
{
    struct duo d = duo_open(0);
    static const struct {
        int level, name, value;
    } set[] = {
        {SOL_SOCKET, SO_KEEPALIVE, 1},      {IPPROTO_TCP, TCP_NODELAY, 1},     {IPPROTO_TCP, TCP_QUICKACK, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 100},   {IPPROTO_TCP, TCP_KEEPINTVL, 10},  {IPPROTO_TCP, TCP_KEEPCNT, 3},
        {IPPROTO_TCP, TCP_USER_TIMEOUT, 60000}, {SOL_SOCKET, SO_PRIORITY, 2},  {IPPROTO_IP, IP_TOS, 16},
        {SOL_SOCKET, SO_SNDBUF, 65536},     {SOL_SOCKET, SO_RCVBUF, 65536},    {SOL_SOCKET, SO_REUSEADDR, 1},
        {SOL_SOCKET, SO_BUSY_POLL, 0},      {IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384}, {SOL_SOCKET, SO_OOBINLINE, 1},
    };
    for (size_t i = 0; i < sizeof set / sizeof *set; i++) {
        step(HERE);
        setsockopt(d.fd, set[i].level, set[i].name, &set[i].value, sizeof(int));
        p_send(&d, "after an option");
        WANT(d.fd, "after an option");
        PUT(d.fd, "both ways");
        P_WANT(&d, "both ways");
    }
    EQ(get_int(d.fd, IPPROTO_TCP, TCP_NODELAY), 1);
    EQ(get_int(d.fd, SOL_SOCKET, SO_KEEPALIVE), 1);
    EQ(get_int(d.fd, SOL_SOCKET, SO_SNDBUF), 131072);
    EQ(get_int(d.fd, SOL_SOCKET, SO_ERROR), 0);
    ERR(setsockopt(d.fd, SOL_SOCKET, 9999, &(int){1}, 4), ENOPROTOOPT);
    ERR(setsockopt(d.fd, SOL_SOCKET, SO_KEEPALIVE, &(int){1}, 1), EINVAL);
    exchange(&d);
}

CASE(small_buffers_set_early)
{
    struct duo d = duo_open(COLD);
    set_int(d.fd, SOL_SOCKET, SO_SNDBUF, 16384);
    set_int(d.fd, SOL_SOCKET, SO_RCVBUF, 16384);
    duo_warm(&d);
    p_start(&d, do_send_pattern, 512 << 10);
    RECV_PATTERN(d.fd, 512 << 10);
    EQ(p_finish(&d), 0);
    p_start(&d, do_recv_pattern, 512 << 10);
    SEND_PATTERN(d.fd, 512 << 10);
    EQ(p_finish(&d), 0);
}

CASE(zerocopy)
{
    struct duo d = duo_open(0);
    int on = 1;
    if (setsockopt(d.fd, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof on) < 0)
        return;
    char *block = malloc(100000);
    pattern(0, 0, block, 100000);
    p_start(&d, do_recv_pattern, 100000);
    size_t done = 0;
    int calls = 0;
    while (done < 100000) {
        ssize_t n = send(d.fd, block + done, 100000 - done, MSG_ZEROCOPY);
        CHECK(n > 0, "expected to send, saw %s", strerror(errno));
        done += (size_t)n;
        calls++;
    }
    EQ(p_finish(&d), 0);
    int told = 0; /* one notice for each call, maybe several in one */
    while (told < calls) {
        char control[256];
        struct msghdr msg = {.msg_control = control, .msg_controllen = sizeof control};
        AWAIT(d.fd, POLLERR);
        MUST(recvmsg(d.fd, &msg, MSG_ERRQUEUE));
        struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
        CHECK(head, "expected a notice, saw none");
        const uint32_t *err = (const uint32_t *)CMSG_DATA(head); /* sock_extended_err: info is word 2, data word 3 */
        told += (int)(err[3] - err[2]) + 1;
    }
    EQ(told, calls);
    PUT(d.fd, "after");
    P_WANT(&d, "after");
}

CASE(timestamps)
{
    struct duo d = duo_open(0);
    set_int(d.fd, SOL_SOCKET, SO_TIMESTAMP, 1);
    p_send(&d, "stamped");
    char got[16], control[256];
    struct iovec in = {got, sizeof got};
    struct msghdr msg = {.msg_iov = &in, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    EQ(recvmsg(d.fd, &msg, 0), 7);
    struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
    if (head) { /* since Linux 4.20 or so TCP stamps too */
        EQ(head->cmsg_level, SOL_SOCKET);
        EQ(head->cmsg_type, SO_TIMESTAMP);
        struct timeval stamp;
        memcpy(&stamp, CMSG_DATA(head), sizeof stamp);
        CHECK(llabs((long long)stamp.tv_sec - (long long)time(NULL)) < 60, "expected the time of day, saw %lld",
              (long long)stamp.tv_sec);
    }
    exchange(&d);
}

CASE(tcp_info)
{
    struct duo d = duo_open(0);
    struct tcp_info info;
    socklen_t len = sizeof info;
    memset(&info, 0xff, sizeof info);
    MUST(getsockopt(d.fd, IPPROTO_TCP, TCP_INFO, &info, &len));
    EQ(info.tcpi_state, TCP_ESTABLISHED);
    EQ(info.tcpi_retransmits, 0);
    CHECK(info.tcpi_snd_mss > 0, "expected a segment size, saw %u", info.tcpi_snd_mss);
    p_shutdown(&d, SHUT_WR);
    AWAIT(d.fd, POLLRDHUP);
    WANT_EOF(d.fd);
    exchange(&(struct duo){.peer = d.peer, .fd = duo_more(&d, 0).fd, .at = d.at + 1});
    char name[16];
    len = sizeof name;
    MUST(getsockopt(d.fd, IPPROTO_TCP, TCP_CONGESTION, name, &len));
    CHECK(name[0] != 0, "expected the name of an algorithm, saw none");
}

CASE(fcntl_and_ioctl)
{
    struct duo d = duo_open(0);
    EQ(fcntl(d.fd, F_GETFD), 0);
    MUST(fcntl(d.fd, F_SETFD, FD_CLOEXEC));
    EQ(fcntl(d.fd, F_GETFD), FD_CLOEXEC);
    MUST(ioctl(d.fd, FIONCLEX));
    EQ(fcntl(d.fd, F_GETFD), 0);
    MUST(ioctl(d.fd, FIOCLEX));
    EQ(fcntl(d.fd, F_GETFD), FD_CLOEXEC);
    ERR(fcntl(d.fd, 9999), EINVAL);
    ERR(ioctl(d.fd, TCGETS, &(char[64]){0}), ENOTTY);
    EQ(isatty(d.fd), 0);
    struct stat about;
    MUST(fstat(d.fd, &about));
    EQ(S_ISSOCK(about.st_mode) != 0, 1);
    ERR(ftruncate(d.fd, 0), EINVAL);
    ERR(fsync(d.fd), EINVAL);
    int mark = -1;
    MUST(ioctl(d.fd, SIOCATMARK, &mark));
    EQ(mark, 0);
    exchange(&d);
}

CASE(same_descriptor_in_proc)
{
    struct duo d = duo_open(0);
    char path[64], link[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", d.fd);
    MUST(readlink(path, link, sizeof link - 1));
    CHECK(!strncmp(link, "socket:[", 8), "expected a socket, saw %s", link);
    ERR(open(path, O_RDWR), ENXIO);
    exchange(&d);
}

CASE(udp_and_unix_are_left_alone)
{
    struct duo d = duo_open(0);
    int ends[2], udp[2];
    char got[16];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    struct sockaddr_in at[2];
    for (int i = 0; i < 2; i++) {
        socklen_t len = sizeof at[i];
        at[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        udp[i] = (int)MUST(socket(AF_INET, SOCK_DGRAM, 0));
        MUST(bind(udp[i], (struct sockaddr *)&at[i], len));
        MUST(getsockname(udp[i], (struct sockaddr *)&at[i], &len));
    }
    for (int i = 0; i < 2; i++)
        MUST(connect(udp[i], (struct sockaddr *)&at[1 - i], sizeof at[0]));
    for (int i = 0; i < 100; i++) {
        EQ(send(ends[0], "unix", 4, 0), 4);
        EQ(recv(ends[1], got, 16, 0), 4);
        EQ(send(udp[0], "udp", 3, 0), 3);
        EQ(recv(udp[1], got, 16, 0), 3);
        EQ(send(udp[1], "", 0, 0), 0);
        EQ(recv(udp[0], got, 16, 0), 0);
        PUT(d.fd, "tcp");
        P_WANT(&d, "tcp");
    }
}

/* ---- TCP_INQ ---- */

/* One recvmsg with room for control messages; what is left to read, or -1 where that is not told. */
static int receive_and_left(int fd, size_t want, size_t room, int *flags)
{
    char bytes[64], control[64] = "";
    struct iovec part = {bytes, want};
    struct msghdr msg = {.msg_name = bytes, .msg_namelen = 16, .msg_iov = &part, .msg_iovlen = 1,
                         .msg_control = room ? control : NULL, .msg_controllen = room};
    MUST(recvmsg(fd, &msg, 0));
    EQ(msg.msg_namelen, 0);
    *flags = msg.msg_flags;
    struct cmsghdr *item = CMSG_FIRSTHDR(&msg);
    if (!item || item->cmsg_len < CMSG_LEN(sizeof(int)))
        return -1;
    EQ(item->cmsg_level, SOL_TCP);
    EQ(item->cmsg_type, TCP_CM_INQ);
    EQ(item->cmsg_len, CMSG_LEN(sizeof(int)));
    EQ(msg.msg_controllen, room < CMSG_SPACE(sizeof(int)) ? room : CMSG_SPACE(sizeof(int)));
    int left;
    memcpy(&left, CMSG_DATA(item), sizeof left);
    return left;
}

CASE(inq_tells_what_is_left)
{
    for (int cold = 0; cold < 2; cold++) {
        struct duo d = duo_open(cold ? COLD : 0);
        int flags;
        set_int(d.fd, IPPROTO_TCP, TCP_INQ, 1);
        EQ(get_int(d.fd, IPPROTO_TCP, TCP_INQ), 1);
        if (cold)
            duo_warm(&d);
        uint64_t before = kernel_bytes(d.fd);
        for (int i = 0; i < 50; i++) {
            p_send(&d, "0123456789");
            AWAIT_BYTES(d.fd, 10);
            EQ(receive_and_left(d.fd, 4, 64, &flags), 6);
            EQ(flags, 0);
            EQ(receive_and_left(d.fd, 6, 64, &flags), 0);
            PUT(d.fd, "0123456789");
            P_WANT(&d, "0123456789");
        }
        /* The option keeps nothing off rings. */
        TIMELY(!settings.need_rings || kernel_bytes(d.fd) - before < 50 * 10,
               "expected the bytes on rings, saw %llu in the kernel", (unsigned long long)(kernel_bytes(d.fd) - before));
        p_send(&d, "0123456789");
        AWAIT_BYTES(d.fd, 10);
        EQ(receive_and_left(d.fd, 1, CMSG_LEN(sizeof(int)), &flags), 9);
        EQ(flags, 0);
        EQ(receive_and_left(d.fd, 1, sizeof(struct cmsghdr), &flags), -1);
        EQ(flags, MSG_CTRUNC);
        EQ(receive_and_left(d.fd, 1, 0, &flags), -1);
        EQ(flags, MSG_CTRUNC);
        p_shutdown(&d, SHUT_WR);
        AWAIT(d.fd, POLLRDHUP);
        EQ(receive_and_left(d.fd, 2, 64, &flags), 6); /* the end counts as one */
        EQ(receive_and_left(d.fd, 5, 64, &flags), 1); /* nothing but the end */
        EQ(receive_and_left(d.fd, 5, 64, &flags), 1);
        set_int(d.fd, IPPROTO_TCP, TCP_INQ, 0);
        EQ(receive_and_left(d.fd, 5, 64, &flags), -1);
        EQ(flags, 0);
        ERR(setsockopt(d.fd, IPPROTO_TCP, TCP_INQ, &(int){2}, sizeof(int)), EINVAL);
    }
}

/* Sends a part, leaves for the kernel (an option that only that honours), and sends the rest. */
static long do_send_and_leave(int *fd, void *bytes, size_t len, long unused)
{
    (void)bytes, (void)len, (void)unused;
    sleep_ms(20);
    put(HERE, *fd, "ring", 4);
    sleep_ms(20);
    set_int(*fd, SOL_SOCKET, SO_TIMESTAMP, 1);
    put(HERE, *fd, "kernel", 6);
    return 0;
}

CASE(recvmsg_while_the_way_changes)
{
    for (int how = 0; how < 3; how++) {
        struct duo d = duo_open(0);
        char bytes[64], control[64];
        struct sockaddr_storage name;
        struct iovec part = {bytes, sizeof bytes};
        struct msghdr msg = {.msg_name = &name, .msg_namelen = sizeof name, .msg_iov = &part, .msg_iovlen = 1,
                             .msg_control = control, .msg_controllen = sizeof control, .msg_flags = 77};
        memset(control, 0x55, sizeof control);
        p_start(&d, do_send_and_leave, 0);
        for (size_t have = 0; have < 10;) {
            part.iov_len = how == 0 ? 10 - have : sizeof bytes;
            msg.msg_namelen = sizeof name;
            msg.msg_controllen = sizeof control;
            msg.msg_flags = 77;
            have += (size_t)MUST(recvmsg(d.fd, &msg, how == 0 ? MSG_WAITALL : 0));
            EQ(msg.msg_namelen, 0);
            EQ(msg.msg_controllen, 0);
            EQ(msg.msg_flags, 0);
            if (how == 2) /* and this end leaves as well */
                set_int(d.fd, SOL_SOCKET, SO_OOBINLINE, 1);
        }
        EQ(p_finish(&d), 0);
        PUT(d.fd, "back");
        P_WANT(&d, "back");
    }
}
