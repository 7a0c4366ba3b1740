// Devices through the kernel's VFIO, with nothing of rdsock's own code: what an attacker has.
#pragma once
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/vfio.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../kmod-minimal/rde.h"

// A test prints one line, "TEST name ok" or "TEST name FAILED: why". The harness knows all names.
static const char *testing = "";
static int failed;

static inline void test(const char *name)
{
    testing = name;
}

__attribute__((format(printf, 2, 3))) static inline bool check(bool holds, const char *what, ...)
{
    if (!holds) {
        va_list list;
        va_start(list, what);
        printf("TEST %s FAILED: ", testing);
        vprintf(what, list);
        printf(" (errno %d, %s)\n", errno, strerror(errno));
        va_end(list);
        failed++;
    }
    return holds;
}

// A system call that must fail so.
#define REFUSED(call, code)                                                                                            \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long got_ = (long)(call);                                                                                      \
        check(got_ == -1 && errno == (code), "%s gave %ld, not " #code, #call, got_);                                  \
    } while (0)

static inline void passed(int before)
{
    if (failed == before)
        printf("TEST %s ok\n", testing);
    fflush(stdout);
}

// Whether devices are opened by a character device of their own and iommufd, or by group and container.
static bool by_iommufd;

// Of linux/vfio.h and linux/iommufd.h, where they are as new as that.
struct bind_iommufd {
    uint32_t argsz, flags;
    int32_t iommufd;
    uint32_t out_devid;
};
struct attach_iommufd {
    uint32_t argsz, flags, pt_id;
};
struct ioas_alloc {
    uint32_t size, flags, out_ioas_id;
};
#define BIND_IOMMUFD _IO(VFIO_TYPE, VFIO_BASE + 18)
#define ATTACH_IOMMUFD _IO(VFIO_TYPE, VFIO_BASE + 19)
#define IOAS_ALLOC _IO(';', 0x81)

struct device {
    int container, group, fd;
};

static inline int group_of(const char *bdf)
{
    char link[PATH_MAX], target[PATH_MAX];
    snprintf(link, sizeof(link), "/sys/bus/pci/devices/%s/iommu_group", bdf);
    ssize_t n = readlink(link, target, sizeof(target) - 1);
    if (n < 0)
        return -1;
    target[n] = 0;
    return atoi(strrchr(target, '/') + 1);
}

// The file that a device is opened by, and the one that its address space comes from.
static inline const char *node_of(const char *bdf)
{
    static char path[PATH_MAX];
    if (!by_iommufd) {
        snprintf(path, sizeof(path), "/dev/vfio/%d", group_of(bdf));
        return path;
    }
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/vfio-dev", bdf);
    DIR *dir = opendir(path);
    strcpy(path, "there is no vfio-dev");
    for (struct dirent *entry; dir && (entry = readdir(dir));)
        if (entry->d_name[0] == 'v')
            snprintf(path, sizeof(path), "/dev/vfio/devices/%s", entry->d_name);
    if (dir)
        closedir(dir);
    return path;
}

static inline const char *container_node(void)
{
    return by_iommufd ? "/dev/iommu" : "/dev/vfio/vfio";
}

static inline void close_device(struct device *d)
{
    // The device first: a group goes with its devices.
    for (int *fd = &d->fd;; fd = fd == &d->fd ? &d->group : &d->container) {
        if (*fd >= 0)
            close(*fd);
        *fd = -1;
        if (fd == &d->container)
            break;
    }
}

static inline void open_by_group(struct device *d, const char *bdf)
{
    d->group = open(node_of(bdf), O_RDWR);
    if (d->group >= 0 && !ioctl(d->group, VFIO_GROUP_SET_CONTAINER, &d->container) &&
        !ioctl(d->container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
        d->fd = ioctl(d->group, VFIO_GROUP_GET_DEVICE_FD, bdf);
}

static inline void open_by_iommufd(struct device *d, const char *bdf)
{
    struct bind_iommufd bind = {.argsz = sizeof(bind), .iommufd = d->container};
    struct ioas_alloc ioas = {.size = sizeof(ioas)};
    struct attach_iommufd attach = {.argsz = sizeof(attach)};
    d->fd = open(node_of(bdf), O_RDWR);
    if (d->fd < 0)
        return;
    if (!ioctl(d->fd, BIND_IOMMUFD, &bind) && !ioctl(d->container, IOAS_ALLOC, &ioas)) {
        attach.pt_id = ioas.out_ioas_id;
        if (!ioctl(d->fd, ATTACH_IOMMUFD, &attach))
            return;
    }
    int error = errno;
    close(d->fd);
    d->fd = -1;
    errno = error;
}

// -1 and errno as the step that failed left it.
static inline int open_device(struct device *d, const char *bdf)
{
    d->container = open(container_node(), O_RDWR);
    d->group = d->fd = -1;
    if (d->container >= 0)
        (by_iommufd ? open_by_iommufd : open_by_group)(d, bdf);
    if (d->fd < 0) {
        int error = errno;
        close_device(d);
        errno = error;
        return -1;
    }
    return 0;
}

#define REGION(index) ((uint64_t)(index) << 40)

static inline uint32_t config_read(const struct device *d, int at, int bytes)
{
    uint32_t value = 0;
    if (pread(d->fd, &value, bytes, REGION(VFIO_PCI_CONFIG_REGION_INDEX) + at) != bytes)
        check(false, "read of configuration space at %#x", at);
    return value;
}

static inline void config_write(const struct device *d, int at, uint32_t value, int bytes)
{
    if (pwrite(d->fd, &value, bytes, REGION(VFIO_PCI_CONFIG_REGION_INDEX) + at) != bytes)
        check(false, "write to configuration space at %#x", at);
}

// Offset of a capability, 0 where there is none.
static inline int capability(const struct device *d, uint8_t id)
{
    int at = config_read(d, 0x34, 1);
    for (int i = 0; at && i < 48; i++, at = config_read(d, at + 1, 1))
        if (config_read(d, at, 1) == id)
            return at;
    return 0;
}

// Memory and bus master on, or off.
static inline void decode(const struct device *d, bool on)
{
    uint32_t command = config_read(d, 4, 2) & ~6u;
    config_write(d, 4, on ? command | 6 : command, 2);
}

static inline void *map(const struct device *d, int region, uint64_t at, size_t len)
{
    return mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, d->fd, REGION(region) + at);
}
