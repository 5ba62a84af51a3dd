//! What a frame from the guest asks for: its virtio-net header (VIRTIO 1.3 §5.1.6.2) and the protocol headers behind it.
//!
//! Both are copies of ours: what is checked here is what is sent.

use crate::stats::{DropReason, Offload};

const VIRTIO_NET_F_CSUM: u64 = 1 << 0;
const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
const VIRTIO_NET_F_HOST_ECN: u64 = 1 << 13;
const VIRTIO_NET_F_HOST_USO: u64 = 1 << 56;

pub(super) const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
const VIRTIO_NET_HDR_GSO_NONE: u8 = 0;
pub(super) const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
pub(super) const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
pub(super) const VIRTIO_NET_HDR_GSO_UDP_L4: u8 = 5;
const VIRTIO_NET_HDR_GSO_ECN: u8 = 0x80;

/// The part of the virtio-net header that is read; num_buffers and a hash mean nothing on tx.
pub const NET_HEADER_BYTES: usize = 10;
/// Room for the headers of a frame: Ethernet, two VLAN tags, IPv6, TCP with options, and 390 bytes of extension headers.
pub const HEADERS_MAX: usize = 512;

/// Destination, source, type.
pub const ETHERNET_HEADER_BYTES: usize = 14;
const ETHERTYPE_AT: usize = 12;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q: of the customer, of the service.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
pub(super) const VLAN_TAG_BYTES: usize = 4;
pub(super) const VLAN_TAGS_MAX: usize = 2;
pub(super) const IPV4_BYTES_MIN: usize = 20;
pub(super) const IPV6_BYTES: usize = 40;
pub(super) const IPPROTO_TCP: u8 = 6;
pub(super) const IPPROTO_UDP: u8 = 17;
/// Hop-by-hop options, routing, destination options: those that may lie in front of a segmented payload.
const IPV6_EXTENSIONS: [u8; 3] = [0, 43, 60];
pub(super) const TCP_BYTES_MIN: usize = 20;
pub(super) const TCP_BYTES_MAX: usize = 60;
pub(super) const TCP_CHECKSUM_AT: usize = 16;
pub(super) const UDP_BYTES: usize = 8;
pub(super) const UDP_CHECKSUM_AT: usize = 6;

/// The tx offloads that a driver has negotiated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads(u64);

impl Offloads {
    /// Those of negotiated virtio features. All need VIRTIO_NET_F_CSUM (VIRTIO 1.3 §5.1.3.1).
    pub fn of_features(features: u64) -> Self {
        let segmentation =
            VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6 | VIRTIO_NET_F_HOST_ECN | VIRTIO_NET_F_HOST_USO;
        Self(if features & VIRTIO_NET_F_CSUM == 0 { 0 } else { features & (VIRTIO_NET_F_CSUM | segmentation) })
    }

    /// Whether there are any: virtio-net headers mean nothing otherwise.
    #[inline]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    fn has(self, feature: u64) -> bool {
        self.0 & feature != 0
    }
}

/// A virtio-net header. `hdr_len` is left out: a hint that a driver may get wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetHeader {
    flags: u8,
    gso_type: u8,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl NetHeader {
    /// Takes the header apart.
    #[inline]
    pub fn parse(bytes: [u8; NET_HEADER_BYTES]) -> Self {
        let [flags, gso_type, _, _, size_low, size_high, start_low, start_high, offset_low, offset_high] = bytes;
        Self {
            flags,
            gso_type,
            gso_size: u16::from_le_bytes([size_low, size_high]),
            csum_start: u16::from_le_bytes([start_low, start_high]),
            csum_offset: u16::from_le_bytes([offset_low, offset_high]),
        }
    }

    /// As much of a frame of `len` bytes as its headers can be: the checksum begins where the transport header does.
    pub(super) fn headers_bound(&self, len: u32) -> usize {
        let behind = TCP_BYTES_MAX.max(usize::from(self.csum_offset) + 2);
        (usize::from(self.csum_start) + behind).min(HEADERS_MAX).min(len as usize)
    }

    /// Whether the frame is to be sent as it is.
    #[inline]
    pub fn asks_for_nothing(&self) -> bool {
        asks_for_nothing([self.flags, self.gso_type])
    }
}

/// Whether a header that begins with these bytes asks for nothing.
#[inline]
pub fn asks_for_nothing([flags, gso_type]: [u8; 2]) -> bool {
    flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 && gso_type == VIRTIO_NET_HDR_GSO_NONE
}

/// What is to be done to a frame. All offsets are from its start, and lie inside its headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// What it is counted as; `None` if nothing is asked for.
    pub offload: Option<Offload>,
    /// Length of the headers: what is made here.
    pub headers: usize,
    /// What the checksum covers begins here.
    pub sum_start: usize,
    /// Where it is written.
    pub sum_field: usize,
    pub segmentation: Option<Segmentation>,
}

/// How a frame is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segmentation {
    pub is_ipv4: bool,
    pub is_tcp: bool,
    /// Where the IP header begins.
    pub ip: usize,
    /// Payload of each segment but the last, in bytes.
    pub payload_max: u16,
}

impl Plan {
    /// A frame that goes out as it is, its Ethernet header apart.
    pub const AS_IS: Self =
        Self { offload: None, headers: ETHERNET_HEADER_BYTES, sum_start: 0, sum_field: 0, segmentation: None };

    /// What `header` asks for, of a frame whose first [`NetHeader::headers_bound`] bytes are `frame`.
    ///
    /// # Errors
    /// It cannot be done, or was not negotiated.
    pub fn new(offloads: Offloads, header: &NetHeader, frame: &[u8]) -> Result<Self, DropReason> {
        if header.gso_type == VIRTIO_NET_HDR_GSO_NONE {
            Self::checksum(header, frame).ok_or(DropReason::BadChecksumRequest)
        } else {
            Self::segments(offloads, header, frame).ok_or(DropReason::BadSegmentRequest)
        }
    }

    /// One frame whose checksum is missing. The driver has put the sum of the pseudo header into the field.
    fn checksum(header: &NetHeader, frame: &[u8]) -> Option<Self> {
        let sum_start = usize::from(header.csum_start);
        let sum_field = sum_start + usize::from(header.csum_offset);
        // No transport header lies in the Ethernet header, where a sum would change addresses that were checked.
        if sum_start < ETHERNET_HEADER_BYTES || sum_field + 2 > frame.len() {
            return None;
        }
        // With the whole transport header, if it is one: a frame without payload is a piece less then.
        let transport = match usize::from(header.csum_offset) {
            TCP_CHECKSUM_AT => tcp_bytes(frame, sum_start).unwrap_or(0),
            UDP_CHECKSUM_AT => UDP_BYTES,
            _ => 0,
        };
        let headers = (sum_start + transport).max(sum_field + 2).min(frame.len());
        Some(Self { offload: Some(Offload::Checksum), headers, sum_start, sum_field, segmentation: None })
    }

    fn segments(offloads: Offloads, header: &NetHeader, frame: &[u8]) -> Option<Self> {
        let with_ecn = header.gso_type & VIRTIO_NET_HDR_GSO_ECN != 0;
        let (feature, offload) = match (header.gso_type & !VIRTIO_NET_HDR_GSO_ECN, with_ecn) {
            (VIRTIO_NET_HDR_GSO_TCPV4, _) => (VIRTIO_NET_F_HOST_TSO4, Offload::Tso4),
            (VIRTIO_NET_HDR_GSO_TCPV6, _) => (VIRTIO_NET_F_HOST_TSO6, Offload::Tso6),
            (VIRTIO_NET_HDR_GSO_UDP_L4, false) => (VIRTIO_NET_F_HOST_USO, Offload::Uso),
            _ => return None,
        };
        let negotiated = offloads.has(feature) && (!with_ecn || offloads.has(VIRTIO_NET_F_HOST_ECN));
        if !negotiated || header.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || header.gso_size == 0 {
            return None;
        }
        let network = network_header(frame)?;
        let is_tcp = offload != Offload::Uso;
        let fits_type = match offload {
            Offload::Tso4 => network.is_ipv4,
            Offload::Tso6 => !network.is_ipv4,
            _ => true,
        };
        let (protocol, sum_at, transport) = match is_tcp {
            true => (IPPROTO_TCP, TCP_CHECKSUM_AT, tcp_bytes(frame, network.transport)?),
            false => (IPPROTO_UDP, UDP_CHECKSUM_AT, UDP_BYTES),
        };
        let headers = network.transport + transport;
        let is_where_said =
            usize::from(header.csum_start) == network.transport && usize::from(header.csum_offset) == sum_at;
        if !fits_type || network.protocol != protocol || !is_where_said || headers > frame.len() {
            return None;
        }
        let segmentation =
            Segmentation { is_ipv4: network.is_ipv4, is_tcp, ip: network.ip, payload_max: header.gso_size };
        let sum_start = network.transport;
        Some(Self {
            offload: Some(offload),
            headers,
            sum_start,
            sum_field: sum_start + sum_at,
            segmentation: Some(segmentation),
        })
    }
}

/// Where the headers of an IP packet are.
pub(super) struct Network {
    pub is_ipv4: bool,
    pub ip: usize,
    pub transport: usize,
    pub protocol: u8,
}

/// Finds the transport header of a frame that is IP, whole and not a fragment.
pub(super) fn network_header(frame: &[u8]) -> Option<Network> {
    let mut ethertype_at = ETHERTYPE_AT;
    let mut ethertype = be_u16(frame, ethertype_at)?;
    for _ in 0..VLAN_TAGS_MAX {
        if ETHERTYPES_VLAN.contains(&ethertype) {
            ethertype_at += VLAN_TAG_BYTES;
            ethertype = be_u16(frame, ethertype_at)?;
        }
    }
    let ip = ethertype_at + 2;
    let version = frame.get(ip)? >> 4;
    match (ethertype, version) {
        (ETHERTYPE_IPV4, 4) => {
            let header = usize::from(frame[ip] & 0xf) * 4;
            let is_fragment = be_u16(frame, ip + 6)? & 0x3fff != 0;
            let whole = header >= IPV4_BYTES_MIN && !is_fragment;
            let protocol = *frame.get(ip + 9)?;
            whole.then_some(Network { is_ipv4: true, ip, transport: ip + header, protocol })
        }
        (ETHERTYPE_IPV6, 6) => {
            let (mut protocol, mut transport) = (*frame.get(ip + 6)?, ip + IPV6_BYTES);
            // Each is 8 bytes at least, and the frame's beginning is short.
            while IPV6_EXTENSIONS.contains(&protocol) {
                protocol = *frame.get(transport)?;
                transport += 8 * (usize::from(*frame.get(transport + 1)?) + 1);
            }
            Some(Network { is_ipv4: false, ip, transport, protocol })
        }
        _ => None,
    }
}

/// Length of the TCP header at `start`.
pub(super) fn tcp_bytes(frame: &[u8], start: usize) -> Option<usize> {
    let bytes = usize::from(frame.get(start + 12)? >> 4) * 4;
    (bytes >= TCP_BYTES_MIN).then_some(bytes)
}

pub(super) fn be_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}
