/*
 * The companion that the exec cases run, once linked dynamically and once statically: copies descriptor 0 to
 * descriptor 1 until EOF, in capitals so that the case sees who answered. Status 0 at EOF.
 */
#include <ctype.h>
#include <unistd.h>

int main(void)
{
    char block[4096];
    ssize_t n;
    while ((n = read(0, block, sizeof block)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            block[i] = (char)toupper((unsigned char)block[i]);
        for (ssize_t done = 0; done < n;) {
            ssize_t out = write(1, block + done, (size_t)(n - done));
            if (out <= 0)
                return 2;
            done += out;
        }
    }
    return n ? 1 : 0;
}
