/*
 * Connections that are handed to the kernel, or used by calls that a preloaded library does not see: asynchronous I/O,
 * plug-ins that are bound past it, controls that give the socket away. Afterwards the kernel's own calls must see the
 * bytes.
 */
#include "sockconf.h"
#include <aio.h>
#include <dlfcn.h>
#include <linux/aio_abi.h>
#include <linux/netlink.h>
#include <sys/mount.h>

/* A stranger to every library reads and writes the socket, as a part of the kernel would. */
static void kernel_has_it(const char *here, const struct duo *d)
{
    char got[32];
    for (int i = 0; i < 3; i++) {
        p_send(d, "for the kernel");
        for (long have = 0; have < 14;) {
            long n = raw_call(SYS_recvfrom, d->fd, (long)(got + have), 14 - have, 0, 0, 0);
            CHECK(n > 0, "%s: expected bytes in the kernel, saw %ld", here, n);
            have += n;
        }
        CHECK(!memcmp(got, "for the kernel", 14), "%s: expected the peer's bytes, saw others", here);
        EQ(raw_call(SYS_sendto, d->fd, (long)"kernel's own", 12, 0, 0, 0), 12);
        p_want(here, d, "kernel's own");
    }
}
#define KERNEL_HAS_IT(d) kernel_has_it(HERE, d)

CASE(ioctl_that_nobody_knows)
{
    struct duo d = duo_open(0);
    ERR(ioctl(d.fd, 0x12345678, 0), ENOTTY);
    KERNEL_HAS_IT(&d);
}

CASE(socket_given_to_a_device)
{
    /* What NBD_SET_SOCK and SIOCKCMATTACH take; here no device takes it. */
    enum { NBD_SET_SOCK = 0xAB00, SIOCKCMATTACH = 0x89E0 };
    int device = (int)MUST(open("/dev/null", O_RDWR));
    struct duo d = duo_open(0);
    ERR(ioctl(device, NBD_SET_SOCK, d.fd), ENOTTY);
    KERNEL_HAS_IT(&d);
    d = duo_open(0);
    int attach[2] = {d.fd, -1};
    ERR(ioctl(device, SIOCKCMATTACH, attach), ENOTTY);
    KERNEL_HAS_IT(&d);
}

CASE(socket_given_to_a_file_system, .root = true)
{
    char options[64];
    struct duo d = duo_open(0);
    snprintf(options, sizeof options, "trans=fd,rfdno=%d,wfdno=%d", d.fd, d.fd);
    MUST(mount("none", "/nonexistent/folder", "9p", 0, options) == -1);
    KERNEL_HAS_IT(&d);
    d = duo_open(0);
    snprintf(options, sizeof options, "%d", d.fd);
    MUST(syscall(SYS_fsconfig, -1, 1, "rfdno", options, 0) == -1);
    KERNEL_HAS_IT(&d);
}

CASE(socket_put_into_a_map)
{
    uint32_t key = 0, value;
    struct duo d = duo_open(0);
    value = (uint32_t)d.fd;
    uint64_t attributes[4] = {UINT32_MAX, (uint64_t)(uintptr_t)&key, (uint64_t)(uintptr_t)&value, 0};
    MUST(syscall(SYS_bpf, 2, attributes, sizeof attributes) == -1);
    KERNEL_HAS_IT(&d);
}

CASE(socket_named_over_netlink)
{
    /* As NBD_ATTR_SOCKETS and iSCSI do: a number in a message. The kernel knows no such family here, and says so. */
    struct {
        struct nlmsghdr head;
        uint32_t words[4];
    } message = {.head = {.nlmsg_len = sizeof message, .nlmsg_type = 0x7f7f, .nlmsg_flags = NLM_F_REQUEST}};
    int netlink = (int)MUST(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC));
    for (int how = 0; how < 3; how++) {
        struct duo d = duo_open(0);
        message.words[2] = (uint32_t)d.fd;
        struct iovec part = {&message, sizeof message};
        struct msghdr msg = {.msg_iov = &part, .msg_iovlen = 1};
        switch (how) {
        case 0:
            EQ(send(netlink, &message, sizeof message, 0), sizeof message);
            break;
        case 1:
            EQ(sendmsg(netlink, &msg, 0), sizeof message);
            break;
        default:
            EQ(write(netlink, &message, sizeof message), sizeof message);
        }
        KERNEL_HAS_IT(&d);
    }
}

CASE(socket_named_in_a_file)
{
    /* As USB over IP does; this folder stands for that of the host controller. */
    char path[PATH_MAX + 64], text[32];
    struct duo d = duo_open(0);
    snprintf(path, sizeof path, "%s/vhci_hcd.%d", settings.folder, (int)getpid());
    int file = (int)MUST(open(path, O_WRONLY | O_CREAT | O_EXCL, 0600));
    unlink(path);
    snprintf(text, sizeof text, "0 %d 65538 3", d.fd);
    EQ(write(file, text, strlen(text)), strlen(text));
    KERNEL_HAS_IT(&d);
}

CASE(option_that_nobody_knows)
{
    struct duo d = duo_open(0);
    int one = 1;
    ERR(setsockopt(d.fd, IPPROTO_TCP, 250, &one, sizeof one), ENOPROTOOPT);
    KERNEL_HAS_IT(&d);
    d = duo_open(0);
    ERR2(setsockopt(d.fd, IPPROTO_TCP, TCP_ULP, "abc", 3), ENOENT, EPERM); /* a short name is one, too */
    KERNEL_HAS_IT(&d);
}

CASE(option_of_the_listener)
{
    /* An accepted connection has what its listener was told. */
    struct sockaddr_storage at;
    socklen_t len;
    int listener = listen_on(0, &at, &len);
    set_int(listener, SOL_SOCKET, SO_RCVLOWAT, 4);
    int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
    MUST(connect(fd, (struct sockaddr *)&at, len));
    int end = (int)MUST(accept(listener, NULL, NULL));
    for (int i = 0; i < 60; i++) {
        PUT(fd, "ping");
        WANT(end, "ping");
        PUT(end, "pong");
        WANT(fd, "pong");
        if (i % 5 == 0)
            sleep_ms(1);
    }
    PUT(fd, "abc");
    sleep_ms(20);
    EQ(events_of(end, POLLIN, 0), 0); /* below the mark */
    PUT(fd, "d");
    AWAIT(end, POLLIN);
    WANT(end, "abcd");
}

/* ---- Asynchronous I/O ---- */

static long aio_end(struct aiocb *block)
{
    const struct aiocb *list[] = {block};
    while (aio_error(block) == EINPROGRESS)
        aio_suspend(list, 1, NULL);
    EQ(aio_error(block), 0);
    return aio_return(block);
}

CASE(posix_aio)
{
    struct duo d = duo_open(0);
    char got[16] = "";
    struct aiocb in = {.aio_fildes = d.fd, .aio_buf = got, .aio_nbytes = 5};
    struct aiocb out = {.aio_fildes = d.fd, .aio_buf = "written", .aio_nbytes = 7};
    p_send(&d, "early");
    AWAIT_BYTES(d.fd, 5);
    MUST(aio_read(&in));
    p_start(&d, do_send_later, 0); /* what the peer does next gives the bytes back */
    EQ(p_finish(&d), 0);
    EQ(aio_end(&in), 5);
    EQ(memcmp(got, "early", 5), 0);
    MUST(aio_write(&out));
    EQ(aio_end(&out), 7);
    P_WANT(&d, "written");
    WANT(d.fd, "late");
    struct aiocb *list[] = {&out, NULL};
    out.aio_lio_opcode = LIO_WRITE;
    MUST(lio_listio(LIO_WAIT, list, 2, NULL));
    P_WANT(&d, "written");
}

CASE(linux_aio)
{
    struct duo d = duo_open(0);
    aio_context_t context = 0;
    struct io_event event;
    struct timespec limit = {.tv_sec = 10};
    MUST(syscall(SYS_io_setup, 8, &context));
    struct iocb poll_in = {.aio_data = 7, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = (uint32_t)d.fd, .aio_buf = POLLIN};
    struct iocb *list[] = {&poll_in};
    EQ(syscall(SYS_io_submit, context, 1, list), 1);
    p_start(&d, do_send_later, 20);
    EQ(syscall(SYS_io_getevents, context, 1, 1, &event, &limit), 1);
    EQ(event.data, 7);
    EQ(p_finish(&d), 0);
    WANT(d.fd, "late");
    char got[8];
    struct iocb in = {.aio_data = 8, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)d.fd,
                      .aio_buf = (uint64_t)(uintptr_t)got, .aio_nbytes = 4};
    list[0] = &in;
    p_send(&d, "four");
    EQ(syscall(SYS_io_submit, context, 1, list), 1);
    EQ(syscall(SYS_io_getevents, context, 1, 1, &event, &limit), 1);
    EQ(event.res, 4);
    EQ(memcmp(got, "four", 4), 0);
    MUST(syscall(SYS_io_destroy, context));
}

/* ---- Plug-ins ---- */

CASE(plug_in_that_is_bound_past_everything)
{
    struct duo d = duo_open(0), late;
    char path[PATH_MAX + 16], got[16];
    snprintf(path, sizeof path, "%s/deepbound.so", settings.folder);
    void *plugin = dlopen(path, RTLD_NOW | RTLD_DEEPBIND);
    CHECK(plugin, "expected the plug-in, saw %s", dlerror());
    long (*send_by)(int, const void *, unsigned long) = dlsym(plugin, "plugin_send");
    long (*receive_by)(int, void *, unsigned long) = dlsym(plugin, "plugin_receive");
    late = duo_more(&d, COLD); /* one that is made afterwards */
    for (int i = 0; i < 40; i++) {
        const struct duo *one = i % 2 ? &d : &late;
        p_send(one, "to a plug-in");
        EQ(receive_by(one->fd, got, 12), 12);
        EQ(memcmp(got, "to a plug-in", 12), 0);
        EQ(send_by(one->fd, "from a plug-in", 14), 14);
        P_WANT(one, "from a plug-in");
        PUT(one->fd, "and others");
        P_WANT(one, "and others");
    }
}
