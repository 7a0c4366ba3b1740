// The refusals of kmod-minimal, tried as an attacker would: attacker BDF [iommufd]. The device is bound to the module, which was
// loaded with group=4242. Run as root; some tests give that up in a child. It is opened by its group, or by iommufd.
//
// attacker BDF plain: what there is instead when it is bound to the kernel's own vfio-pci.
// attacker BDF open: says whether it can be opened. attacker BDF hold: opens it, and waits.
#include <grp.h>
#include <linux/capability.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "vfio.h"

#define GROUP 4242
#define STRANGER 1000

#define PAGE_WQ_ADDR 0x010
#define PAGE_DEVICE_STATUS 0x180
#define PAGE_WINDOW 0x800
#define LINK_UP 2

static const char *bdf;
static struct device dev;

static char *setting(const char *name)
{
    static char path[PATH_MAX];
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/%s", bdf, name);
    return path;
}

static long store(const char *name, const char *value)
{
    int fd = open(setting(name), O_WRONLY);
    if (fd < 0)
        return -1;
    long n = write(fd, value, strlen(value));
    int error = errno;
    close(fd);
    errno = error;
    return n;
}

static bool holds(const char *name, const char *wanted)
{
    char is[256] = "";
    int fd = open(setting(name), O_RDONLY);
    ssize_t n = read(fd, is, sizeof(is) - 1);
    close(fd);
    is[n > 0 ? n - 1 : 0] = 0;
    return check(!strcmp(is, wanted), "%s is \"%s\", not \"%s\"", name, is, wanted);
}

// Does something in a child without privilege, as a member of a group.
static void as_stranger(gid_t group, void (*what)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (setgroups(0, NULL) || setgid(group) || setuid(STRANGER))
            exit(99);
        failed = 0;
        what();
        fflush(stdout);
        _exit(failed);
    }
    int status;
    waitpid(child, &status, 0);
    if (status != 0) {
        failed++;
        if (!WIFEXITED(status) || WEXITSTATUS(status) == 99)
            check(false, "the child ended with %#x", status);
    }
}

// As root, but without CAP_NET_ADMIN: root of a container.
static void without_net_admin(void (*what)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct data[2];
        if (syscall(SYS_capget, &header, data))
            exit(99);
        data[0].effective &= ~(1u << CAP_NET_ADMIN);
        data[0].permitted &= ~(1u << CAP_NET_ADMIN);
        if (syscall(SYS_capset, &header, data))
            exit(99);
        failed = 0;
        what();
        fflush(stdout);
        _exit(failed);
    }
    int status;
    waitpid(child, &status, 0);
    if (status != 0) {
        failed++;
        if (!WIFEXITED(status) || WEXITSTATUS(status) == 99)
            check(false, "the child ended with %#x", status);
    }
}

static void is_refused(void)
{
    struct device d;
    REFUSED(open_device(&d, bdf), EPERM);
}

static void is_opened(void)
{
    struct device d;
    if (check(!open_device(&d, bdf), "a member of the group cannot open it")) {
        uint32_t node = 0;
        check(pread(d.fd, &node, 4, RDE_NODE_ID) == 4 && node == 1, "it is node %u", node);
        close_device(&d);
    }
}

static void settings_are_refused(void)
{
    REFUSED(store("node_id", "2"), EPERM);
    REFUSED(store("peers", "1-1023"), EPERM);
}

static void settings_have_permissions(void)
{
    REFUSED(store("node_id", "2"), EACCES);
    REFUSED(store("peers", "1-1023"), EACCES);
}

static void is_taken(void)
{
    struct device d;
    REFUSED(open_device(&d, bdf), by_iommufd ? EINVAL : EBUSY);
}

// STATUS says whether the device is a node of the fabric; read on a queue page.
static bool link_up(void)
{
    volatile uint8_t *page = map(&dev, 2, 0, 4096);
    if (!check(page != MAP_FAILED, "BAR2 cannot be mapped"))
        return false;
    bool up = false;
    for (int i = 0; i < 500 && !up; i++, usleep(10000))
        up = *(volatile uint32_t *)(page + PAGE_DEVICE_STATUS) & LINK_UP;
    munmap((void *)page, 4096);
    return up;
}

static void function_level_reset(void)
{
    int express = capability(&dev, 0x10);
    if (check(express, "no PCI Express capability"))
        config_write(&dev, express + 8, config_read(&dev, express + 8, 2) | 0x8000, 2);
}

static void no_node(void)
{
    test("module_gives_nobody_a_device_without_node_id");
    int before = failed;
    struct device d;
    REFUSED(open_device(&d, bdf), ENXIO);
    check(store("node_id", "1023") > 0, "node_id");
    check(!open_device(&d, bdf), "node 1023");
    close_device(&d);
    check(store("node_id", "1024") > 0, "node_id");
    REFUSED(open_device(&d, bdf), ENXIO);
    passed(before);
}

static void settings(void)
{
    test("module_lets_only_net_admin_set");
    int before = failed;
    check(store("node_id", "1") > 0 && store("peers", "1,2\n") > 0, "settings");
    without_net_admin(settings_are_refused);
    as_stranger(STRANGER, settings_have_permissions);
    holds("node_id", "1");
    holds("peers", "1-2");
    // The kernel parses: what is no list of node ids is refused.
    REFUSED(store("peers", "1,x"), EINVAL);
    REFUSED(store("peers", "1024"), ERANGE);
    holds("peers", "1-2");
    passed(before);
}

static void openers(void)
{
    test("module_checks_who_opens");
    int before = failed;
    const char *path = node_of(bdf);
    // Somebody was careless with the node.
    check(!chmod(path, 0666) && !chmod(container_node(), 0666), "chmod");
    as_stranger(STRANGER, is_refused);
    without_net_admin(is_refused);
    passed(before);

    test("module_lets_the_group_open_without_privilege");
    before = failed;
    check(!chmod(path, 0660) && !chown(path, 0, GROUP), "chown");
    as_stranger(GROUP, is_opened);
    passed(before);
}

static void owners(void)
{
    test("one_owner_at_a_time");
    int before = failed;
    is_taken();
    as_stranger(GROUP, is_taken);
    REFUSED(store("node_id", "2"), EBUSY);
    REFUSED(store("peers", "1-1023"), EBUSY);
    passed(before);
}

static void mappings(void)
{
    test("module_refuses_maps_of_the_management_page");
    int before = failed;
    decode(&dev, true);
    for (uint64_t at = 0; at < RDE_REGION_TABLE; at += 0x1000)
        REFUSED(map(&dev, 0, at, 0x1000), EPERM);
    REFUSED(map(&dev, 0, 0, RDE_BAR0_SIZE), EPERM);
    REFUSED(map(&dev, 0, RDE_REGION_TABLE - 0x1000, 0x2000), EPERM);
    REFUSED(mmap(NULL, 0x1000, PROT_READ, MAP_PRIVATE, dev.fd, 0), EPERM);
    // The region table is the driver's; a mapping of it does not grow.
    volatile uint8_t *table = map(&dev, 0, RDE_REGION_TABLE, 0x10000);
    if (check(table != MAP_FAILED, "the region table cannot be mapped")) {
        *(volatile uint64_t *)(table + 0x10) = 0x1234000;
        check(*(volatile uint64_t *)(table + 0x10) == 0x1234000, "the region table does not hold what is stored");
        check(mremap((void *)table, 0x10000, 0x20000, MREMAP_MAYMOVE) == MAP_FAILED, "a mapping grew");
        munmap((void *)table, 0x10000);
    }
    struct {
        struct vfio_region_info info;
        struct vfio_region_info_cap_sparse_mmap sparse;
        struct vfio_region_sparse_mmap_area area;
    } region = {.info = {.argsz = sizeof(region), .index = 0}};
    check(!ioctl(dev.fd, VFIO_DEVICE_GET_REGION_INFO, &region), "VFIO_DEVICE_GET_REGION_INFO");
    check(region.info.size == RDE_BAR0_SIZE && region.info.offset == 0 && region.info.cap_offset == sizeof(region.info) &&
              region.sparse.header.id == VFIO_REGION_INFO_CAP_SPARSE_MMAP && region.sparse.header.next == 0 &&
              region.sparse.nr_areas == 1 && region.area.offset == RDE_REGION_TABLE &&
              region.area.size == RDE_BAR0_SIZE - RDE_REGION_TABLE,
          "BAR0 is described wrongly");
    region.info.argsz = sizeof(region.info);
    memset(&region.sparse, 0x55, sizeof(region.sparse));
    check(!ioctl(dev.fd, VFIO_DEVICE_GET_REGION_INFO, &region) && region.info.argsz == sizeof(region) &&
              region.info.cap_offset == 0 && region.sparse.nr_areas == 0x55555555,
          "the size that the description needs is not told, or was exceeded");
    passed(before);
}

static void writes(void)
{
    test("module_refuses_writes_to_the_management_page");
    int before = failed;
    uint64_t all = ~0ull;
    static const int at[] = {0,          1,           RDE_NODE_ID, RDE_CONTROL,           RDE_CONTROL + 2,
                             RDE_PEERS, RDE_PEERS + 120, 0xfff,   0x1000,                RDE_REGION_TABLE - 1};
    for (unsigned i = 0; i < sizeof(at) / sizeof(at[0]); i++)
        for (int bytes = 1; bytes <= 8; bytes *= 2)
            REFUSED(pwrite(dev.fd, &all, bytes, at[i]), EPERM);
    // One that begins before the region table and ends in it.
    static char much[0x20000];
    REFUSED(pwrite(dev.fd, much, sizeof(much), 0), EPERM);
    REFUSED(pwrite(dev.fd, much, 16, RDE_REGION_TABLE - 8), EPERM);
    check(link_up(), "it is no node any more");
    passed(before);
}

static void reads(void)
{
    test("module_answers_reads_from_a_copy");
    int before = failed;
    uint64_t magic = 0;
    uint32_t word = 0;
    check(pread(dev.fd, &magic, 8, RDE_MAGIC) == 8 && magic == RDE_MAGIC_VALUE, "MAGIC is %#lx", magic);
    check(pread(dev.fd, &word, 4, RDE_VERSION) == 4 && word >> 16 == RDE_MAJOR, "VERSION is %#x", word);
    check(pread(dev.fd, &word, 4, RDE_QUEUE_SETS) == 4 && word >= 1 && word <= 256, "QUEUE_SETS is %u", word);
    check(pread(dev.fd, &word, 4, RDE_MAX_NODE) == 4 && word == 1023, "MAX_NODE is %u", word);
    check(pread(dev.fd, &word, 4, RDE_KEPT) == 4 && word == 1, "KEPT is %u", word);
    check(pread(dev.fd, &word, 4, RDE_NODE_ID) == 4 && word == 1, "NODE_ID is %u", word);
    char much[4096];
    check(pread(dev.fd, much, sizeof(much), 0) == RDE_SHOWN, "a long read gives more than is shown");
    check(pread(dev.fd, much, sizeof(much), RDE_NODE_ID) == 4, "a long read gives more than is shown");
    static const int at[] = {RDE_SHOWN, RDE_CONTROL, RDE_PEERS, 0x200, 0x1000, RDE_REGION_TABLE - 1};
    for (unsigned i = 0; i < sizeof(at) / sizeof(at[0]); i++)
        REFUSED(pread(dev.fd, much, 4, at[i]), EPERM);
    passed(before);
}

static void by_the_kernel(void)
{
    test("module_refuses_stores_by_eventfd_and_features");
    int before = failed;
    int event = eventfd(0, EFD_CLOEXEC);
    static const int at[] = {RDE_NODE_ID, RDE_PEERS, RDE_REGION_TABLE};
    for (unsigned i = 0; i < sizeof(at) / sizeof(at[0]); i++) {
        struct {
            struct vfio_device_ioeventfd order;
        } io = {{.argsz = sizeof(io), .flags = VFIO_DEVICE_IOEVENTFD_32, .offset = at[i], .data = 7, .fd = event}};
        REFUSED(ioctl(dev.fd, VFIO_DEVICE_IOEVENTFD, &io), EPERM);
    }
    close(event);
    // Low power, with and without wake-up, its exit, export as a DMA buffer: none is there.
    for (int feature = 3; feature < 16; feature++) {
        uint64_t room[8] = {0};
        struct vfio_device_feature *ask = (void *)room;
        ask->argsz = sizeof(room);
        ask->flags = feature | VFIO_DEVICE_FEATURE_SET;
        check(ioctl(dev.fd, VFIO_DEVICE_FEATURE, ask) == -1, "feature %d is there", feature);
    }
    passed(before);
}

static void resets(void)
{
    test("module_keeps_the_identity_over_resets");
    int before = failed;
    check(link_up(), "it is no node");
    check(!ioctl(dev.fd, VFIO_DEVICE_RESET), "VFIO_DEVICE_RESET");
    check(link_up(), "it is no node after VFIO_DEVICE_RESET");
    function_level_reset();
    check(link_up(), "it is no node after a function level reset");
    // With the BARs switched off, so that the module's stores would go nowhere.
    decode(&dev, false);
    function_level_reset();
    decode(&dev, true);
    check(link_up(), "it is no node after a reset with memory switched off");
    int fd = open(setting("reset"), O_WRONLY);
    check(write(fd, "1", 1) == 1, "reset by sysfs");
    close(fd);
    decode(&dev, true);
    check(link_up(), "it is no node after a reset by sysfs");
    uint32_t node = 0;
    check(pread(dev.fd, &node, 4, RDE_NODE_ID) == 4 && node == 1, "NODE_ID is %u", node);
    passed(before);
}

static void leave_traces(void)
{
    decode(&dev, true);
    volatile uint8_t *page = map(&dev, 2, 0, 4096), *table = map(&dev, 0, RDE_REGION_TABLE, 4096);
    if (!check(page != MAP_FAILED && table != MAP_FAILED, "BARs cannot be mapped"))
        return;
    *(volatile uint64_t *)(page + PAGE_WQ_ADDR) = 0xdead000;
    *(volatile uint64_t *)(page + PAGE_WINDOW + 16) = 0x736563726574; // a secret
    *(volatile uint64_t *)(table + 0x08) = 0xdead000;
    check(*(volatile uint64_t *)(page + PAGE_WQ_ADDR) == 0xdead000, "WQ_ADDR does not hold what is stored");
    check(*(volatile uint64_t *)(table + 0x08) == 0xdead000, "REGION_ADDR does not hold what is stored");
    munmap((void *)page, 4096);
    munmap((void *)table, 4096);
}

static void next_owner(void)
{
    test("module_resets_between_owners");
    int before = failed;
    leave_traces();
    close_device(&dev);
    if (!check(!open_device(&dev, bdf), "it cannot be opened again"))
        return;
    decode(&dev, true);
    volatile uint8_t *page = map(&dev, 2, 0, 4096), *table = map(&dev, 0, RDE_REGION_TABLE, 4096);
    check(*(volatile uint64_t *)(page + PAGE_WQ_ADDR) == 0, "the last owner's WQ_ADDR");
    check(*(volatile uint64_t *)(page + PAGE_WINDOW + 16) == 0, "the last owner's message");
    check(*(volatile uint64_t *)(table + 0x08) == 0, "the last owner's REGION_ADDR");
    check(link_up(), "it is no node");
    passed(before);
}

// That the tests above can fail: the same device without the module.
static void plain(void)
{
    test("plain_vfio_pci_protects_nothing");
    int before = failed;
    if (!check(!open_device(&dev, bdf), "it cannot be opened"))
        return;
    decode(&dev, true);
    volatile uint8_t *page = map(&dev, 0, 0, RDE_BAR0_SIZE);
    if (!check(page != MAP_FAILED, "BAR0 cannot be mapped"))
        return;
    check(*(volatile uint32_t *)(page + RDE_KEPT) == 0, "somebody keeps the page");
    // The module has left nothing behind.
    check(*(volatile uint32_t *)(page + RDE_NODE_ID) == 0, "it has a node id");
    check(*(volatile uint64_t *)(page + RDE_PEERS) == 0, "it has peers");
    *(volatile uint32_t *)(page + RDE_NODE_ID) = 77;
    check(*(volatile uint32_t *)(page + RDE_NODE_ID) == 77, "it has not become node 77");
    close_device(&dev);
    passed(before);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    bdf = argv[1];
    by_iommufd = argc > 2 && !strcmp(argv[2], "iommufd");
    argv += by_iommufd;
    argc -= by_iommufd;
    if (argc > 2 && !strcmp(argv[2], "plain")) {
        plain();
        return failed != 0;
    }
    if (argc > 2) {
        puts(open_device(&dev, bdf) ? strerror(errno) : "open");
        if (!strcmp(argv[2], "hold"))
            pause();
        return 0;
    }
    no_node();
    settings();
    openers();
    test("module_gives_the_device_out");
    if (!check(!open_device(&dev, bdf), "it cannot be opened"))
        return 1;
    passed(failed);
    owners();
    mappings();
    writes();
    reads();
    by_the_kernel();
    resets();
    next_owner();
    close_device(&dev);
    return failed != 0;
}
