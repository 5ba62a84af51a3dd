// SPDX-License-Identifier: Apache-2.0
/*
 * The XDP steering program: which frames of a host interface go to a guest.
 *
 * One copy runs per interface. A hardware receive queue is unclaimed (every frame
 * goes to the host) or claimed by one guest, in one of two ways: see README.md.
 * The maps are made and filled by crates/steering; their layout is a contract
 * with its src/layout.rs.
 *
 * Invariant: a frame meant for the guest never reaches the host stack. With no
 * guest there it is dropped, and counted.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

enum queue_state {
	QUEUE_UNCLAIMED = 0,
	QUEUE_PASSTHRU = 1,
	QUEUE_MAC = 2,
};

enum queue_flags {
	QUEUE_BROADCAST = 1 << 0, /* mac: broadcast frames go to the guest */
	QUEUE_MULTICAST = 1 << 1, /* mac: other group-addressed frames too */
};

struct queue_config {
	__u8 state;
	__u8 flags;
	__u8 mac[ETH_ALEN];
};

struct queue_counters {
	__u64 redirected;
	__u64 passed;
	__u64 dropped_no_guest;
};

/* All three are indexed by receive queue; the loader sets max_entries to the number of queues. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct queue_config);
} queues SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct queue_counters);
} counters SEC(".maps");

static __always_inline int is_group(const __u8 *mac)
{
	return mac[0] & 1;
}

static __always_inline int is_broadcast(const __u8 *mac)
{
	return (mac[0] & mac[1] & mac[2] & mac[3] & mac[4] & mac[5]) == 0xff;
}

/* By hand: clang calls a memcmp of six bytes out of line, and there is none to call. */
static __always_inline int is_same(const __u8 *a, const __u8 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) |
		 (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]));
}

static __always_inline int is_for_guest(const struct xdp_md *ctx, const struct queue_config *queue)
{
	const struct ethhdr *eth = (void *)(long)ctx->data;

	if (queue->state == QUEUE_PASSTHRU)
		return 1;
	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return 0; /* without an address it is nobody's: as unclaimed, the host's */
	if (is_broadcast(eth->h_dest))
		return queue->flags & QUEUE_BROADCAST;
	if (is_group(eth->h_dest))
		return queue->flags & QUEUE_MULTICAST;
	return is_same(eth->h_dest, queue->mac);
}

static __always_inline int steer_frame(struct xdp_md *ctx)
{
	__u32 index = ctx->rx_queue_index;
	struct queue_config *queue = bpf_map_lookup_elem(&queues, &index);
	struct queue_counters *count = bpf_map_lookup_elem(&counters, &index);
	long action;

	if (!queue || !count || queue->state == QUEUE_UNCLAIMED)
		return XDP_PASS;
	if (!is_for_guest(ctx, queue)) {
		count->passed++;
		return XDP_PASS;
	}
	/*
	 * The helper itself looks the slot up and returns the given action where it is
	 * empty, so that the count and the fate of the frame cannot disagree; a lookup
	 * of our own before it could, for the guest may leave in between.
	 */
	action = bpf_redirect_map(&xsks, index, XDP_DROP);
	if (action == XDP_REDIRECT)
		count->redirected++;
	else
		count->dropped_no_guest++;
	return action;
}

SEC("xdp")
int steer(struct xdp_md *ctx)
{
	return steer_frame(ctx);
}

/* The same for frames in several buffers, of which ctx->data has the first: all that is looked at. */
SEC("xdp.frags")
int steer_frags(struct xdp_md *ctx)
{
	return steer_frame(ctx);
}

/* No helper above is reserved to GPL programs. */
char _license[] SEC("license") = "Apache-2.0";
