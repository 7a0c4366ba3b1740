// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vfio-pci variant driver for the device of docs/device.md. It adds refusals to vfio-pci
 * (policy.h), keeps the management page, and stores node id and peers there.
 */
#include <linux/cred.h>
#include <linux/io.h>
#include <linux/module.h>

#include "compat.h"
#include "policy.h"

static_assert(!VFIO_PCI_INDEX_TO_OFFSET(VFIO_PCI_BAR0_REGION_INDEX), "see judge_access()");

static bool allow_unsafe_interrupts;
module_param(allow_unsafe_interrupts, bool, 0444);
MODULE_PARM_DESC(allow_unsafe_interrupts, "Let the opener raise any interrupt (default: N)");

static uint group = UINT_MAX;
module_param(group, uint, 0444);
MODULE_PARM_DESC(group, "Number of the group that may open, as CAP_NET_ADMIN may (default: none)");

static uint stall_timeout_us = 100000;
module_param(stall_timeout_us, uint, 0444);
MODULE_PARM_DESC(stall_timeout_us, "Register STALL_TIMEOUT (default: 100000)");

struct rdsock_device {
	struct vfio_pci_core_device core;
	void __iomem *page;		/* the management page */
	struct mutex lock;		/* taken inside those of VFIO and of the PCI core */
	bool open;			/* guarded by it, as are the settings */
	u32 node_id;			/* settings: they change while it is closed */
	DECLARE_BITMAP(peers, RDE_NODES);
	__le64 shown[RDE_SHOWN / 8 + 1];	/* what reads of the management page give */
};

#define rdsock_of(dev) container_of(dev_get_drvdata(dev), struct rdsock_device, core)

/* Refusals since it was loaded. The first of each cause is logged: nobody can flood the log. */
static atomic64_t refused[REFUSALS];

static int refuse(struct device *dev, enum refusal cause)
{
	if (cause != ALLOWED && atomic64_inc_return(&refused[cause]) == 1)
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

/*
 * Makes the device the node that it was set to be, and copies what may be read. It joins the
 * fabric last: a store that is lost (a user can switch BARs off) can only take rights away.
 */
static enum refusal program(struct rdsock_device *rd)
{
	void __iomem *page = rd->page;
	u64 magic = readq(page + RDE_MAGIC), features = readq(page + RDE_FEATURES);
	u32 version = readl(page + RDE_VERSION);
	u32 max_node = readl(page + RDE_MAX_NODE), i;
	enum refusal cause = judge_device(magic, version, max_node, rd->node_id);
	bool held;

	if (cause)
		return cause;
	writel(0, page + RDE_CONTROL);
	writel(stall_timeout_us, page + RDE_STALL_TIMEOUT);
	writel(rd->node_id, page + RDE_NODE_ID);
	held = readl(page + RDE_NODE_ID) == rd->node_id;
	for (i = 0; i < RDE_NODES / 64; i++) {
		writeq(rd->peers[i], page + RDE_PEERS + 8 * i);
		held &= readq(page + RDE_PEERS + 8 * i) == rd->peers[i];
	}
	writel(held ? RDE_CONTROL_FABRIC : 0, page + RDE_CONTROL);
	if (readl(page + RDE_CONTROL) != RDE_CONTROL_FABRIC)
		return NOT_SET;

	rd->shown[RDE_MAGIC / 8] = cpu_to_le64(magic);
	rd->shown[RDE_VERSION / 8] = cpu_to_le64(version);
	rd->shown[RDE_FEATURES / 8] = cpu_to_le64(features);
	for (i = RDE_QUEUE_SETS; i < RDE_KEPT; i += 8)
		rd->shown[i / 8] = cpu_to_le64(readl(page + i) | (u64)readl(page + i + 4) << 32);
	rd->shown[RDE_KEPT / 8] = cpu_to_le64(1);
	rd->shown[RDE_NODE_ID / 8] = cpu_to_le64(rd->node_id);
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
	kgid_t gid = make_kgid(&init_user_ns, group);
	bool in_group = gid_valid(gid) && in_egroup_p(gid);
	int ret = refuse(vfio->dev, isolation_of(vfio->dev, true)) ?:
		  refuse(vfio->dev, judge_opener(capable(CAP_NET_ADMIN), in_group)) ?:
		  vfio_pci_core_enable(&rd->core);	/* resets it, if it can be */

	if (ret)
		return ret;
	mutex_lock(&rd->lock);
	ret = refuse(vfio->dev, rd->core.reset_works ? program(rd) : NO_RESET);
	rd->open = !ret;
	mutex_unlock(&rd->lock);
	if (ret)
		vfio_pci_core_disable(&rd->core);
	else
		vfio_pci_core_finish_enable(&rd->core);
	return ret;
}

static void rdsock_close(struct vfio_device *vfio)
{
	struct rdsock_device *rd = rdsock_of(vfio->dev);

	mutex_lock(&rd->lock);
	rd->open = false;
	mutex_unlock(&rd->lock);
	/* Ends DMA and interrupts, and resets it: no node any more. */
	vfio_pci_core_close_device(vfio);
	/* Who unbinds it meanwhile has the lock that a reset takes: see rdsock_remove(). */
	if (rd->core.needs_reset && device_trylock(vfio->dev)) {
		refuse(vfio->dev, NO_RESET);
		device_unlock(vfio->dev);
	}
}

static int rdsock_mmap(struct vfio_device *vfio, struct vm_area_struct *vma)
{
	return refuse(vfio->dev, judge_access(MAPS_PAGE, (u64)vma->vm_pgoff << PAGE_SHIFT)) ?:
	       vfio_pci_core_mmap(vfio, vma);
}

static ssize_t rdsock_write(struct vfio_device *vfio, const char __user *buf, size_t count,
			    loff_t *ppos)
{
	return refuse(vfio->dev, judge_access(WRITES_PAGE, *ppos)) ?:
	       vfio_pci_core_write(vfio, buf, count, ppos);
}

static ssize_t rdsock_read(struct vfio_device *vfio, char __user *buf, size_t count, loff_t *ppos)
{
	int ret = refuse(vfio->dev, judge_access(READS_PAGE, *ppos));

	if (ret || *ppos >= RDE_REGION_TABLE)
		return ret ?: vfio_pci_core_read(vfio, buf, count, ppos);
	return simple_read_from_buffer(buf, count, ppos, rdsock_of(vfio->dev)->shown, RDE_SHOWN);
}

static long rdsock_ioctl(struct vfio_device *vfio, unsigned int cmd, unsigned long arg)
{
	return refuse(vfio->dev, cmd == VFIO_DEVICE_IOEVENTFD ? IOEVENTFD : ALLOWED) ?:
	       compat_ioctl(vfio, cmd, arg);
}

/* No .device_feature: it would forget in low power who it is, and export BAR0 as a DMA buffer. */
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
	COMPAT_OPS
};

/* Takes the lock; fails where the setting may not change. */
static int lock_setting(struct rdsock_device *rd)
{
	mutex_lock(&rd->lock);
	return refuse(rd->core.vdev.dev, capable(CAP_NET_ADMIN) ? ALLOWED : SETTING) ?:
	       (rd->open ? -EBUSY : 0);
}

static ssize_t node_id_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", rdsock_of(dev)->node_id);
}

static ssize_t node_id_store(struct device *dev, struct device_attribute *attr, const char *buf,
			     size_t count)
{
	struct rdsock_device *rd = rdsock_of(dev);
	int ret = lock_setting(rd) ?: kstrtou32(buf, 0, &rd->node_id);

	mutex_unlock(&rd->lock);
	return ret ?: count;
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
	int ret = lock_setting(rd) ?: bitmap_parselist(buf, peers, RDE_NODES);

	if (!ret)
		bitmap_copy(rd->peers, peers, RDE_NODES);
	mutex_unlock(&rd->lock);
	return ret ?: count;
}
static DEVICE_ATTR_RW(peers);

static struct attribute *rdsock_attrs[] = { &dev_attr_node_id.attr, &dev_attr_peers.attr, NULL };
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
	/* driver_override can send us anything. */
	bool rde = pdev->vendor == RDE_VENDOR && pdev->device == RDE_DEVICE &&
		   pci_resource_len(pdev, 0) == RDE_BAR0_SIZE;
	int ret = refuse(&pdev->dev, rde ? isolation_of(&pdev->dev, false) : NOT_RDE);
	struct rdsock_device *rd;

	if (ret)
		return ret;
	rd = vfio_alloc_device(rdsock_device, core.vdev, &pdev->dev, &rdsock_ops);
	if (IS_ERR(rd))
		return PTR_ERR(rd);
	mutex_init(&rd->lock);
	dev_set_drvdata(&pdev->dev, &rd->core);
	rd->page = devm_ioremap(&pdev->dev, pci_resource_start(pdev, 0), RDE_REGION_TABLE);
	ret = rd->page ? vfio_pci_core_register_device(&rd->core) : -ENOMEM;
	if (ret)
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
MODULE_DESCRIPTION("Hands out rdsock's RDMA device behind an IOMMU, keeping its management page");
