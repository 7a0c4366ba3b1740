/* A program that connects to a port of this host, says which connection it has, and waits; or one that
   listens at an address. It knows nothing of rdsock. Usage: victim PORT [undumpable], victim listen ADDRESS */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

static int say_listening(const char *address)
{
	struct sockaddr_in own = { .sin_family = AF_INET };
	socklen_t length = sizeof own;
	unsigned long long cookie = 0, netns = 0;
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	inet_pton(AF_INET, address, &own.sin_addr);
	if (bind(fd, (struct sockaddr *)&own, length) || listen(fd, 16) ||
	    getsockname(fd, (struct sockaddr *)&own, &length))
		return 1;
	length = sizeof cookie;
	getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &length);
	length = sizeof netns;
	getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &netns, &length);
	printf("\n@listening %d %llu %llu %d\n", fd, cookie, netns, ntohs(own.sin_port));
	fflush(stdout);
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = { .sin_family = AF_INET }, own;
	socklen_t length = sizeof own;
	unsigned long long cookie = 0, netns = 0;
	int fd;

	alarm(60);
	if (!strcmp(argv[1], "listen"))
		return say_listening(argv[2]);
	if (argc > 2)
		prctl(PR_SET_DUMPABLE, 0);
	to.sin_port = htons(atoi(argv[1]));
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) ||
	    getsockname(fd, (struct sockaddr *)&own, &length))
		return 1;
	length = sizeof cookie;
	getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &length);
	length = sizeof netns;
	getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &netns, &length);
	printf("\n@connected %d %llu %llu %d %d %d %d 0\n", fd, cookie, netns, ntohs(own.sin_port),
	       atoi(argv[1]), geteuid(), getegid());
	fflush(stdout);
	for (;;)
		pause();
}
