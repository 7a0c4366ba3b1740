/*
 * deny ERRNO CALL,CALL,... PROGRAM [ARGUMENT...]: runs a program under a filter that answers these system calls (by
 * number) with an error, as profiles of containers do with calls that they do not know.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MOST 32

int main(int argc, char **argv)
{
    struct sock_filter code[2 * MOST + 2];
    unsigned short len = 0;
    if (argc < 4)
        return 9;
    unsigned error = (unsigned)atoi(argv[1]);
    code[len++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (char *word = strtok(argv[2], ","); word && len < 2 * MOST; word = strtok(NULL, ",")) {
        code[len++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)atoi(word), 0, 1);
        code[len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
    }
    code[len++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = len, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
        perror("deny");
        return 9;
    }
    execvp(argv[3], argv + 3);
    perror(argv[3]);
    return 9;
}
