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
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum queue_state {
	QUEUE_UNCLAIMED = 0,
	QUEUE_PASSTHRU = 1,
	QUEUE_MAC = 2,
};

enum filter_flags {
	FILTER_ALL_UNICAST = 1 << 0,
	FILTER_ALL_MULTICAST = 1 << 1,
	FILTER_BROADCAST = 1 << 2,
	FILTER_ALL_VLANS = 1 << 3,
};

#define TABLE_MAX 64 /* addresses of a kind; QEMU's virtio-net remembers as many of both kinds together */
#define VLAN_IDS 4096

/*
 * Which frames are the guest's on the queues in state QUEUE_MAC. One that is in use is
 * never written to: another takes its place. Addresses are as address_of gives them.
 */
struct filter {
	__u32 flags;
	__u16 unicast_count;
	__u16 multicast_count;
	__u64 host_address; /* never the guest's, whatever else is said here; 0 for none */
	__u64 unicast[TABLE_MAX];
	__u64 multicast[TABLE_MAX];
	__u64 vlans[VLAN_IDS / 64]; /* VLAN 64 * i + j is bit j of the i-th */
};

struct queue_counters {
	__u64 redirected;
	__u64 passed;
	__u64 dropped_no_guest;
};

/* These three are indexed by receive queue; the loader sets max_entries to the number of queues. */
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
	__type(value, __u32); /* enum queue_state */
} queues SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct queue_counters);
} counters SEC(".maps");

/*
 * The one filter of the port, in a map of its own, so that replacing it is putting
 * another map here: a frame meets the old one or the new one, and never a mix. The
 * kernel keeps a map that was taken out until no program looks at it any more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_ARRAY);
		__uint(max_entries, 1);
		__uint(key_size, sizeof(__u32)); /* sizes: clang leaves types this deep out of the BTF */
		__uint(value_size, sizeof(struct filter));
	});
} filters SEC(".maps");

#define BROADCAST 0xffffffffffffULL

/* An address as a number, of three halves as the machine reads them: layout.rs makes the same. */
static __always_inline __u64 address_of(const __u8 *mac)
{
	const __u16 *part = (const void *)mac;

	return part[0] | (__u64)part[1] << 16 | (__u64)part[2] << 32;
}

static __always_inline int is_in(const __u64 *table, __u16 count, __u64 address)
{
	for (int i = 0; i < TABLE_MAX && i < count; i++)
		if (table[i] == address)
			return 1;
	return 0;
}

/* A tag of VLAN 0 has a priority only (IEEE 802.1Q 9.6): such a frame is in no VLAN. */
static __always_inline int is_of_vlans(const struct ethhdr *eth, const void *end, const struct filter *filter)
{
	const __be16 *tag = (const void *)(eth + 1);
	__u16 vlan;

	if (eth->h_proto != bpf_htons(ETH_P_8021Q) || filter->flags & FILTER_ALL_VLANS)
		return 1;
	if ((const void *)(tag + 1) > end)
		return 0;
	vlan = bpf_ntohs(*tag) % VLAN_IDS;
	return !vlan || filter->vlans[vlan / 64] >> vlan % 64 & 1;
}

static __always_inline int is_of_addresses(const struct ethhdr *eth, const struct filter *filter)
{
	__u64 address = address_of(eth->h_dest);

	if (address == BROADCAST)
		return filter->flags & FILTER_BROADCAST;
	if (eth->h_dest[0] & 1)
		return filter->flags & FILTER_ALL_MULTICAST ||
		       is_in(filter->multicast, filter->multicast_count, address);
	return address != filter->host_address &&
	       (filter->flags & FILTER_ALL_UNICAST ||
		is_in(filter->unicast, filter->unicast_count, address));
}

/* Of a queue in state QUEUE_MAC. Without a filter, or an address of its own, a frame is the host's. */
static __always_inline int is_for_guest(const struct xdp_md *ctx)
{
	const struct ethhdr *eth = (void *)(long)ctx->data;
	const void *end = (void *)(long)ctx->data_end;
	const struct filter *filter = 0;
	__u32 index = 0;
	void *map;

	if ((const void *)(eth + 1) > end)
		return 0;
	map = bpf_map_lookup_elem(&filters, &index);
	if (map)
		filter = bpf_map_lookup_elem(map, &index);
	return filter && is_of_vlans(eth, end, filter) && is_of_addresses(eth, filter);
}

static __always_inline int steer_frame(struct xdp_md *ctx)
{
	__u32 index = ctx->rx_queue_index;
	__u32 *state = bpf_map_lookup_elem(&queues, &index);
	struct queue_counters *count = bpf_map_lookup_elem(&counters, &index);
	long action;

	if (!state || !count || *state == QUEUE_UNCLAIMED)
		return XDP_PASS;
	if (*state == QUEUE_MAC && !is_for_guest(ctx)) {
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
