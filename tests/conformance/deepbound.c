/* A plug-in that is loaded with RTLD_DEEPBIND: libc's functions come before any preloaded library's in it. */
#include <sys/socket.h>

long plugin_send(int fd, const void *bytes, unsigned long len);
long plugin_receive(int fd, void *bytes, unsigned long len);

long plugin_send(int fd, const void *bytes, unsigned long len)
{
    return send(fd, bytes, len, 0);
}

long plugin_receive(int fd, void *bytes, unsigned long len)
{
    return recv(fd, bytes, len, MSG_WAITALL);
}
