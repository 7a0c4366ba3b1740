/* execl and its kin take their arguments one by one, which Rust cannot define: they gather them
 * into an array and go on in process.rs. */
#include <alloca.h>
#include <stdarg.h>
#include <stddef.h>

int rdsock_execve(const char *path, char *const argv[], char *const envp[]);
int rdsock_execvp(const char *file, char *const argv[]);
extern char **environ;

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
