/* SPDX-License-Identifier: GPL-2.0-only */
/* Numbers of docs/device.md (2 and 3). A test compares them. */
#ifndef RDSOCK_RDE_H
#define RDSOCK_RDE_H

#define RDE_VENDOR		0x5244
#define RDE_DEVICE		0x4531
#define RDE_MAGIC_VALUE		0x44526b636f736472ULL
#define RDE_MAJOR		1
#define RDE_NODES		1024	/* more than the greatest node id */

/* Management page. MAGIC, FEATURES and the 16 words of PEERS have 64 bits, the others 32. */
#define RDE_MAGIC		0x000
#define RDE_VERSION		0x008
#define RDE_FEATURES		0x010
#define RDE_QUEUE_SETS		0x018	/* capabilities, up to KEPT */
#define RDE_MAX_NODE		0x01c
#define RDE_KEPT		0x038
#define RDE_NODE_ID		0x040
#define RDE_SHOWN		0x044	/* reads of the page that is kept give what lies before */
#define RDE_CONTROL		0x048
#define RDE_CONTROL_FABRIC	2
#define RDE_STALL_TIMEOUT	0x04c
#define RDE_PEERS		0x100

/* Of BAR0 the module keeps what lies before the region table; the driver has the rest. */
#define RDE_REGION_TABLE	0x10000
#define RDE_BAR0_SIZE		0x20000

#endif
