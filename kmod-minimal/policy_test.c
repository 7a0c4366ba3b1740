// SPDX-License-Identifier: GPL-2.0-only
/* Tries policy.h: make test. Says what is wrong, and fails. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "policy.h"

static int wrong;

#define IS(got, wanted)									\
	do {										\
		int is_ = (got);							\
		if (is_ != (wanted)) {							\
			printf("line %d: %s is %d, not %s\n", __LINE__, #got, is_, #wanted); \
			wrong++;							\
		}									\
	} while (0)

static const struct isolation alone = { .translated = true, .remapped = true, .members = 1 };

static void isolation(void)
{
	struct isolation is = alone;

	IS(judge_isolation(&is), ALLOWED);
	is.translated = false;
	IS(judge_isolation(&is), NO_IOMMU);
	is = alone;
	is.identity = true;
	IS(judge_isolation(&is), IDENTITY);
	is = alone;
	is.remapped = false;
	IS(judge_isolation(&is), NO_REMAPPING);
	is.unsafe_allowed = true;
	IS(judge_isolation(&is), ALLOWED);
	/* An administrator who does without remapping does not do without the rest. */
	is.translated = false;
	IS(judge_isolation(&is), NO_IOMMU);
	is.translated = true;
	is.identity = true;
	IS(judge_isolation(&is), IDENTITY);
	is.identity = false;
	is.members = 2;
	IS(judge_isolation(&is), SHARED_GROUP);
	is = alone;
	is.members = 2;
	IS(judge_isolation(&is), SHARED_GROUP);
	/* A group that does not have the device is none that protects it. */
	is.members = 0;
	IS(judge_isolation(&is), SHARED_GROUP);
}

static void opener(void)
{
	IS(judge_opener(false, false), OPENER);
	IS(judge_opener(true, false), ALLOWED);
	IS(judge_opener(false, true), ALLOWED);
}

static void device(void)
{
	IS(judge_device(RDE_MAGIC_VALUE, 0x00010000, 1023, 1), ALLOWED);
	IS(judge_device(RDE_MAGIC_VALUE, 0x00010007, 1023, 1), ALLOWED);
	IS(judge_device(RDE_MAGIC_VALUE, 0x00020000, 1023, 1), NOT_RDE);
	IS(judge_device(RDE_MAGIC_VALUE + 1, 0x00010000, 1023, 1), NOT_RDE);
	/* Another device is told from one without a node first. */
	IS(judge_device(RDE_MAGIC_VALUE, 0x00020000, 1023, 0), NOT_RDE);
	/* A device that is gone. */
	IS(judge_device(~0ULL, ~0U, ~0U, 1), NOT_RDE);
}

static enum refusal judge_node(__u32 node, __u32 max_node)
{
	return judge_device(RDE_MAGIC_VALUE, RDE_MAJOR << 16, max_node, node);
}

static void node(void)
{
	IS(judge_node(0, 1023), NO_NODE);
	IS(judge_node(1, 1023), ALLOWED);
	IS(judge_node(1023, 1023), ALLOWED);
	IS(judge_node(8, 7), NO_NODE);
	IS(judge_node(1024, 1023), NO_NODE);
	/* A device that promises more nodes than PEERS has bits. */
	IS(judge_node(1024, ~0U), NO_NODE);
	IS(judge_node(~0U, ~0U), NO_NODE);
}

static void access(void)
{
	static const enum refusal kinds[] = { MAPS_PAGE, READS_PAGE, WRITES_PAGE };
	unsigned int i;
	__u64 at;

	for (i = 0; i < 3; i++) {
		for (at = 0; at < RDE_REGION_TABLE; at++) {
			bool shown = kinds[i] == READS_PAGE && at < RDE_SHOWN;

			if (judge_access(kinds[i], at) != (shown ? ALLOWED : kinds[i]))
				IS((int)at, -1);
		}
		IS(judge_access(kinds[i], RDE_REGION_TABLE), ALLOWED);
		IS(judge_access(kinds[i], RDE_BAR0_SIZE), ALLOWED);
		/* Other regions lie behind, each 1 << 40 bytes from the last. */
		IS(judge_access(kinds[i], 2ULL << 40), ALLOWED);
		IS(judge_access(kinds[i], 7ULL << 40), ALLOWED);
		IS(judge_access(kinds[i], ~0ULL), ALLOWED);
	}
	/* What is shown ends before anything that changes, and before PEERS. */
	IS(judge_access(READS_PAGE, RDE_NODE_ID), ALLOWED);
	IS(judge_access(READS_PAGE, RDE_CONTROL), READS_PAGE);
	IS(judge_access(READS_PAGE, RDE_PEERS), READS_PAGE);
}

/* Each cause has its row. */
static void causes(void)
{
	int i, j;

	for (i = ALLOWED + 1; i < REFUSALS; i++) {
		if (!refusals[i].name || !refusals[i].text || refusals[i].error >= 0) {
			IS(i, -1);
			continue;
		}
		for (j = ALLOWED + 1; j < i; j++)
			IS(!strcmp(refusals[i].name, refusals[j].name), 0);
	}
}

int main(void)
{
	isolation();
	opener();
	device();
	node();
	access();
	causes();
	printf("policy: %s\n", wrong ? "WRONG" : "ok");
	return wrong != 0;
}
