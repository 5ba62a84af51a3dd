//! GRO: frames of a flow that follow one another in a burst become one large packet, by the rules of the kernel's own
//! (net/ipv4/tcp_offload.c: tcp_gro_receive; udp_offload.c: udp_gro_receive_segment; af_inet.c and net/ipv6/ip6_offload.c:
//! the network headers).
//!
//! Invariant: a packet that is cut into segments again is the frames that it was made of, byte for byte; but for the
//! identification of IPv4 packets that may not be fragmented and have all the same, which nobody may look at (RFC 6864).
//! For that, checksums are verified before anything is merged: the guest is told that they are right.
//!
//! The order of a flow's frames is kept: a frame that cannot be merged ends its flow's packet, and one of which the flow
//! is unknown ends all packets.

use super::checksum::Sum;
use super::headers::{
    IPPROTO_TCP, IPPROTO_UDP, IPV4_BYTES_MIN, IPV6_BYTES, NET_HEADER_BYTES, TCP_BYTES_MAX, TCP_CHECKSUM_AT, UDP_BYTES,
    UDP_CHECKSUM_AT, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4, VLAN_TAG_BYTES, VLAN_TAGS_MAX, be_u16, network_header, tcp_bytes,
};
use super::segment::{
    IPV4_CHECKSUM_AT, IPV4_ID_AT, IPV4_LENGTH_AT, IPV6_LENGTH_AT, TCP_CWR, TCP_FIN, TCP_FLAGS_AT, TCP_PSH,
    TCP_SEQUENCE_AT, UDP_LENGTH_AT,
};
use crate::guest_memory::{GuestMemory, Segment};

const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const VIRTIO_NET_F_GUEST_USO4: u64 = 1 << 54;
const VIRTIO_NET_F_GUEST_USO6: u64 = 1 << 55;

const ETHERNET_BYTES: usize = 14;
/// Headers of a frame that can be merged: no IPv4 options, no IPv6 extensions.
const HEADERS_MAX: usize = ETHERNET_BYTES + VLAN_TAGS_MAX * VLAN_TAG_BYTES + IPV6_BYTES + TCP_BYTES_MAX;
/// Packets in the making; one that is one too many ends the oldest.
const OPEN_MAX: usize = 8;
/// A length field has 16 bits.
const IP_BYTES_MAX: u32 = 0xffff;

const TCP_ACKNOWLEDGED_AT: usize = 8;
const TCP_SYN: u8 = 2;
const TCP_RST: u8 = 4;
const TCP_ACK: u8 = 0x10;
const TCP_URG: u8 = 0x20;
const IPV4_FLAGS_AT: usize = 6;
const IPV4_DONT_FRAGMENT: u16 = 0x4000;

/// What a driver takes merged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merging(u64);

impl Merging {
    /// That of negotiated virtio features. All need VIRTIO_NET_F_GUEST_CSUM (VIRTIO 1.3 §5.1.3.1), and a large packet is
    /// spread over the buffers of its frames.
    pub fn of_features(features: u64) -> Self {
        const NEEDED: u64 = VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_MRG_RXBUF;
        const KINDS: u64 =
            VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6 | VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6;
        Self(if features & NEEDED == NEEDED { features & KINDS } else { 0 })
    }

    /// Whether nothing is merged.
    #[inline]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    fn takes(self, shape: Shape) -> bool {
        let feature = match (shape.is_tcp, shape.is_ipv4) {
            (true, true) => VIRTIO_NET_F_GUEST_TSO4,
            (true, false) => VIRTIO_NET_F_GUEST_TSO6,
            (false, true) => VIRTIO_NET_F_GUEST_USO4,
            (false, false) => VIRTIO_NET_F_GUEST_USO6,
        };
        self.0 & feature != 0
    }
}

/// Where the headers of a frame are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Shape {
    is_ipv4: bool,
    is_tcp: bool,
    ip: usize,
    transport: usize,
    /// Length of all headers.
    headers: usize,
}

/// A frame of the burst whose flow is known, and what has become of it.
#[derive(Debug, Clone, Copy)]
struct Seen {
    shape: Shape,
    headers: [u8; HEADERS_MAX],
    payload: u32,
    /// Whether its checksum has been verified.
    intact: bool,
    /// The pieces of all frames of the burst that are its own.
    pieces: (usize, usize),
    /// As the first one of a packet: its payload, its frames, the last of them in `seen`, and whether all have the same
    /// IPv4 identification.
    merged: u32,
    count: u32,
    last: usize,
    is_fixed: bool,
    /// The next one of its packet.
    next: Option<usize>,
}

/// A packet that was made of several frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Large {
    /// The virtio-net header, without num_buffers.
    pub net_header: [u8; NET_HEADER_BYTES],
    headers: [u8; HEADERS_MAX],
    headers_len: usize,
}

impl Large {
    /// The headers of the packet, from Ethernet on; as long as those of each of its frames.
    pub fn headers(&self) -> &[u8] {
        &self.headers[..self.headers_len]
    }
}

/// What becomes of one frame of the burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is delivered as it is.
    Alone,
    /// It begins a packet.
    First,
    /// It is part of an earlier one.
    Merged,
}

/// The frames of a burst, and the packets that they make. Made once, nothing is allocated afterwards.
#[derive(Debug)]
pub struct Gro {
    merging: Merging,
    seen: Vec<Seen>,
    /// For each frame of the burst, its place in `seen`; none behind those that were looked at.
    frames: Vec<Option<usize>>,
    has_merged: bool,
    /// The first frames, in `seen`, of packets that others may still join.
    open: Vec<usize>,
}

impl Gro {
    /// For bursts of up to `burst` frames.
    pub fn new(merging: Merging, burst: usize) -> Self {
        Self {
            merging,
            seen: Vec::with_capacity(burst),
            frames: Vec::with_capacity(burst),
            has_merged: false,
            open: Vec::with_capacity(OPEN_MAX),
        }
    }

    /// Forgets the burst before.
    pub fn begin(&mut self) {
        self.seen.clear();
        self.frames.clear();
        self.has_merged = false;
        self.open.clear();
    }

    /// Looks at the next frame of the burst: `pieces` are those of all frames so far, and its own begin at `first`.
    pub fn add(&mut self, memory: &GuestMemory, pieces: &[Segment], first: usize) {
        let Some((seen, mergeable)) = self.look(memory, pieces, first) else {
            self.add_unknown();
            return;
        };
        let new = self.seen.len();
        self.seen.push(seen);
        self.frames.push(Some(new));
        if let Some(place) = self.open.iter().position(|&head| same_flow(&self.seen[head], &self.seen[new])) {
            let head = self.open[place];
            let joins = mergeable && self.fits(head, new) && self.is_intact(head, memory, pieces);
            if joins && self.is_intact(new, memory, pieces) {
                if self.join(head, new) {
                    self.open.remove(place);
                }
                return;
            }
            self.open.remove(place);
        }
        if mergeable && !ends_packet(&self.seen[new]) {
            if self.open.len() == OPEN_MAX {
                self.open.remove(0);
            }
            self.open.push(new);
        }
    }

    /// The next frame of the burst is not looked at.
    pub fn add_unknown(&mut self) {
        self.frames.push(None);
        self.open.clear();
    }

    /// Whether any frame of the burst has joined another.
    pub fn has_merged(&self) -> bool {
        self.has_merged
    }

    /// What becomes of a frame of the burst.
    pub fn fate(&self, frame: usize) -> Fate {
        match self.frames.get(frame).copied().flatten().map(|seen| &self.seen[seen]) {
            None => Fate::Alone,
            Some(seen) if seen.count == 0 => Fate::Merged,
            Some(seen) if seen.count == 1 => Fate::Alone,
            Some(_) => Fate::First,
        }
    }

    /// The frames of a packet, from its first one on: the pieces of each, and the length of its headers.
    pub fn packet(&self, frame: usize) -> impl Iterator<Item = ((usize, usize), usize)> {
        std::iter::successors(self.frames[frame], |&seen| self.seen[seen].next)
            .map(|seen| (self.seen[seen].pieces, self.seen[seen].shape.headers))
    }

    /// The headers of the packet that begins with a frame (VIRTIO 1.3 §5.1.6.4.1): its transport checksum is that of the
    /// pseudo header, and said to be incomplete.
    pub fn large(&self, frame: usize) -> Option<Large> {
        let head = &self.seen[self.frames[frame]?];
        let shape = head.shape;
        let (gso_type, sum_at) = match (shape.is_tcp, shape.is_ipv4) {
            (true, true) => (VIRTIO_NET_HDR_GSO_TCPV4, TCP_CHECKSUM_AT),
            (true, false) => (VIRTIO_NET_HDR_GSO_TCPV6, TCP_CHECKSUM_AT),
            (false, _) => (VIRTIO_NET_HDR_GSO_UDP_L4, UDP_CHECKSUM_AT),
        };
        let mut net_header = [0; NET_HEADER_BYTES];
        (net_header[0], net_header[1]) = (VIRTIO_NET_HDR_F_NEEDS_CSUM, gso_type);
        let fields = [shape.headers as u16, head.payload as u16, shape.transport as u16, sum_at as u16];
        for (bytes, field) in net_header[2..].chunks_exact_mut(2).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        let mut headers = head.headers;
        let transport_len = (shape.headers - shape.transport) as u32 + head.merged;
        set_ip_length(&mut headers, shape, transport_len as u16);
        if !shape.is_tcp {
            put(&mut headers, shape.transport + UDP_LENGTH_AT, (transport_len as u16).to_be_bytes());
        }
        let pseudo = pseudo_header(&headers, shape, transport_len).checksum().map(|byte| !byte);
        put(&mut headers, shape.transport + sum_at, pseudo);
        Some(Large { net_header, headers, headers_len: shape.headers })
    }

    /// Takes the next frame's headers apart; `None` if its flow is unknown. Also whether it can be merged at all.
    fn look(&self, memory: &GuestMemory, pieces: &[Segment], first: usize) -> Option<(Seen, bool)> {
        let len: u32 = pieces[first..].iter().map(|piece| piece.len).sum();
        let mut headers = [0; HEADERS_MAX];
        let start = pieces.get(first)?;
        let bytes = &mut headers[..(start.len as usize).min(HEADERS_MAX)];
        memory.read_bytes(start.addr, bytes);
        let shape = shape(bytes)?;
        let payload = len.checked_sub(shape.headers as u32)?;
        let mergeable = self.merging.takes(shape) && is_mergeable(bytes, shape, len, payload);
        let pieces = (first, pieces.len());
        let last = self.seen.len();
        let seen = Seen {
            shape,
            headers,
            payload,
            intact: false,
            pieces,
            merged: payload,
            count: 1,
            last,
            is_fixed: false,
            next: None,
        };
        Some((seen, mergeable))
    }

    /// Whether `new` goes on where the packet of `head` ends, and is like its frames in all that segments have in common.
    fn fits(&self, head: usize, new: usize) -> bool {
        let (head, new) = (&self.seen[head], &self.seen[new]);
        let (shape, ip) = (head.shape, head.shape.ip);
        let same = |from: usize, to: usize| head.headers[from..to] == new.headers[from..to];
        let ip_len = (shape.headers - ip) as u32 + head.merged + new.payload;
        let in_network = if shape.is_ipv4 {
            // Version, header length, TOS; flags; TTL.
            same(ip, ip + IPV4_LENGTH_AT) && same(ip + IPV4_FLAGS_AT, ip + IPV4_FLAGS_AT + 3) && follows(head, new)
        } else {
            // Version, traffic class, flow label; hop limit.
            same(ip, ip + IPV6_LENGTH_AT) && same(ip + 7, ip + 8)
        };
        let in_transport = !shape.is_tcp || self.fits_tcp(head, new);
        shape == new.shape && new.payload <= head.payload && ip_len <= IP_BYTES_MAX && in_network && in_transport
    }

    fn fits_tcp(&self, head: &Seen, new: &Seen) -> bool {
        let at = head.shape.transport;
        let same = |from: usize, to: usize| head.headers[at + from..at + to] == new.headers[at + from..at + to];
        let sequence = |seen: &Seen| u32::from_be_bytes(get(&seen.headers, at + TCP_SEQUENCE_AT));
        let flags = |seen: &Seen| seen.headers[at + TCP_FLAGS_AT] & !(TCP_FIN | TCP_PSH);
        sequence(new) == sequence(head).wrapping_add(head.merged)
            && flags(head) == flags(new)
            // What was received of the other side, and all but flags and checksum behind it: options too.
            && same(TCP_ACKNOWLEDGED_AT, TCP_FLAGS_AT)
            && same(TCP_FLAGS_AT + 1, TCP_CHECKSUM_AT)
            && same(TCP_CHECKSUM_AT + 2, head.shape.headers - at)
    }

    /// Whether the transport checksum of a frame is right.
    fn is_intact(&mut self, seen: usize, memory: &GuestMemory, pieces: &[Segment]) -> bool {
        let seen = &mut self.seen[seen];
        if !seen.intact {
            let transport_len = (seen.shape.headers - seen.shape.transport) as u32 + seen.payload;
            let mut sum = pseudo_header(&seen.headers, seen.shape, transport_len);
            let (first, end) = seen.pieces;
            let mut before = seen.shape.transport as u32;
            for piece in &pieces[first..end] {
                let mut covered = *piece;
                before -= covered.take(before).len;
                sum.add_memory(memory, covered);
            }
            seen.intact = sum.checksum() == [0, 0];
        }
        seen.intact
    }

    /// Puts `new` behind the packet of `head`; whether that ends it.
    fn join(&mut self, head: usize, new: usize) -> bool {
        self.has_merged = true;
        let joining = self.seen[new];
        let last = self.seen[head].last;
        self.seen[last].next = Some(new);
        self.seen[new].count = 0;
        let head = &mut self.seen[head];
        head.is_fixed |= head.shape.is_ipv4 && identification(head) == identification(&joining);
        (head.last, head.count, head.merged) = (new, head.count + 1, head.merged + joining.payload);
        if head.shape.is_tcp {
            let at = head.shape.transport + TCP_FLAGS_AT;
            head.headers[at] |= joining.headers[at] & (TCP_FIN | TCP_PSH);
        }
        joining.payload < head.payload || ends_packet(&joining)
    }
}

/// Finds the headers of a frame; `None` if it is not whole TCP or UDP, right behind an IP header without options.
fn shape(frame: &[u8]) -> Option<Shape> {
    let network = network_header(frame)?;
    let plain = if network.is_ipv4 { IPV4_BYTES_MIN } else { IPV6_BYTES };
    let is_tcp = network.protocol == IPPROTO_TCP;
    let transport_bytes = if is_tcp { tcp_bytes(frame, network.transport)? } else { UDP_BYTES };
    let headers = network.transport + transport_bytes;
    let known = (is_tcp || network.protocol == IPPROTO_UDP)
        && network.transport == network.ip + plain
        && headers <= frame.len();
    known.then_some(Shape { is_ipv4: network.is_ipv4, is_tcp, ip: network.ip, transport: network.transport, headers })
}

/// Whether a frame of `len` bytes may be merged with others: nothing but payload that is acknowledged or not, and no byte
/// behind it.
fn is_mergeable(frame: &[u8], shape: Shape, len: u32, payload: u32) -> bool {
    let Shape { ip, transport, .. } = shape;
    let field = |at: usize| be_u16(frame, at).unwrap_or_default();
    let behind_ip = len - transport as u32;
    let in_network = if shape.is_ipv4 {
        let mut sum = Sum::default();
        sum.add_bytes(&frame[ip..transport]);
        u32::from(field(ip + IPV4_LENGTH_AT)) == behind_ip + IPV4_BYTES_MIN as u32
            && field(ip + IPV4_FLAGS_AT) & !IPV4_DONT_FRAGMENT == 0
            && sum.checksum() == [0, 0]
    } else {
        u32::from(field(ip + IPV6_LENGTH_AT)) == behind_ip
    };
    let in_transport = if shape.is_tcp {
        frame[transport + TCP_FLAGS_AT] & (TCP_ACK | TCP_SYN | TCP_RST | TCP_URG | TCP_CWR) == TCP_ACK
    } else {
        // Without a checksum none can be promised for the segments of a large packet.
        u32::from(field(transport + UDP_LENGTH_AT)) == behind_ip && field(transport + UDP_CHECKSUM_AT) != 0
    };
    payload > 0 && in_network && in_transport
}

/// Whether nothing may be merged behind this frame: its sender has pushed or ended.
fn ends_packet(seen: &Seen) -> bool {
    seen.shape.is_tcp && seen.headers[seen.shape.transport + TCP_FLAGS_AT] & (TCP_FIN | TCP_PSH) != 0
}

/// Whether two frames are of one flow: Ethernet and VLAN tags, addresses, ports.
fn same_flow(one: &Seen, other: &Seen) -> bool {
    let Shape { is_ipv4, ip, transport, .. } = one.shape;
    let same = |from: usize, to: usize| one.headers[from..to] == other.headers[from..to];
    let addresses = if is_ipv4 { ip + 12 } else { ip + 8 };
    (is_ipv4, one.shape.is_tcp, ip) == (other.shape.is_ipv4, other.shape.is_tcp, other.shape.ip)
        // Addresses end where ports begin.
        && same(addresses, transport + 4)
        && same(0, ip)
}

/// Whether the IPv4 identification is the one behind those of the packet: counted up, or, where that means nothing for
/// packets may not be fragmented, the same in all (af_inet.c: inet_gro_receive).
fn follows(head: &Seen, new: &Seen) -> bool {
    let flags = u16::from_be_bytes(get(&head.headers, head.shape.ip + IPV4_FLAGS_AT));
    let may_be_fixed = head.is_fixed || (head.count == 1 && flags & IPV4_DONT_FRAGMENT != 0);
    match identification(new).wrapping_sub(identification(head)) {
        0 => may_be_fixed,
        step => !head.is_fixed && u32::from(step) == head.count,
    }
}

fn identification(seen: &Seen) -> u16 {
    u16::from_be_bytes(get(&seen.headers, seen.shape.ip + IPV4_ID_AT))
}

fn set_ip_length(headers: &mut [u8], shape: Shape, transport_len: u16) {
    let Shape { ip, transport, .. } = shape;
    if !shape.is_ipv4 {
        put(headers, ip + IPV6_LENGTH_AT, transport_len.to_be_bytes());
        return;
    }
    put(headers, ip + IPV4_LENGTH_AT, (transport_len + IPV4_BYTES_MIN as u16).to_be_bytes());
    put(headers, ip + IPV4_CHECKSUM_AT, [0; 2]);
    let mut sum = Sum::default();
    sum.add_bytes(&headers[ip..transport]);
    put(headers, ip + IPV4_CHECKSUM_AT, sum.checksum());
}

fn pseudo_header(headers: &[u8], shape: Shape, transport_len: u32) -> Sum {
    let addresses = if shape.is_ipv4 { shape.ip + 12 } else { shape.ip + 8 };
    let protocol = if shape.is_tcp { IPPROTO_TCP } else { IPPROTO_UDP };
    let mut sum = Sum::default();
    sum.add_bytes(&headers[addresses..shape.transport]);
    sum.add_bytes(&transport_len.to_be_bytes());
    sum.add_bytes(&[0, 0, 0, protocol]);
    sum
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}
