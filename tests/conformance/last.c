/* A library of mate's that sends when it is unloaded, which is after all that the program itself does. */
#include <string.h>
#include <sys/socket.h>

static int farewell_fd = -1;
void last_words(int fd);

void last_words(int fd)
{
    farewell_fd = fd;
}

__attribute__((destructor)) static void unloaded(void)
{
    const char *words = "from a destructor";
    if (farewell_fd >= 0 && send(farewell_fd, words, strlen(words), 0) < 0)
        farewell_fd = -1;
}
