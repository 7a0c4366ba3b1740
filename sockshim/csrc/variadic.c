/* execl and its kin take their arguments one by one, which Rust cannot define: they gather them
 * into an array and go on in process.rs. */
#define _GNU_SOURCE
#include <alloca.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int rdsock_is_ours(int fd);
int rdsock_memory_file(void);
int rdsock_write_all(int fd, const char *text, size_t len);
int rdsock_real_vdprintf(int fd, const char *format, va_list ap);

int rdsock_execve(const char *path, char *const argv[], char *const envp[]);
int rdsock_execvp(const char *file, char *const argv[]);
extern char **environ;

/* Gives a new stdio stream `len` bytes as if it had read them from its own descriptor: it reads
 * them from a file in memory, into a buffer that holds all of them. (ungetc would do, but glibc
 * crashes when a stream with pushed-back bytes turns to writing.) The buffer is the stream's until
 * the program ends. */
int rdsock_stdio_take(FILE *file, const char *bytes, size_t len)
{
    int own = file->_fileno, memory, first;
    char *buffer = malloc(len + BUFSIZ);

    memory = rdsock_memory_file();
    if (buffer == NULL || memory < 0 || pwrite(memory, bytes, len, 0) != (ssize_t)len) {
        free(buffer);
        if (memory >= 0)
            close(memory);
        return -1;
    }
    setvbuf(file, buffer, _IOFBF, len + BUFSIZ);
    file->_fileno = memory;
    first = fgetc(file);
    file->_fileno = own;
    close(memory);
    if (first != EOF)
        ungetc(first, file);
    return 0;
}

/* Gathers the arguments from `first` to the null pointer into `argv`, on the caller's stack. */
#define GATHER(argv, ap, first)                                      \
    size_t count = 1;                                                \
    va_start(ap, first);                                             \
    while (va_arg(ap, const char *) != NULL)                         \
        count++;                                                     \
    va_end(ap);                                                      \
    const char **argv = alloca((count + 1) * sizeof(char *));        \
    argv[0] = first;                                                 \
    va_start(ap, first);                                             \
    for (size_t i = 1; i <= count; i++)                              \
        argv[i] = va_arg(ap, const char *)

int rdsock_execl(const char *path, const char *arg, ...)
{
    va_list ap;
    GATHER(argv, ap, arg);
    va_end(ap);
    return rdsock_execve(path, (char *const *)argv, environ);
}

int rdsock_execlp(const char *file, const char *arg, ...)
{
    va_list ap;
    GATHER(argv, ap, arg);
    va_end(ap);
    return rdsock_execvp(file, (char *const *)argv);
}

int rdsock_execle(const char *path, const char *arg, ...)
{
    va_list ap;
    GATHER(argv, ap, arg);
    char *const *envp = va_arg(ap, char *const *);
    va_end(ap);
    return rdsock_execve(path, (char *const *)argv, envp);
}

/* dprintf writes to its fd from inside libc, where the shim does not see it. */
int rdsock_vdprintf(int fd, const char *format, va_list ap)
{
    char *text;
    int len, result;

    if (!rdsock_is_ours(fd))
        return rdsock_real_vdprintf(fd, format, ap);
    len = vasprintf(&text, format, ap);
    if (len < 0)
        return -1;
    result = rdsock_write_all(fd, text, (size_t)len);
    free(text);
    return result;
}

int rdsock_dprintf(int fd, const char *format, ...)
{
    va_list ap;
    int result;

    va_start(ap, format);
    result = rdsock_vdprintf(fd, format, ap);
    va_end(ap);
    return result;
}

int rdsock_vdprintf_chk(int fd, int flag, const char *format, va_list ap)
{
    (void)flag;
    return rdsock_vdprintf(fd, format, ap);
}

int rdsock_dprintf_chk(int fd, int flag, const char *format, ...)
{
    va_list ap;
    int result;

    (void)flag;
    va_start(ap, format);
    result = rdsock_vdprintf(fd, format, ap);
    va_end(ap);
    return result;
}
