/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is refused, and why: pure functions, which policy_test.c tries in user space. main.c finds
 * out what they ask for, and does what they say.
 */
#ifndef RDSOCK_POLICY_H
#define RDSOCK_POLICY_H

#ifdef __KERNEL__
#include <linux/errno.h>
#include <linux/types.h>
#else
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
typedef uint32_t u32;
typedef uint64_t u64;
#endif
#include "rde.h"

enum refusal {
	ALLOWED,
	NOT_RDE,
	NO_IOMMU,
	IDENTITY,
	NO_REMAPPING,
	SHARED_GROUP,
	OPENER,
	NO_NODE,
	NO_RESET,
	NOT_SET,
	MAPS_PAGE,
	READS_PAGE,
	WRITES_PAGE,
	IOEVENTFD,
	SETTING,
	REFUSALS,
};

/* What the caller gets, and what the log says. README.md lists the attack behind each. */
static const struct {
	const char *name;
	int error;
	const char *text;
} refusals[REFUSALS] = {
	[NOT_RDE] = { "NOT_RDE", -ENODEV, "it is no rde device of version 1" },
	[NO_IOMMU] = { "NO_IOMMU", -EPERM, "no IOMMU translates its DMA: switch the IOMMU on" },
	[IDENTITY] = { "IDENTITY", -EPERM, "the IOMMU lets its DMA pass untranslated" },
	[NO_REMAPPING] = { "NO_REMAPPING", -EPERM, "interrupts are not remapped: switch that on" },
	[SHARED_GROUP] = { "SHARED_GROUP", -EPERM, "others are in its IOMMU group" },
	[OPENER] = { "OPENER", -EPERM, "who opens has neither CAP_NET_ADMIN nor the group" },
	[NO_NODE] = { "NO_NODE", -ENXIO, "no node id is set that the device has: write node_id" },
	[NO_RESET] = { "NO_RESET", -EIO, "it cannot be reset" },
	[NOT_SET] = { "NOT_SET", -EIO, "it does not hold the node id and peers that were stored" },
	[MAPS_PAGE] = { "MAPS_PAGE", -EPERM, "mapping the management page" },
	[READS_PAGE] = { "READS_PAGE", -EPERM, "reading the management page beyond what is shown" },
	[WRITES_PAGE] = { "WRITES_PAGE", -EPERM, "writing to the management page" },
	[IOEVENTFD] = { "IOEVENTFD", -EPERM, "having the kernel write to a BAR" },
	[SETTING] = { "SETTING", -EPERM, "changing a setting without CAP_NET_ADMIN" },
};

/* What stands between the device and the rest of the machine. */
struct isolation {
	bool translated;	/* it is in an IOMMU group, and when it is opened in a domain */
	bool identity;		/* the domain gives each address for itself */
	bool remapped;		/* its interrupts are remapped */
	bool unsafe_allowed;	/* the administrator does without */
	u32 members;		/* devices in its group */
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

static inline enum refusal judge_device(u64 magic, u32 version)
{
	return magic == RDE_MAGIC_VALUE && version >> 16 == RDE_MAJOR ? ALLOWED : NOT_RDE;
}

static inline enum refusal judge_node(u32 node, u32 max_node)
{
	return node && node <= max_node && node < RDE_NODES ? ALLOWED : NO_NODE;
}

/* An access to the page that is kept. What starts behind the page stays behind it. */
static inline bool is_kept(u32 bar, u64 offset)
{
	return bar == 0 && offset < RDE_REGION_TABLE;
}

/* An access that a user asks for: a map, a read or a write. */
static inline enum refusal judge_access(enum refusal kind, u32 bar, u64 offset)
{
	bool shown = kind == READS_PAGE && offset < RDE_SHOWN;

	return is_kept(bar, offset) && !shown ? kind : ALLOWED;
}

#endif
