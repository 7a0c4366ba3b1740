/* SPDX-License-Identifier: GPL-2.0-only */
/* What is refused, and why: pure functions, which policy_test.c tries in user space. */
#ifndef RDSOCK_POLICY_H
#define RDSOCK_POLICY_H

#include <linux/errno.h>
#include <linux/types.h>
#include "rde.h"

/* Name, what the caller gets, and what the log says. README.md lists the attack behind each. */
#define EACH_REFUSAL(X)									\
	X(NOT_RDE, -ENODEV, "it is no rde device of version 1")				\
	X(NO_IOMMU, -EPERM, "no IOMMU translates its DMA: switch the IOMMU on")		\
	X(IDENTITY, -EPERM, "the IOMMU lets its DMA pass untranslated")			\
	X(NO_REMAPPING, -EPERM, "interrupts are not remapped: switch that on")		\
	X(SHARED_GROUP, -EPERM, "others are in its IOMMU group")			\
	X(OPENER, -EPERM, "who opens has neither CAP_NET_ADMIN nor the group")		\
	X(NO_NODE, -ENXIO, "no node id is set that the device has: write node_id")	\
	X(NO_RESET, -EIO, "it could not be reset")						\
	X(NOT_SET, -EIO, "it does not hold the node id and peers that were stored")	\
	X(MAPS_PAGE, -EPERM, "mapping the management page")				\
	X(READS_PAGE, -EPERM, "reading the management page beyond what is shown")	\
	X(WRITES_PAGE, -EPERM, "writing to the management page")			\
	X(IOEVENTFD, -EPERM, "having the kernel write to a BAR")			\
	X(SETTING, -EPERM, "changing a setting without CAP_NET_ADMIN")

#define REFUSAL_NAME(name, error, text) name,
enum refusal { ALLOWED, EACH_REFUSAL(REFUSAL_NAME) REFUSALS };

#define REFUSAL_ROW(name, error, text) { #name, text, error },
static const struct {
	const char *name, *text;
	int error;
} refusals[REFUSALS] = { REFUSAL_ROW(ALLOWED, 0, "") EACH_REFUSAL(REFUSAL_ROW) };

/* What stands between the device and the rest of the machine. */
struct isolation {
	bool translated;	/* it is in an IOMMU group, and when it is opened in a domain */
	bool identity;		/* the domain gives each address for itself */
	bool remapped;		/* its interrupts are remapped */
	bool unsafe_allowed;	/* the administrator does without */
	__u32 members;		/* devices in its group */
};

static inline enum refusal judge_isolation(const struct isolation *is)
{
	if (!is->translated)
		return NO_IOMMU;
	if (is->identity)
		return IDENTITY;
	if (!is->remapped && !is->unsafe_allowed)
		return NO_REMAPPING;
	return is->members == 1 ? ALLOWED : SHARED_GROUP;
}

static inline enum refusal judge_opener(bool capable, bool in_group)
{
	return capable || in_group ? ALLOWED : OPENER;
}

/* What the device says that it is, and the node that it was set to be. */
static inline enum refusal judge_device(__u64 magic, __u32 version, __u32 max_node, __u32 node)
{
	if (magic != RDE_MAGIC_VALUE || version >> 16 != RDE_MAJOR)
		return NOT_RDE;
	return node && node <= max_node && node < RDE_NODES ? ALLOWED : NO_NODE;
}

/* A user's map, read or write, by where it begins in the device's file: BAR0 comes first. */
static inline enum refusal judge_access(enum refusal kind, __u64 position)
{
	bool shown = kind == READS_PAGE && position < RDE_SHOWN;

	return position < RDE_REGION_TABLE && !shown ? kind : ALLOWED;
}

#endif
