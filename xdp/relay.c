// SPDX-License-Identifier: MIT OR GPL-2.0-only
//
// Relays packets of TURN channels where they arrive, before the kernel's own stack sees them:
//
//   ChannelData from a client    -> UDP to the peer, or ChannelData to another client of this host
//   UDP from a peer              -> ChannelData to the client
//
// It forwards nothing but what the relay has written into `routes` and `flows`, and learns one thing by itself: by which
// header of the link a flow's client and peer send, for that is how they are reached (of those who have not sent, user space
// tells what the kernel's tables say). Whatever it does not know, or cannot do
// exactly, goes up to user space as it came: XDP_PASS is always right, only slower.
//
// `src/relay/xdp/rows.rs` has the same structures; docs/architecture.md says how the two sides share them.

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define FLOWS 65536
#define ACCOUNTS 16384

#define ETH_IPV4 0x0800
#define ETH_IPV6 0x86dd
#define ETH_VLAN 0x8100
#define ETH_QINQ 0x88a8
#define MACS 12
#define VLAN 4
#define LONGEST_LINK (MACS + 2 * VLAN)
#define IPV4 20
#define IPV6 40
#define UDP 8
#define CHANNEL 4
#define DONT_FRAGMENT 0x4000
// RFC 7915: what is shorter fits through every IPv6 link, so that no router has to cut it.
#define IPV6_LEAST 1280
#define IPV4_LEAST 1260
// So often an account is tried while other processors take from it, too.
#define TRIES 8

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

// Addresses are IPv6, or IPv4 in their mapped form. All as on the wire.
struct address {
	u64 words[2];
};

// A UDP five-tuple as it arrives, and the channel that its payload names; 0 for packets from peers.
struct key {
	struct address local;
	struct address remote;
	__be16 local_port;
	__be16 remote_port;
	__be16 channel;
	u16 zero;
};

struct route {
	u32 flow;
	u32 generation;
};

// The header of the link by which somebody sends: to us, from them, and the tags between. `length` 0: not known yet.
struct link {
	u8 header[LONGEST_LINK];
	u16 length;
	u16 heard; // 0: as user space was told by the kernel's tables
	u32 interface;
	u32 way; // where the kernel's routes lead: the only interface to learn from, or ANY, or 0 for none
};

// What is known of one end of a flow beside its addresses.
struct facts {
	u32 sum;      // of both addresses and both ports, folded to 16 bits
	__be32 label; // of IPv6, as it stands in the header
	__be16 local_port;
	__be16 remote_port;
	u8 v6;
	u8 zero[3];
};

// Our address there, who is reached from it, and what was sent that way.
struct far {
	struct address local;
	struct address remote;
	u64 packets;
	u64 bytes;
	u64 dropped;
	u64 last; // when, by CLOCK_MONOTONIC_COARSE in nanoseconds
};

// A channel: written by user space before its routes, but for the links and what `far` counts. A packet touches three of its
// four lines of the cache.
struct flow {
	u64 until; // when it ends unless user space ends it before
	u32 generation;
	u32 account; // from 1; 0: without a limit
	struct facts client;
	struct facts peer;
	__be16 channel;
	u8 here;    // the peer is a relayed address of this host
	u8 crosses; // packets may leave by another interface than they came by
	u8 zero[12];
	struct link client_link;
	struct link peer_link;
	struct far to_client;
	struct far to_peer;
};

// One end, in all its parts.
struct end {
	struct facts *facts;
	struct link *link;
	struct far *far;
};

// What an agent may relay, shared with user space: see src/turn/bandwidth.rs.
struct account {
	u64 paid[2]; // nanoseconds since `epoch`
	u64 per_second;
	u64 burst;
	u64 epoch;
};

// Why a packet of a flow went up.
enum passed {
	NO_LINK,
	NO_OTHER_CHANNEL,
	LAST_HOP,
	UNFINISHED_CHECKSUM,
	NO_CHECKSUM,
	TOO_LONG,
	ENDED,
	NO_ROOM,
	OTHER_WAY,
	NO_CROSSING,
	REASONS,
};

// There is but one interface.
#define ANY 0xffffffff

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * FLOWS);
	__type(key, struct key);
	__type(value, struct route);
} routes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, FLOWS);
	__type(key, u32);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, ACCOUNTS);
	__type(key, u32);
	__type(value, struct account);
} accounts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASONS);
	__type(key, u32);
	__type(value, u64);
} passes SEC(".maps");

// A packet as it came.
struct packet {
	struct key key;
	u32 l2;      // bytes before the IP header
	u32 udp;     // bytes of UDP, with its header
	u32 payload; // bytes of what is relayed
	u32 padding; // bytes behind that; 3 at most
	__be32 traffic; // version, traffic class: the first four bytes of an IPv6 header, without the flow label
	__be16 checksum;
	u8 hops;
	u8 v6;
	u8 dont_fragment;
};

#define always static __always_inline

always int pass(enum passed why)
{
	u32 key = why;
	u64 *count = bpf_map_lookup_elem(&passes, &key);
	if (count)
		*count += 1;
	return XDP_PASS;
}

always u32 fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

// Adds to a sum what takes `value` away from it.
#define minus(value) (0xffff - (u16)(value))

always u32 ip_header(int v6)
{
	return v6 ? IPV6 : IPV4;
}

always u32 channel_header(__be16 channel)
{
	return channel ? CHANNEL : 0;
}

always u32 ipv4_sum(const __be16 *header)
{
	u64 sum = 0;
#pragma unroll
	for (int word = 0; word < IPV4 / 2; word++)
		sum += header[word];
	return fold(sum);
}

always void map_v4(struct address *address, __be32 v4)
{
	address->words[0] = 0;
	address->words[1] = ((u64)v4 << 32) | bpf_htonl(0xffff);
}

// Where the IP header begins, or 0 for what is neither IPv4 nor IPv6 behind two tags at most.
always u32 read_link(void *data, void *end, u16 *type)
{
	u32 at = MACS;
#pragma unroll
	for (int tags = 0; tags < 3; tags++) {
		__be16 *here = data + at;
		if ((void *)(here + 1) > end)
			return 0;
		*type = bpf_ntohs(*here);
		if (*type == ETH_IPV4 || *type == ETH_IPV6)
			return at + 2;
		if (*type != ETH_VLAN && *type != ETH_QINQ)
			return 0;
		at += VLAN;
	}
	return 0;
}

// Reads a UDP packet of one piece and without options, and nothing else.
always int read_packet(void *data, void *end, struct packet *packet)
{
	u16 type = 0;
	u32 total;
	packet->l2 = read_link(data, end, &type);
	// Only from one machine to one.
	if (!packet->l2 || (((u8 *)data)[0] | ((u8 *)data)[6]) & 1)
		return 0;
	u8 *ip = data + packet->l2;
	if (type == ETH_IPV4) {
		if ((void *)(ip + IPV4 + UDP) > end)
			return 0;
		__be32 *words = (__be32 *)ip;
		u32 fragments = bpf_ntohl(words[1]) & 0xffff;
		if (ip[0] != 0x45 || ip[9] != 17 || fragments & ~DONT_FRAGMENT || ipv4_sum((__be16 *)ip) != 0xffff)
			return 0;
		total = bpf_ntohs(*(__be16 *)(ip + 2));
		packet->dont_fragment = fragments == DONT_FRAGMENT;
		packet->hops = ip[8];
		packet->traffic = bpf_htonl(6 << 28 | (u32)ip[1] << 20);
		map_v4(&packet->key.remote, words[3]);
		map_v4(&packet->key.local, words[4]);
		ip += IPV4;
		if (total < IPV4)
			return 0;
		total -= IPV4;
	} else {
		if ((void *)(ip + IPV6 + UDP) > end)
			return 0;
		__be32 *words = (__be32 *)ip;
		if (ip[0] >> 4 != 6 || ip[6] != 17)
			return 0;
		total = bpf_ntohs(*(__be16 *)(ip + 4));
		packet->v6 = 1;
		packet->hops = ip[7];
		packet->traffic = words[0] & bpf_htonl(0xfff00000);
		__builtin_memcpy(&packet->key.remote, ip + 8, 16);
		__builtin_memcpy(&packet->key.local, ip + 24, 16);
		ip += IPV6;
	}
	__be16 *udp = (__be16 *)ip;
	if (total < UDP || bpf_ntohs(udp[2]) != total)
		return 0;
	packet->key.remote_port = udp[0];
	packet->key.local_port = udp[1];
	packet->checksum = udp[3];
	packet->udp = total;
	packet->payload = total - UDP;
	// What the kernel coalesced, or cut short, is longer than what lies here.
	return (void *)(ip + total) <= end;
}

// The channel of ChannelData, with nothing behind it but what pads it to words, or 0.
always __be16 read_channel(void *data, void *end, struct packet *packet)
{
	__be16 *header = data + packet->l2 + ip_header(packet->v6) + UDP;
	if (packet->payload < CHANNEL || (void *)(header + 2) > end)
		return 0;
	u16 number = bpf_ntohs(header[0]), length = bpf_ntohs(header[1]);
	u32 padding = packet->payload - CHANNEL - length;
	if (number < 0x4000 || number > 0x7fff || padding > 3)
		return 0;
	packet->payload = length;
	packet->padding = padding;
	return header[0];
}

// What the padding adds to the sum of the packet, of which it is no part any more.
always int sum_padding(void *data, void *end, const struct packet *packet, u32 *sum)
{
	u32 length = packet->payload;
	*sum = 0;
	if (!packet->padding)
		return 1;
	u32 place = packet->l2 + ip_header(packet->v6) + UDP + CHANNEL + length;
	// A bound that the verifier sees, in one register; no packet reaches it.
	asm volatile("" : "+r"(place));
	if (place > 0x7fff)
		return 0;
	u8 *padding = data + place;
#pragma unroll
	for (u32 at = 0; at < 3; at++) {
		if (at < packet->padding) {
			if (padding + at + 1 > (u8 *)end)
				return 0;
			*sum += (length + at) & 1 ? bpf_htons(padding[at]) : bpf_htons((u16)padding[at] << 8);
		}
	}
	return 1;
}

always struct end client_of(struct flow *flow)
{
	return (struct end){ &flow->client, &flow->client_link, &flow->to_client };
}

always struct end peer_of(struct flow *flow)
{
	return (struct end){ &flow->peer, &flow->peer_link, &flow->to_peer };
}

always struct flow *find(const struct key *key)
{
	struct route *route = bpf_map_lookup_elem(&routes, key);
	if (!route)
		return 0;
	u32 generation = route->generation;
	struct flow *flow = bpf_map_lookup_elem(&flows, &route->flow);
	return flow && flow->generation == generation ? flow : 0;
}

// The flow by which the other client of this host hears of this one.
always struct flow *opposite(const struct flow *flow)
{
	struct key key = { .local = flow->to_peer.remote, .remote = flow->to_peer.local };
	key.local_port = flow->peer.remote_port;
	key.remote_port = flow->peer.local_port;
	return find(&key);
}

// Whoever sent this is reached by the same link. Written only when it has changed. Gives 0 if it came by another way than the
// kernel would answer by: somebody may only say that it is theirs (RFC 3704).
always int learn(struct link *link, void *data, void *end, u32 length, u32 interface)
{
	u32 *seen = data, *known = (u32 *)link->header;
	if (link->way != ANY && link->way != interface)
		return 0;
	// Read before: it is no shorter than the headers behind it.
	if (data + LONGEST_LINK > end)
		return 0;
	u32 differs = !link->heard | (link->length ^ length) | (link->interface ^ interface);
	differs |= (seen[0] ^ known[0]) | (seen[1] ^ known[1]) | (seen[2] ^ known[2]);
	if (length > MACS + 2)
		differs |= seen[3] ^ known[3];
	if (length > MACS + 2 + VLAN)
		differs |= seen[4] ^ known[4];
	if (!differs)
		return 1;
	// What lies behind a shorter header is never looked at.
	__builtin_memcpy(link->header, data, LONGEST_LINK);
	link->length = length;
	link->heard = 1;
	link->interface = interface;
	return 1;
}

// Takes from what the agent may relay, as `Allowance::take` does.
always int take(u32 number, u32 direction, u32 bytes, u64 now)
{
	if (!number)
		return 1;
	number -= 1;
	struct account *account = bpf_map_lookup_elem(&accounts, &number);
	if (!account || !account->per_second)
		return 0;
	// This clock is coarse, and may be behind the one by which the epoch was set.
	now = now > account->epoch ? now - account->epoch : 0;
	u64 costs = ((u64)bytes * 1000000000 + account->per_second - 1) / account->per_second;
	u64 *place = &account->paid[direction & 1];
	u64 before = *(volatile u64 *)place;
	for (int tried = 0; tried < TRIES; tried++) {
		u64 paid = (before > now ? before : now) + costs;
		if (paid - now > account->burst)
			return 0;
		u64 found = __sync_val_compare_and_swap(place, before, paid);
		if (found == before)
			return 1;
		before = found;
	}
	return 0;
}

always void add(struct far *count, u32 bytes, u64 now)
{
	__sync_fetch_and_add(&count->packets, 1);
	__sync_fetch_and_add(&count->bytes, bytes);
	count->last = now;
}

always int drop(struct far *count, u64 now)
{
	__sync_fetch_and_add(&count->dropped, 1);
	count->last = now;
	return XDP_DROP;
}

// What becomes of a packet.
struct way {
	struct flow *sender;   // whose client sent it; 0 for a peer elsewhere
	struct flow *receiver; // whose client gets it; 0 for a peer elsewhere
	struct end from;       // where it came
	struct end to;         // where it leaves
	__be16 channel;        // that it leaves by; 0: none
	u8 crosses;            // it may leave by another interface
};

// Why it cannot go that way as it should; -1: it can.
always int hindrance(struct xdp_md *ctx, const struct packet *packet, const struct way *way)
{
	const struct facts *from = way->from.facts, *to = way->to.facts;
	const struct link *link = way->to.link;
	u32 leaves = ip_header(to->v6) + UDP + channel_header(way->channel) + packet->payload;
	if (!link->length)
		return NO_LINK;
	if (link->way != way->from.link->way && !way->crosses)
		return NO_CROSSING;
	// RFC 8656 §14: one hop less. The last one is for user space, which sets it anew.
	if (packet->hops <= 1)
		return LAST_HOP;
	if (!packet->checksum && (packet->v6 || to->v6))
		return NO_CHECKSUM;
	// A sender of this machine leaves the checksum to the card: so far it is that of the pseudo-header alone.
	u64 pseudo = from->sum + minus(from->local_port) + minus(from->remote_port) + bpf_htons(packet->udp) + bpf_htons(17);
	if (packet->checksum && fold(pseudo + minus(packet->checksum)) == 0xffff)
		return UNFINISHED_CHECKSUM;
	// RFC 7915 §4: it would have to be cut.
	if (!packet->v6 && to->v6 && !packet->dont_fragment && leaves > IPV6_LEAST)
		return TOO_LONG;
	if (bpf_check_mtu(ctx, link->interface, &leaves, 0, 0))
		return TOO_LONG;
	return -1;
}

// The checksum as it came, with what changes taken away and added. The lengths count twice: in the pseudo-header, too.
always u16 new_checksum(const struct packet *packet, const struct way *way, u32 padding)
{
	if (!packet->checksum)
		return 0;
	u32 leaves = UDP + channel_header(way->channel) + packet->payload;
	u64 sum = minus(packet->checksum) + minus(way->from.facts->sum) + way->to.facts->sum + minus(padding);
	sum += 2 * (u32)minus(bpf_htons(packet->udp)) + 2 * (u32)bpf_htons(leaves);
	if (packet->key.channel)
		sum += minus(packet->key.channel) + minus(bpf_htons(packet->payload));
	if (way->channel)
		sum += way->channel + bpf_htons(packet->payload);
	u16 checksum = ~fold(sum);
	return checksum ? checksum : 0xffff;
}

// As they send to us, so we to them.
always void write_link(u8 *data, const struct link *link)
{
	__builtin_memcpy(data, link->header + 6, 6);
	__builtin_memcpy(data + 6, link->header, 6);
	if (link->length > MACS + 2)
		*(u32 *)(data + MACS) = *(u32 *)(link->header + MACS);
	if (link->length > MACS + 2 + VLAN)
		*(u32 *)(data + MACS + VLAN) = *(u32 *)(link->header + MACS + VLAN);
}

always void write_ipv4(u8 *ip, const struct packet *packet, const struct far *to, u32 total)
{
	__be16 *words = (__be16 *)ip;
	// RFC 8656 §14: as it came. RFC 7915 §5.1: IPv6 is never cut on its way, unless it is this short.
	int whole = packet->v6 ? total > IPV4_LEAST : packet->dont_fragment;
	words[0] = bpf_htons(0x4500 | ((bpf_ntohl(packet->traffic) >> 20) & 0xff));
	words[1] = bpf_htons(total);
	// RFC 6864: what may be cut needs a number of its own.
	words[2] = whole ? 0 : bpf_get_prandom_u32();
	words[3] = whole ? bpf_htons(DONT_FRAGMENT) : 0;
	words[4] = bpf_htons((u16)(packet->hops - 1) << 8 | 17);
	words[5] = 0;
	*(__be32 *)(ip + 12) = to->local.words[1] >> 32;
	*(__be32 *)(ip + 16) = to->remote.words[1] >> 32;
	words[5] = ~ipv4_sum(words);
}

always void write_ipv6(u8 *ip, const struct packet *packet, const struct far *to, __be32 label, u32 length)
{
	*(__be32 *)ip = packet->traffic | label;
	*(__be16 *)(ip + 4) = bpf_htons(length);
	ip[6] = 17;
	ip[7] = packet->hops - 1;
	__builtin_memcpy(ip + 8, &to->local, 16);
	__builtin_memcpy(ip + 24, &to->remote, 16);
}

// All that lies before the payload. Gives 0 if there is no room, which cannot be.
always int write_headers(struct xdp_md *ctx, const struct packet *packet, const struct way *way, u16 checksum)
{
	const struct facts *to = way->to.facts;
	const struct far *far = way->to.far;
	u8 *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u32 length = UDP + channel_header(way->channel) + packet->payload;
	u32 link = way->to.link->length - 2;
	if (link > LONGEST_LINK || data + LONGEST_LINK > end)
		return 0;
	write_link(data, way->to.link);
	// The verifier wants one pointer for all that follows, the type among it.
	u8 *type = data + link, *ip = type + 2;
	__be16 *udp;
	if (to->v6) {
		if (ip + IPV6 + UDP > end)
			return 0;
		*(__be16 *)type = bpf_htons(ETH_IPV6);
		write_ipv6(ip, packet, far, to->label, length);
		udp = (__be16 *)(ip + IPV6);
	} else {
		if (ip + IPV4 + UDP > end)
			return 0;
		*(__be16 *)type = bpf_htons(ETH_IPV4);
		write_ipv4(ip, packet, far, IPV4 + length);
		udp = (__be16 *)(ip + IPV4);
	}
	udp[0] = to->local_port;
	udp[1] = to->remote_port;
	udp[2] = bpf_htons(length);
	udp[3] = checksum;
	if (way->channel) {
		if ((void *)(udp + 6) > (void *)end)
			return 0;
		udp[4] = way->channel;
		udp[5] = bpf_htons(packet->payload);
	}
	return 1;
}

always int forward(struct xdp_md *ctx, const struct packet *packet, const struct way *way)
{
	u32 padding;
	if (!sum_padding((void *)(long)ctx->data, (void *)(long)ctx->data_end, packet, &padding))
		return XDP_PASS;
	u16 checksum = new_checksum(packet, way, fold(padding));
	u32 interface = way->to.link->interface;
	int stays = way->to.link->way == way->from.link->way;
	int before = packet->l2 + ip_header(packet->v6) + channel_header(packet->key.channel);
	int after = way->to.link->length + ip_header(way->to.facts->v6) + channel_header(way->channel);
	if (bpf_xdp_adjust_head(ctx, before - after))
		return pass(NO_ROOM);
	if (!write_headers(ctx, packet, way, checksum))
		return XDP_DROP;
	return stays ? XDP_TX : bpf_redirect(interface, 0);
}

// Takes the way, if those who pay for it can. A sender has paid, and its packet counts, although its receiver cannot.
always int travel(struct xdp_md *ctx, const struct packet *packet, const struct way *way, u64 now)
{
	struct flow *sender = way->sender, *receiver = way->receiver;
	u32 bytes = packet->payload;
	if (sender && !take(sender->account, 0, bytes, now))
		return drop(&sender->to_peer, now);
	if (receiver && !take(receiver->account, 1, bytes, now)) {
		if (sender)
			add(&sender->to_peer, bytes, now);
		return drop(&receiver->to_client, now);
	}
	int verdict = forward(ctx, packet, way);
	if (verdict == XDP_PASS)
		return verdict;
	if (sender)
		add(&sender->to_peer, bytes, now);
	if (receiver)
		add(&receiver->to_client, bytes, now);
	return verdict;
}

SEC("xdp")
int relay(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct packet packet = {};
	if (!read_packet(data, end, &packet))
		return XDP_PASS;
	struct flow *flow = 0;
	packet.key.channel = read_channel(data, end, &packet);
	if (packet.key.channel)
		flow = find(&packet.key);
	if (!flow) {
		packet.key.channel = 0;
		packet.payload = packet.udp - UDP;
		packet.padding = 0;
		flow = find(&packet.key);
	}
	if (!flow)
		return XDP_PASS;
	u64 now = bpf_ktime_get_coarse_ns();
	if (flow->until <= now)
		return pass(ENDED);
	// Our own addresses come from nowhere outside: what claims so is for the kernel to refuse.
	if (!packet.key.channel && flow->here)
		return XDP_PASS;
	struct way way = { .receiver = flow, .from = peer_of(flow), .crosses = flow->crosses };
	if (packet.key.channel) {
		way.sender = flow;
		way.from = client_of(flow);
		way.receiver = 0;
		way.to = peer_of(flow);
	}
	if (!learn(way.from.link, data, end, packet.l2, ctx->ingress_ifindex))
		return pass(OTHER_WAY);
	if (way.sender && flow->here) {
		way.receiver = opposite(flow);
		if (!way.receiver)
			return pass(NO_OTHER_CHANNEL);
		if (way.receiver->until <= now)
			return pass(ENDED);
	}
	if (way.receiver) {
		way.to = client_of(way.receiver);
		way.channel = way.receiver->channel;
	}
	int why = hindrance(ctx, &packet, &way);
	return why < 0 ? travel(ctx, &packet, &way, now) : pass(why);
}

char terms[] SEC("license") = "Dual MIT/GPL";
