/* SPDX-License-Identifier: GPL-2.0-only */
/* What Linux 6.1 to 7.x differ in. Kbuild looks into the headers: distributions backport. */
#ifndef RDSOCK_COMPAT_H
#define RDSOCK_COMPAT_H

#include <linux/iommu.h>
#include <linux/irqdomain.h>
#include <linux/uaccess.h>
#include <linux/vfio_pci_core.h>
#include "rde.h"

/* 6.3: whether interrupts are isolated became a property of the group. */
static inline bool compat_remapped(struct device *dev, struct iommu_group *group)
{
#ifdef HAVE_ISOLATED_MSI
	return iommu_group_has_isolated_msi(group);
#else
	return irq_domain_check_msi_remap() || device_iommu_capable(dev, IOMMU_CAP_INTR_REMAP);
#endif
}

/* Of BAR0 only what lies behind the management page can be mapped: a sparse area says so. */
struct compat_sparse {
	struct vfio_info_cap_header header;
	u32 nr_areas, reserved;
	struct vfio_region_sparse_mmap_area area;
};

#define COMPAT_SPARSE {							\
	.header = { VFIO_REGION_INFO_CAP_SPARSE_MMAP, .version = 1 },	\
	.nr_areas = 1,							\
	.area = { RDE_REGION_TABLE, RDE_BAR0_SIZE - RDE_REGION_TABLE } }

#ifdef HAVE_REGION_INFO_CAPS /* 6.19: regions are described here, and not by .ioctl */
static inline int compat_region_info(struct vfio_device *core, struct vfio_region_info *info,
				     struct vfio_info_cap *caps)
{
	struct compat_sparse sparse = COMPAT_SPARSE;
	int ret = vfio_pci_ioctl_get_region_info(core, info, caps);

	if (!ret && info->index == VFIO_PCI_BAR0_REGION_INDEX)
		ret = vfio_info_add_capability(caps, &sparse.header, sizeof(sparse));
	return ret;
}

#define compat_ioctl vfio_pci_core_ioctl
#define COMPAT_REGION_INFO .get_region_info_caps = compat_region_info,
#else
static inline long compat_ioctl(struct vfio_device *core, unsigned int cmd, unsigned long arg)
{
	struct vfio_region_info asked;
	struct {
		struct vfio_region_info info;
		struct compat_sparse sparse;
	} reply = {
		.info = {
			.argsz = sizeof(reply),
			.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE |
				 VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS,
			.size = RDE_BAR0_SIZE,
		},
		.sparse = COMPAT_SPARSE,
	};

	if (cmd != VFIO_DEVICE_GET_REGION_INFO ||
	    copy_from_user(&asked, (void __user *)arg, sizeof(asked)) ||
	    asked.index != VFIO_PCI_BAR0_REGION_INDEX || asked.argsz < sizeof(asked))
		return vfio_pci_core_ioctl(core, cmd, arg);
	if (asked.argsz >= sizeof(reply))
		reply.info.cap_offset = sizeof(reply.info);
	return copy_to_user((void __user *)arg, &reply, min_t(size_t, asked.argsz, sizeof(reply))) ?
		-EFAULT : 0;
}

#define COMPAT_REGION_INFO
#endif

#ifdef HAVE_BIND_IOMMUFD /* 6.2 */
#define COMPAT_IOMMUFD						\
	.bind_iommufd = vfio_iommufd_physical_bind,		\
	.unbind_iommufd = vfio_iommufd_physical_unbind,		\
	.attach_ioas = vfio_iommufd_physical_attach_ioas,
#else
#define COMPAT_IOMMUFD
#endif
#ifdef HAVE_DETACH_IOAS /* 6.6 */
#define COMPAT_DETACH .detach_ioas = vfio_iommufd_physical_detach_ioas,
#else
#define COMPAT_DETACH
#endif
#ifdef HAVE_MATCH_TOKEN /* 6.18 */
#define COMPAT_MATCH .match_token_uuid = vfio_pci_core_match_token_uuid,
#else
#define COMPAT_MATCH
#endif

#endif
