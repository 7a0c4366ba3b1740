/*
 * sendfile from what is not read as a plain file is: the kernel says what comes of it.
 */
#include "sockconf.h"

/* Receives so many bytes, which must all be zero. */
static long do_recv_zeroes(int *fd, void *bytes, size_t len, long count)
{
    (void)bytes, (void)len;
    char block[8192];
    for (long have = 0; have < count;) {
        long most = count - have < (long)sizeof block ? count - have : (long)sizeof block;
        ssize_t n = recv(*fd, block, (size_t)most, 0);
        if (n <= 0)
            return -1;
        for (ssize_t i = 0; i < n; i++)
            if (block[i])
                return -2;
        have += n;
    }
    return 0;
}

static void goes_on(const struct duo *d)
{
    for (int i = 0; i < 3; i++) {
        PUT(d->fd, "goes on");
        P_WANT(d, "goes on");
        p_send(d, "and back");
        WANT(d->fd, "and back");
    }
}

CASE(sendfile_from_what_is_no_plain_file)
{
    static const struct odd {
        const char *path;
        int flags, error;
    } all[] = {
        {"/dev/zero", O_RDONLY, 0},
        {"/dev/null", O_RDONLY, EINVAL},
        {"/proc/self/status", O_RDONLY, EINVAL},
        {"/", O_RDONLY, EINVAL},
        {"/dev/null", O_WRONLY, EBADF},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct duo d = duo_open(0); /* one each: it may leave the rings for this */
        int file = (int)MUST(open(all[i].path, all[i].flags));
        if (all[i].error) {
            ERR(sendfile(d.fd, file, NULL, 8192), all[i].error);
        } else {
            EQ(sendfile(d.fd, file, NULL, 8192), 8192);
            EQ(p_do(&d, do_recv_zeroes, 8192), 0);
        }
        goes_on(&d);
        MUST(close(file));
    }
}

CASE(sendfile_from_a_pipe)
{
    struct duo d = duo_open(0);
    int ends[2];
    off_t at = 0;
    MUST(pipe(ends));
    EQ(write(ends[1], "kept", 4), 4);
    ERR(sendfile(d.fd, ends[0], NULL, 4), EINVAL);
    ERR(sendfile(d.fd, ends[0], &at, 4), ESPIPE);
    goes_on(&d);
    char got[5] = "";
    EQ(read(ends[0], got, 4), 4);
    EQ(memcmp(got, "kept", 4), 0);
}

CASE(sendfile_from_a_file_that_wants_alignment)
{
    enum { SIZE = 64 << 10, BLOCK = 4096 };
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/aligned-%d", settings.folder, (int)getpid());
    int file = (int)MUST(open(path, O_RDWR | O_CREAT | O_EXCL, 0600));
    char *bytes = malloc(SIZE);
    pattern(0, 0, bytes, SIZE);
    EQ(write(file, bytes, SIZE), SIZE);
    EQ(fsync(file), 0);
    MUST(close(file));
    file = open(path, O_RDONLY | O_DIRECT);
    unlink(path);
    if (file < 0) {
        fprintf(stderr, "SKIPPED, NOTHING WAS CHECKED: this file system has no O_DIRECT\n");
        return;
    }
    struct duo d = duo_open(0);
    off_t at = 0;
    PUT(d.fd, "odd"); /* what comes next does not begin at a round position */
    P_WANT(&d, "odd");
    p_start(&d, do_recv_pattern, SIZE);
    while (at < SIZE / 2)
        MUST(sendfile(d.fd, file, &at, BLOCK));
    EQ(at, SIZE / 2);
    MUST(lseek(file, at, SEEK_SET));
    while (at < SIZE)
        at += MUST(sendfile(d.fd, file, NULL, BLOCK));
    EQ(p_finish(&d), 0);
    goes_on(&d);
}
