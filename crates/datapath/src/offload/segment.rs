//! Header-split: the headers of each segment of a large frame are made here, and its payload stays where it is.
//!
//! What differs from segment to segment is what the kernel's own segmentation changes (net/ipv4/af_inet.c, tcp_offload.c,
//! udp_offload.c, net/ipv6/ip6_offload.c): lengths, the IPv4 identification, the sequence number, FIN and PSH on the last
//! segment alone, CWR on the first alone (RFC 3168 §6.1.2), checksums. A frame whose checksum is missing is one segment of
//! which nothing else changes.

use super::checksum::Sum;
use super::headers::{ETHERNET_HEADER_BYTES, HEADERS_MAX, IPV6_BYTES, NetHeader, Offloads, Plan, Segmentation};
use crate::stats::{DropReason, Offload};

/// Longest frame that is cut: what Linux sends at most (GSO_MAX_SIZE, include/linux/netdevice.h) and headers.
const LARGE_FRAME_MAX: u32 = (512 << 10) + HEADERS_MAX as u32;

pub(super) const TCP_SEQUENCE_AT: usize = 4;
pub(super) const TCP_FLAGS_AT: usize = 13;
pub(super) const TCP_FIN: u8 = 1;
pub(super) const TCP_PSH: u8 = 8;
pub(super) const TCP_CWR: u8 = 0x80;
pub(super) const UDP_LENGTH_AT: usize = 4;
pub(super) const IPV4_LENGTH_AT: usize = 2;
pub(super) const IPV4_ID_AT: usize = 4;
pub(super) const IPV4_CHECKSUM_AT: usize = 10;
pub(super) const IPV6_LENGTH_AT: usize = 4;

/// A frame on its way to become segments. One is made once, and used for many frames.
#[derive(Debug)]
pub struct Segmenter {
    plan: Plan,
    /// Those of the segment made last; as the guest made them at first.
    headers: [u8; HEADERS_MAX],
    payload_bytes: u32,
    payload_done: u32,
    original: Original,
}

/// What segments are made from, of the headers as the guest made them.
#[derive(Debug, Clone, Copy, Default)]
struct Original {
    /// The pseudo header's sum, but for the length.
    pseudo: Sum,
    tcp_sequence: [u8; 4],
    tcp_flags: u8,
}

impl Default for Segmenter {
    fn default() -> Self {
        Self {
            plan: Plan::AS_IS,
            headers: [0; HEADERS_MAX],
            payload_bytes: 0,
            payload_done: 0,
            original: Original::default(),
        }
    }
}

impl Segmenter {
    /// Begins with a frame of `len` bytes, of which `header` asks for something. `read` fills a buffer with its first
    /// bytes. No segment is to be longer than `segment_max` bytes.
    ///
    /// # Errors
    /// It cannot be done, or was not negotiated.
    pub fn begin(
        &mut self,
        offloads: Offloads,
        header: &NetHeader,
        len: u32,
        segment_max: u32,
        read: impl FnOnce(&mut [u8]),
    ) -> Result<(), DropReason> {
        let beginning = &mut self.headers[..header.headers_bound(len)];
        read(beginning);
        self.plan = Plan::new(offloads, header, beginning)?;
        self.payload_bytes = len - self.headers();
        self.payload_done = 0;
        if len > LARGE_FRAME_MAX || self.headers() + self.next_payload() > segment_max {
            return Err(DropReason::Oversize);
        }
        if let Some(how) = self.plan.segmentation {
            self.original = self.original(&how, len);
        }
        Ok(())
    }

    /// Begins with a frame of `len` bytes, an Ethernet header at least, of which nothing is asked.
    ///
    /// # Errors
    /// It is longer than `frame_max` bytes.
    pub fn begin_as_is(&mut self, len: u32, frame_max: u32, read: impl FnOnce(&mut [u8])) -> Result<(), DropReason> {
        read(&mut self.headers[..ETHERNET_HEADER_BYTES]);
        self.plan = Plan::AS_IS;
        self.payload_bytes = len - self.headers();
        self.payload_done = 0;
        if len > frame_max { Err(DropReason::Oversize) } else { Ok(()) }
    }

    /// The Ethernet header, as it is in every segment.
    pub fn ethernet(&self) -> [u8; ETHERNET_HEADER_BYTES] {
        self.get(0)
    }

    /// The driver's sum counts the whole length. It is taken from the field, and not made anew, for with a routing header
    /// the address that counts is not in the IPv6 header (RFC 8200 §8.1).
    fn original(&self, how: &Segmentation, len: u32) -> Original {
        let Plan { sum_start, sum_field, .. } = self.plan;
        let mut pseudo = Sum::default();
        pseudo.add_bytes(&self.headers[sum_field..sum_field + 2]);
        pseudo.remove_bytes(&(len - sum_start as u32).to_be_bytes());
        if !how.is_tcp {
            return Original { pseudo, ..Original::default() };
        }
        Original {
            pseudo,
            tcp_sequence: self.get(sum_start + TCP_SEQUENCE_AT),
            tcp_flags: self.headers[sum_start + TCP_FLAGS_AT],
        }
    }

    /// What the frame is counted as, if something was asked for.
    pub fn offload(&self) -> Option<Offload> {
        self.plan.offload
    }

    /// Bytes of each segment's headers.
    #[inline]
    pub fn headers(&self) -> u32 {
        self.plan.headers as u32
    }

    /// Payload bytes of the next segment: those behind the ones that are done. The first one is the longest.
    #[inline]
    pub fn next_payload(&self) -> u32 {
        let left = self.payload_bytes - self.payload_done;
        self.plan.segmentation.map_or(left, |how| left.min(u32::from(how.payload_max)))
    }

    /// Makes the headers of the next segment and goes on to the one behind it. `add_payload` adds its payload to the sum.
    pub fn make(&mut self, add_payload: impl FnOnce(&mut Sum)) -> &[u8] {
        let payload = self.next_payload();
        if self.plan.offload.is_some() {
            self.make_headers(payload, add_payload);
        }
        self.payload_done += payload;
        &self.headers[..self.plan.headers]
    }

    fn make_headers(&mut self, payload: u32, add_payload: impl FnOnce(&mut Sum)) {
        let mut sum = Sum::default();
        if let Some(how) = self.plan.segmentation {
            let transport_bytes = (self.plan.headers - self.plan.sum_start) as u32 + payload;
            self.make_ip(&how, transport_bytes as u16);
            self.make_transport(&how, payload, transport_bytes as u16);
            sum = self.original.pseudo;
            sum.add_bytes(&transport_bytes.to_be_bytes());
        }
        sum.add_bytes(&self.headers[self.plan.sum_start..self.plan.headers]);
        add_payload(&mut sum);
        // The kernel writes the other zero everywhere but in TCP segments (net/core/dev.c: skb_checksum_help).
        let is_tcp = self.plan.segmentation.is_some_and(|how| how.is_tcp);
        let checksum = if is_tcp { sum.checksum() } else { sum.checksum_not_zero() };
        self.put(self.plan.sum_field, checksum);
    }

    /// Whether all segments are made, if one is.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.payload_done == self.payload_bytes
    }

    fn make_ip(&mut self, how: &Segmentation, transport_bytes: u16) {
        let header_bytes = self.plan.sum_start - how.ip;
        if !how.is_ipv4 {
            self.put(how.ip + IPV6_LENGTH_AT, ((header_bytes - IPV6_BYTES) as u16 + transport_bytes).to_be_bytes());
            return;
        }
        self.put(how.ip + IPV4_LENGTH_AT, (header_bytes as u16 + transport_bytes).to_be_bytes());
        if self.payload_done > 0 {
            let id = u16::from_be_bytes(self.get(how.ip + IPV4_ID_AT)).wrapping_add(1);
            self.put(how.ip + IPV4_ID_AT, id.to_be_bytes());
        }
        self.put(how.ip + IPV4_CHECKSUM_AT, [0; 2]);
        let mut sum = Sum::default();
        sum.add_bytes(&self.headers[how.ip..self.plan.sum_start]);
        self.put(how.ip + IPV4_CHECKSUM_AT, sum.checksum());
    }

    /// All but the checksum, whose field is left zero.
    fn make_transport(&mut self, how: &Segmentation, payload: u32, transport_bytes: u16) {
        let transport = self.plan.sum_start;
        self.put(self.plan.sum_field, [0; 2]);
        if !how.is_tcp {
            self.put(transport + UDP_LENGTH_AT, transport_bytes.to_be_bytes());
            return;
        }
        let sequence = u32::from_be_bytes(self.original.tcp_sequence).wrapping_add(self.payload_done);
        self.put(transport + TCP_SEQUENCE_AT, sequence.to_be_bytes());
        let (is_first, is_last) = (self.payload_done == 0, self.payload_done + payload == self.payload_bytes);
        let elsewhere = if is_first { 0 } else { TCP_CWR } | if is_last { 0 } else { TCP_FIN | TCP_PSH };
        self.headers[transport + TCP_FLAGS_AT] = self.original.tcp_flags & !elsewhere;
    }

    #[inline]
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.headers[at + i])
    }

    #[inline]
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.headers[at..at + N].copy_from_slice(&bytes);
    }
}
