/*
 * The runner: picks the cases, runs each in a process group of its own under a time limit, ends whatever it
 * leaves behind, and prints one line a case. Never touches a connection itself.
 */
#include "sockconf.h"
#include <stdarg.h>
#include <sys/prctl.h>

#define DEFAULT_SECONDS 20
#define SLICE_MS 100

struct settings settings = {.warm = 8};
static struct case_def *first, **last = &first;

void case_add(struct case_def *def)
{
    *last = def;
    last = &def->next;
}

/* What the processes of a case write down for the runner; shared with all of them. */
static struct board {
    atomic_int failed;
    char message[1024];
    _Atomic(const char *) where[8]; /* each process's (thread's) last check; the addresses are the same in all */
    atomic_int seats;
    atomic_int pairs, on_rings;
} *board;

static __thread int seat;

void step(const char *here)
{
    if (!seat)
        seat = 1 + atomic_fetch_add(&board->seats, 1);
    if (seat <= 8)
        atomic_store_explicit(&board->where[seat - 1], here, memory_order_relaxed);
}

static const char *base(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

void fail(const char *here, const char *format, ...)
{
    if (atomic_fetch_add(&board->failed, 1) == 0) {
        char text[900];
        va_list list;
        va_start(list, format);
        vsnprintf(text, sizeof text, format, list);
        va_end(list);
        snprintf(board->message, sizeof board->message, "%s (%s)", text, base(here));
    }
    _exit(1);
}

static const char *code_name(int code)
{
    const char *name = strerrorname_np(code);
    return name ? name : "no errno";
}

void check_equal(const char *here, const char *what, long long want, long long got, int code)
{
    if (got == want)
        return;
    if (got == -1)
        fail(here, "%s: expected %lld, saw -1 %s", what, want, code_name(code));
    fail(here, "%s: expected %lld, saw %lld", what, want, got);
}

void check_error(const char *here, const char *what, int want, int other, long long got, int code)
{
    if (got == -1 && (code == want || code == other))
        return;
    if (got == -1)
        fail(here, "%s: expected -1 %s, saw -1 %s", what, code_name(want), code_name(code));
    fail(here, "%s: expected -1 %s, saw %lld", what, code_name(want), got);
}

long long check_good(const char *here, const char *what, long long got, int code)
{
    if (got == -1)
        fail(here, "%s: expected success, saw -1 %s", what, code_name(code));
    return got;
}

void count_pair(bool on_rings)
{
    atomic_fetch_add(&board->pairs, 1);
    if (on_rings)
        atomic_fetch_add(&board->on_rings, 1);
}

/* A case may leave processes in groups of their own behind; they have become our children (subreaper). */
static void end_strays(void)
{
    for (int tries = 0; tries < 50; tries++) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        char path[64], list[4096];
        snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
        FILE *file = fopen(path, "re");
        if (!file)
            return;
        size_t got = fread(list, 1, sizeof list - 1, file);
        fclose(file);
        list[got] = 0;
        if (!got)
            return;
        for (char *at = list, *end; *at; at = end) {
            long pid = strtol(at, &end, 10);
            if (end == at)
                break;
            kill((pid_t)pid, SIGKILL);
        }
        usleep(2000);
    }
}

static void run_child(const struct case_def *def)
{
    setpgid(0, 0);
    seat = 0;
    def->run();
    if (atomic_load(&board->failed))
        _exit(1);
    _exit(0);
}

static void describe_hang(char *out, size_t size, int seconds)
{
    int used = snprintf(out, size, "expected an end, saw a hang of %d s; last checks begun:", seconds);
    for (int i = 0; i < 8 && used < (int)size; i++) {
        const char *here = atomic_load(&board->where[i]);
        if (here)
            used += snprintf(out + used, size - (size_t)used, " %s", base(here));
    }
}

/* Runs one case; false if it failed. */
static bool run(const struct case_def *def)
{
    memset(board->where, 0, sizeof board->where);
    atomic_store(&board->seats, 0);
    atomic_store(&board->failed, 0);
    board->message[0] = 0;
    int seconds = def->seconds ? def->seconds : DEFAULT_SECONDS;
    char verdict[1200] = "";
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) {
        printf("FAIL %s: expected a process, saw fork: %s\n", def->name, strerror(errno));
        return false;
    }
    if (pid == 0)
        run_child(def);
    setpgid(pid, pid);
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    struct pollfd watch = {.fd = pidfd, .events = POLLIN};
    /* Time counts while this process runs: it may be stopped for long, and the case with it. */
    for (int left = seconds * 1000; left > 0 && poll(&watch, 1, SLICE_MS) <= 0; left -= SLICE_MS)
        ;
    int status = 0;
    bool ended = waitpid(pid, &status, WNOHANG) == pid;
    if (!ended)
        describe_hang(verdict, sizeof verdict, seconds);
    kill(-pid, SIGKILL);
    if (!ended)
        waitpid(pid, &status, 0);
    close(pidfd);
    if (atomic_load(&board->failed))
        snprintf(verdict, sizeof verdict, "%s", board->message);
    else if (ended && WIFSIGNALED(status))
        snprintf(verdict, sizeof verdict, "expected a normal end, saw signal %d (%s) after %s", WTERMSIG(status),
                 strsignal(WTERMSIG(status)), board->where[0] ? base(board->where[0]) : "nothing");
    else if (ended && WEXITSTATUS(status) != 0)
        snprintf(verdict, sizeof verdict, "expected status 0, saw %d", WEXITSTATUS(status));
    end_strays();
    if (verdict[0])
        printf("FAIL %s: %s\n", def->name, verdict);
    else
        printf("ok %s\n", def->name);
    fflush(stdout);
    return !verdict[0];
}

static const char usage[] =
    "usage: sockconf [--list] [--only NAME]... [--warm N] [--swap] [--peer process|thread] [--need-rings]\n"
    "  --list         name the cases, run none\n"
    "  --only NAME    run only this case (a trailing * matches any ending); may be given again\n"
    "  --warm N       round trips on each connection before its case starts (8; 0: none)\n"
    "  --swap         the puppet listens, the case connects\n"
    "  --peer KIND    the other end of each connection is a process (the default) or a thread\n"
    "  --need-rings   a warmed connection whose bytes still pass through the kernel fails its case\n";

static bool chosen(const char *name, char **only, int count)
{
    for (int i = 0; i < count; i++) {
        size_t len = strlen(only[i]);
        if (len && only[i][len - 1] == '*' ? !strncmp(name, only[i], len - 1) : !strcmp(name, only[i]))
            return true;
    }
    return count == 0;
}

int main(int argc, char **argv)
{
    char *only[64];
    int picks = 0;
    bool list = false;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--list")) {
            list = true;
        } else if (!strcmp(argv[i], "--only") && *value && picks < 64) {
            only[picks++] = argv[++i];
        } else if (!strcmp(argv[i], "--warm") && *value) {
            settings.warm = atoi(argv[++i]);
        } else if (!strcmp(argv[i], "--swap")) {
            settings.swap = true;
        } else if (!strcmp(argv[i], "--need-rings")) {
            settings.need_rings = true;
        } else if (!strcmp(argv[i], "--peer") && (!strcmp(value, "process") || !strcmp(value, "thread"))) {
            settings.thread_peer = !strcmp(argv[++i], "thread");
        } else {
            fputs(usage, stderr);
            return 2;
        }
    }
    ssize_t length = readlink("/proc/self/exe", settings.folder, sizeof settings.folder - 1);
    if (length > 0)
        *strrchr(settings.folder, '/') = 0;
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED)
        return 2;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_DFL);

    int good = 0, bad = 0, skipped = 0;
    for (struct case_def *def = first; def; def = def->next) {
        if (!chosen(def->name, only, picks))
            continue;
        if (list) {
            puts(def->name);
        } else if (def->root && geteuid() != 0) {
            printf("skip %s: needs root\n", def->name);
            skipped++;
        } else {
            bool threads = settings.thread_peer;
            settings.thread_peer = threads && !def->process;
            if (run(def))
                good++;
            else
                bad++;
            settings.thread_peer = threads;
        }
    }
    if (list)
        return 0;
    printf("%d ok, %d failed, %d skipped; %d connections warmed up, %d on rings\n", good, bad, skipped,
           atomic_load(&board->pairs), atomic_load(&board->on_rings));
    return bad || good + skipped == 0;
}
