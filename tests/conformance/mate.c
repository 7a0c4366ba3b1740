/*
 * The companion of the cases about processes: takes a connection over by a number that stdio does not use.
 *
 *   mate echo FD         sends back what comes, in capitals, until EOF
 *   mate numbers FD...   sends on each descriptor its own number, and ends
 *   mate words FD        sends from main, from a handler of atexit, and from a library's destructor
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

void last_words(int fd);

static int said_fd;

static int say(int fd, const char *words)
{
    size_t len = strlen(words);
    return send(fd, words, len, 0) == (ssize_t)len ? 0 : 2;
}

static void at_the_end(void)
{
    say(said_fd, "from atexit, ");
}

static int echo(int fd)
{
    char block[4096];
    ssize_t n;
    while ((n = recv(fd, block, sizeof block, 0)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            block[i] = (char)toupper((unsigned char)block[i]);
        if (send(fd, block, (size_t)n, 0) != n)
            return 2;
    }
    return n ? 1 : 0;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 9;
    int fd = atoi(argv[2]);
    if (!strcmp(argv[1], "echo"))
        return echo(fd);
    if (!strcmp(argv[1], "numbers")) {
        int result = 0;
        for (int i = 2; i < argc; i++)
            result |= say(atoi(argv[i]), argv[i]);
        return result;
    }
    said_fd = fd;
    atexit(at_the_end);
    last_words(fd);
    return say(fd, "from main, ");
}
