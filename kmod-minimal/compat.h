/* SPDX-License-Identifier: GPL-2.0-only */
/* What Linux 6.1 to 7.x differ in, beside COMPAT_OPS of Kbuild, which looks into the headers. */
#ifndef RDSOCK_COMPAT_H
#define RDSOCK_COMPAT_H

#include <linux/iommu.h>
#include <linux/irqdomain.h>
#include <linux/uaccess.h>
#include <linux/vfio_pci_core.h>
#include "rde.h"

/* 6.3: whether interrupts are isolated became a property of the group. */
#if HAVE_ISOLATED_MSI
#define compat_remapped(dev, group) iommu_group_has_isolated_msi(group)
#else
#define compat_remapped(dev, group) \
	(irq_domain_check_msi_remap() || device_iommu_capable(dev, IOMMU_CAP_INTR_REMAP))
#endif

/* Of BAR0 only what lies behind the management page can be mapped: a sparse area says so. */
static struct {
	struct vfio_info_cap_header header;
	u32 nr_areas, reserved;
	struct vfio_region_sparse_mmap_area area;
} compat_sparse = {
	.header = { VFIO_REGION_INFO_CAP_SPARSE_MMAP, .version = 1 },
	.nr_areas = 1,
	.area = { RDE_REGION_TABLE, RDE_BAR0_SIZE - RDE_REGION_TABLE },
};

#if HAVE_REGION_INFO_CAPS /* 6.19: regions are described here, and not by .ioctl */
#define compat_ioctl vfio_pci_core_ioctl

static inline int compat_region_info(struct vfio_device *core, struct vfio_region_info *info,
				     struct vfio_info_cap *caps)
{
	int ret = vfio_pci_ioctl_get_region_info(core, info, caps);

	if (ret || info->index != VFIO_PCI_BAR0_REGION_INDEX)
		return ret;
	return vfio_info_add_capability(caps, &compat_sparse.header, sizeof(compat_sparse));
}
#else
static inline long compat_ioctl(struct vfio_device *core, unsigned int cmd, unsigned long arg)
{
	struct vfio_region_info info, __user *user = (void __user *)arg;
	const size_t needed = sizeof(info) + sizeof(compat_sparse);
	long ret = vfio_pci_core_ioctl(core, cmd, arg);

	if (ret || cmd != VFIO_DEVICE_GET_REGION_INFO ||
	    copy_from_user(&info, user, sizeof(info)) || info.index != VFIO_PCI_BAR0_REGION_INDEX)
		return ret;
	info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
	info.cap_offset = info.argsz < needed ? 0 : sizeof(info);
	info.argsz = needed;
	if (info.cap_offset && copy_to_user(user + 1, &compat_sparse, sizeof(compat_sparse)))
		return -EFAULT;
	return copy_to_user(user, &info, sizeof(info)) ? -EFAULT : 0;
}
#endif

#endif
