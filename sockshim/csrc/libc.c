/* What the shim needs of libc that not each libc has: weak, so that a program of an older glibc, or of another libc,
 * starts all the same. */
#include <stddef.h>

extern void *dlsym(void *handle, const char *name) __attribute__((weak));
/* In glibc before 2.34, where dlsym is in a library of its own, which is not in every program. */
extern void *__libc_dlsym(void *handle, const char *name) __attribute__((weak));
extern void *__libc_dlopen_mode(const char *name, int mode) __attribute__((weak));

extern const char *gnu_get_libc_version(void) __attribute__((weak));
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *) __attribute__((weak));
extern int __cxa_atexit(void (*)(void *), void *, void *) __attribute__((weak));
extern unsigned long getauxval(unsigned long) __attribute__((weak));
extern void __chk_fail(void) __attribute__((weak, noreturn));

/* What the compiler names as the handler of unwinding, which the shim never does. For itself alone: a program may have one
 * of this name. Weak, for the shim's unit tests, which have the standard library's. */
__attribute__((weak, visibility("hidden"))) void rust_eh_personality(void)
{
    __builtin_trap();
}

void *rdsock_dlsym(void *handle, const char *name)
{
    enum { LAZY = 1, NO_LOAD = 4 };
    const unsigned own = 0x80000000; /* __RTLD_DLOPEN */
    void *found;

    if (dlsym != NULL) {
        found = dlsym(handle, name);
        __asm__ volatile("" : "+r"(found)); /* no jump: dlsym looks who has called it */
        return found;
    }
    if (__libc_dlsym == NULL || __libc_dlopen_mode == NULL)
        return NULL;
    handle = __libc_dlopen_mode("libc.so.6", (int)(LAZY | NO_LOAD | own));
    return handle == NULL ? NULL : __libc_dlsym(handle, name);
}

/* Copies until libc's function is known. */
static void *copy_slowly(void *to, const void *from, size_t len)
{
    unsigned char *at = to;
    const unsigned char *bytes = from;

    for (size_t i = 0; i < len; i++) {
        at[i] = bytes[i];
        __asm__ volatile("" ::: "memory"); /* no call of memcpy */
    }
    return to;
}

__attribute__((visibility("hidden"))) void *(*rdsock_copy)(void *, const void *, size_t) = copy_slowly;

/* For the shim alone. By its bare name it would get glibc's oldest memcpy, which is made for no processor in particular:
 * names without a version mean the first one. */
#if defined(__x86_64__)
__asm__(".pushsection .text; .globl memcpy; .hidden memcpy; .type memcpy, @function\n"
        "memcpy: jmp *rdsock_copy(%rip)\n"
        ".size memcpy, . - memcpy; .popsection");
#else
__attribute__((visibility("hidden"))) void *memcpy(void *restrict to, const void *restrict from, size_t len)
{
    return rdsock_copy(to, from, len);
}
#endif

/* Finds what copies best here. */
void rdsock_find_memcpy(void)
{
    void *found = rdsock_dlsym(NULL, "memcpy"); /* RTLD_DEFAULT */

    if (found != NULL)
        rdsock_copy = (void *(*)(void *, const void *, size_t))found;
}

/* Whether this is the libc that the shim was made for. */
int rdsock_is_glibc(void)
{
    return gnu_get_libc_version != NULL;
}

/* Whether the program was given rights that its caller lacks, so that it must not do what the environment says. The loader
 * takes LD_PRELOAD away from it, but not what /etc/ld.so.preload names. */
int rdsock_is_privileged(void)
{
    enum { SECURE = 23 }; /* AT_SECURE */

    return getauxval != NULL && getauxval(SECURE) != 0;
}

/* pthread_atfork; glibc links that into each library, with this underneath. */
void rdsock_follow_forks(void (*before)(void), void (*in_parent)(void), void (*in_child)(void))
{
    if (__register_atfork != NULL)
        __register_atfork(before, in_parent, in_child, NULL);
}

/* Has `last` called when the program ends by exit: as no library's own, so after all that was registered since, and
 * after every library's destructors. */
int rdsock_at_exit(void (*last)(void *))
{
    return __cxa_atexit == NULL ? -1 : __cxa_atexit(last, NULL, NULL);
}

/* A buffer of the program's overflows: the end of it, as glibc's. */
void rdsock_overflow(void)
{
    if (__chk_fail != NULL)
        __chk_fail();
    __builtin_trap();
}
