/* What each thread keeps for itself. */
#include <stdint.h>

/* Laid out when the library is loaded, so that a use is no call into the loader, which may allocate. */
static _Thread_local uint64_t name __attribute__((tls_model("initial-exec")));

uint64_t *rdsock_thread_name(void);

uint64_t *rdsock_thread_name(void)
{
    return &name;
}
