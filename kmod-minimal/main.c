// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vfio-pci variant driver for the device of docs/device.md. It adds refusals to vfio-pci
 * (policy.h), keeps the management page, and stores node id and peers there.
 *
 * Our lock guards whether the device is open, and the settings. It is taken inside those of VFIO
 * and of the PCI core.
 */
#include <linux/bitmap.h>
#include <linux/cred.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>

#include "compat.h"
#include "policy.h"

#ifndef CONFIG_64BIT
#error "a register of 64 bits takes one load or store"
#endif

static bool allow_unsafe_interrupts;
module_param(allow_unsafe_interrupts, bool, 0444);
MODULE_PARM_DESC(allow_unsafe_interrupts,
		 "Do without interrupt remapping: the opener can then raise any interrupt");

static uint group = UINT_MAX;
module_param(group, uint, 0444);
MODULE_PARM_DESC(group, "Number of the group that may open, as CAP_NET_ADMIN may (default: none)");

static uint stall_timeout_us = 100000;
module_param(stall_timeout_us, uint, 0444);
MODULE_PARM_DESC(stall_timeout_us, "Register STALL_TIMEOUT (default: 100000)");

struct rdsock_device {
	struct vfio_pci_core_device core;
	void __iomem *page;		/* the management page */
	struct mutex lock;
	bool open;
	u32 node_id;			/* settings: they change while it is closed */
	DECLARE_BITMAP(peers, RDE_NODES);
	__le32 shown[RDE_SHOWN / 4];	/* what reads of the management page give */
};

static struct rdsock_device *rdsock_of(struct device *dev)
{
	return container_of(dev_get_drvdata(dev), struct rdsock_device, core);
}

/* Refusals since the module was loaded. */
static atomic64_t refused[REFUSALS];

/* Counts; logs the first of each cause, so that nobody can flood the log. */
static int refuse(struct device *dev, enum refusal cause)
{
	if (cause == ALLOWED)
		return 0;
	if (atomic64_inc_return(&refused[cause]) == 1)
		dev_warn(dev, "refused: %s (%s; more of these are only counted)\n",
			 refusals[cause].text, refusals[cause].name);
	return refusals[cause].error;
}

static int count_member(struct device *dev, void *members)
{
	(*(u32 *)members)++;
	return 0;
}

/* In the domain that VFIO has put it into, when it is being opened; else it is in none of ours. */
static enum refusal isolation_of(struct device *dev, bool opening)
{
	struct isolation is = { .unsafe_allowed = allow_unsafe_interrupts };
	struct iommu_domain *domain = iommu_get_domain_for_dev(dev);
	struct iommu_group *members = iommu_group_get(dev);

	if (members) {
		is.translated = domain || !opening;
		is.identity = opening && domain && domain->type == IOMMU_DOMAIN_IDENTITY;
		is.remapped = compat_remapped(dev, members);
		iommu_group_for_each_dev(members, &is.members, count_member);
		iommu_group_put(members);
	}
	return judge_isolation(&is);
}

/* Of the process that runs. */
static enum refusal opener(void)
{
	kgid_t gid = make_kgid(&init_user_ns, group);

	return judge_opener(capable(CAP_NET_ADMIN), gid_valid(gid) && in_egroup_p(gid));
}

/*
 * Makes the device the node that it was set to be, and copies what may be read. It joins the
 * fabric last: a store that is lost (a user can switch BARs off) can only take rights away.
 */
static enum refusal program(struct rdsock_device *rd)
{
	void __iomem *page = rd->page;
	enum refusal cause = judge_device(readq(page + RDE_MAGIC), readl(page + RDE_VERSION));
	u64 features = readq(page + RDE_FEATURES);
	unsigned int i;

	if (!cause)
		cause = judge_node(rd->node_id, readl(page + RDE_MAX_NODE));
	if (cause)
		return cause;
	writel(0, page + RDE_CONTROL);
	for (i = 0; i < RDE_NODES / 64; i++) {
		writeq(rd->peers[i], page + RDE_PEERS + 8 * i);
		if (readq(page + RDE_PEERS + 8 * i) != rd->peers[i])
			return NOT_SET;
	}
	writel(stall_timeout_us, page + RDE_STALL_TIMEOUT);
	writel(rd->node_id, page + RDE_NODE_ID);
	if (readl(page + RDE_NODE_ID) != rd->node_id)
		return NOT_SET;
	writel(RDE_CONTROL_FABRIC, page + RDE_CONTROL);
	if (readl(page + RDE_CONTROL) != RDE_CONTROL_FABRIC)
		return NOT_SET;

	rd->shown[0] = cpu_to_le32(lower_32_bits(RDE_MAGIC_VALUE));
	rd->shown[1] = cpu_to_le32(upper_32_bits(RDE_MAGIC_VALUE));
	rd->shown[RDE_VERSION / 4] = cpu_to_le32(readl(page + RDE_VERSION));
	rd->shown[RDE_FEATURES / 4] = cpu_to_le32(lower_32_bits(features));
	rd->shown[RDE_FEATURES / 4 + 1] = cpu_to_le32(upper_32_bits(features));
	for (i = RDE_QUEUE_SETS; i <= RDE_MAX_INLINE; i += 4)
		rd->shown[i / 4] = cpu_to_le32(readl(page + i));
	rd->shown[RDE_KEPT / 4] = cpu_to_le32(1);
	rd->shown[RDE_NODE_ID / 4] = cpu_to_le32(rd->node_id);
	return ALLOWED;
}

/* Whoever reset it, by whatever way: while it is open, it is a node. */
static void rdsock_reset_done(struct pci_dev *pdev)
{
	struct rdsock_device *rd = rdsock_of(&pdev->dev);
	u16 command;

	mutex_lock(&rd->lock);
	if (rd->open) {
		/* The user may have switched BARs off. */
		pci_read_config_word(pdev, PCI_COMMAND, &command);
		pci_write_config_word(pdev, PCI_COMMAND, command | PCI_COMMAND_MEMORY);
		refuse(&pdev->dev, program(rd));
		pci_write_config_word(pdev, PCI_COMMAND, command);
	}
	mutex_unlock(&rd->lock);
}

static const struct pci_error_handlers rdsock_err_handlers = {
	.error_detected = vfio_pci_core_aer_err_detected,
	.reset_done = rdsock_reset_done,
};

static int rdsock_open(struct vfio_device *vfio)
{
	struct rdsock_device *rd = rdsock_of(vfio->dev);
	enum refusal cause = isolation_of(vfio->dev, true);
	int ret;

	if (!cause)
		cause = opener();
	if (cause)
		return refuse(vfio->dev, cause);
	/* This resets it, if it can be. */
	ret = vfio_pci_core_enable(&rd->core);
	if (ret)
		return ret;
	mutex_lock(&rd->lock);
	cause = rd->core.reset_works ? program(rd) : NO_RESET;
	rd->open = !cause;
	mutex_unlock(&rd->lock);
	if (cause) {
		vfio_pci_core_disable(&rd->core);
		return refuse(vfio->dev, cause);
	}
	vfio_pci_core_finish_enable(&rd->core);
	return 0;
}

static void rdsock_close(struct vfio_device *vfio)
{
	struct rdsock_device *rd = rdsock_of(vfio->dev);

	mutex_lock(&rd->lock);
	rd->open = false;
	mutex_unlock(&rd->lock);
	/* Ends DMA and interrupts, and resets it: no node any more. See also rdsock_remove(). */
	vfio_pci_core_close_device(vfio);
}

static enum refusal access(enum refusal kind, u64 at)
{
	return judge_access(kind, VFIO_PCI_OFFSET_TO_INDEX(at), at & VFIO_PCI_OFFSET_MASK);
}

static int rdsock_mmap(struct vfio_device *vfio, struct vm_area_struct *vma)
{
	int ret = refuse(vfio->dev, access(MAPS_PAGE, (u64)vma->vm_pgoff << PAGE_SHIFT));

	return ret ? ret : vfio_pci_core_mmap(vfio, vma);
}

static ssize_t rdsock_write(struct vfio_device *vfio, const char __user *buf, size_t count,
			    loff_t *ppos)
{
	int ret = refuse(vfio->dev, access(WRITES_PAGE, *ppos));

	return ret ? ret : vfio_pci_core_write(vfio, buf, count, ppos);
}

static ssize_t rdsock_read(struct vfio_device *vfio, char __user *buf, size_t count, loff_t *ppos)
{
	struct rdsock_device *rd = rdsock_of(vfio->dev);
	int ret = refuse(vfio->dev, access(READS_PAGE, *ppos));

	if (ret)
		return ret;
	if (!is_kept(VFIO_PCI_OFFSET_TO_INDEX(*ppos), *ppos & VFIO_PCI_OFFSET_MASK))
		return vfio_pci_core_read(vfio, buf, count, ppos);
	/* BAR0 is index 0: the position is the offset. */
	return simple_read_from_buffer(buf, count, ppos, rd->shown, sizeof(rd->shown));
}

static long rdsock_ioctl(struct vfio_device *vfio, unsigned int cmd, unsigned long arg)
{
	if (cmd == VFIO_DEVICE_IOEVENTFD)
		return refuse(vfio->dev, IOEVENTFD);
	return compat_ioctl(vfio, cmd, arg);
}

/*
 * No .device_feature: no low power, in which the device would forget who it is, and no export of
 * BARs as DMA buffers, which would be a way to the management page.
 */
static const struct vfio_device_ops rdsock_ops = {
	.name = "rdsock-vfio",
	.init = vfio_pci_core_init_dev,
	.release = vfio_pci_core_release_dev,
	.open_device = rdsock_open,
	.close_device = rdsock_close,
	.ioctl = rdsock_ioctl,
	.read = rdsock_read,
	.write = rdsock_write,
	.mmap = rdsock_mmap,
	.request = vfio_pci_core_request,
	.match = vfio_pci_core_match,
	COMPAT_REGION_INFO
	COMPAT_IOMMUFD
	COMPAT_DETACH
	COMPAT_MATCH
};

/* Stores a setting of a device that is closed, for a process that may. */
static ssize_t set(struct rdsock_device *rd, void *to, const void *from, size_t len, ssize_t done)
{
	int ret = capable(CAP_NET_ADMIN) ? 0 : refuse(rd->core.vdev.dev, SETTING);

	mutex_lock(&rd->lock);
	if (!ret && rd->open)
		ret = -EBUSY;
	if (!ret)
		memcpy(to, from, len);
	mutex_unlock(&rd->lock);
	return ret ? ret : done;
}

static ssize_t node_id_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", rdsock_of(dev)->node_id);
}

static ssize_t node_id_store(struct device *dev, struct device_attribute *attr, const char *buf,
			     size_t count)
{
	struct rdsock_device *rd = rdsock_of(dev);
	u32 id;
	int ret = kstrtou32(buf, 0, &id);

	return ret ? ret : set(rd, &rd->node_id, &id, sizeof(id), count);
}
static DEVICE_ATTR_RW(node_id);

static ssize_t peers_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%*pbl\n", RDE_NODES, rdsock_of(dev)->peers);
}

/* Ids and ranges of ids: "1,4,7-9". */
static ssize_t peers_store(struct device *dev, struct device_attribute *attr, const char *buf,
			   size_t count)
{
	struct rdsock_device *rd = rdsock_of(dev);
	DECLARE_BITMAP(peers, RDE_NODES);
	int ret = bitmap_parselist(buf, peers, RDE_NODES);

	return ret ? ret : set(rd, rd->peers, peers, sizeof(peers), count);
}
static DEVICE_ATTR_RW(peers);

static struct attribute *rdsock_attrs[] = {
	&dev_attr_node_id.attr, &dev_attr_peers.attr, NULL,
};
ATTRIBUTE_GROUPS(rdsock);

/* Each cause, and how often. */
static ssize_t refusals_show(struct device_driver *driver, char *buf)
{
	int at = 0, cause;

	for (cause = ALLOWED + 1; cause < REFUSALS; cause++)
		at += sysfs_emit_at(buf, at, "%s %lld\n", refusals[cause].name,
				    atomic64_read(&refused[cause]));
	return at;
}
static DRIVER_ATTR_RO(refusals);

static struct attribute *rdsock_driver_attrs[] = { &driver_attr_refusals.attr, NULL };
ATTRIBUTE_GROUPS(rdsock_driver);

static int rdsock_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	enum refusal cause = isolation_of(&pdev->dev, false);
	struct rdsock_device *rd;
	int ret = -ENOMEM;

	/* driver_override can send us anything. */
	if (pdev->vendor != RDE_VENDOR || pdev->device != RDE_DEVICE ||
	    pci_resource_len(pdev, 0) != RDE_BAR0_SIZE)
		cause = NOT_RDE;
	if (cause)
		return refuse(&pdev->dev, cause);

	rd = vfio_alloc_device(rdsock_device, core.vdev, &pdev->dev, &rdsock_ops);
	if (IS_ERR(rd))
		return PTR_ERR(rd);
	mutex_init(&rd->lock);
	dev_set_drvdata(&pdev->dev, &rd->core);
	rd->page = ioremap(pci_resource_start(pdev, 0), RDE_REGION_TABLE);
	if (!rd->page)
		goto put;
	ret = vfio_pci_core_register_device(&rd->core);
	if (!ret)
		return 0;
	iounmap(rd->page);
put:
	vfio_put_device(&rd->core.vdev);
	return ret;
}

static void rdsock_remove(struct pci_dev *pdev)
{
	struct rdsock_device *rd = rdsock_of(&pdev->dev);

	/* Waits until it is closed. */
	vfio_pci_core_unregister_device(&rd->core);
	/* Meanwhile closing could not take the lock that a reset needs. We have it. */
	if (rd->core.needs_reset && pci_reset_function_locked(pdev))
		refuse(&pdev->dev, NO_RESET);
	iounmap(rd->page);
	vfio_put_device(&rd->core.vdev);
}

static const struct pci_device_id rdsock_ids[] = {
	{ PCI_DRIVER_OVERRIDE_DEVICE_VFIO(RDE_VENDOR, RDE_DEVICE) }, {}
};
MODULE_DEVICE_TABLE(pci, rdsock_ids);

static struct pci_driver rdsock_driver = {
	.name = "rdsock-vfio",
	.id_table = rdsock_ids,
	.probe = rdsock_probe,
	.remove = rdsock_remove,
	.err_handler = &rdsock_err_handlers,
	.groups = rdsock_driver_groups,
	.dev_groups = rdsock_groups,
	.driver_managed_dma = true,
};
module_pci_driver(rdsock_driver);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("rdsock");
MODULE_DESCRIPTION("Hands out rdsock's RDMA device behind an IOMMU, keeping its management page");
