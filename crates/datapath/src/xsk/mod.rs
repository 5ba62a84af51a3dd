//! AF_XDP: a UMEM over guest memory, the four rings, the socket (Documentation/networking/af_xdp.rst).
//!
//! Unaligned chunks of 4096 bytes, so that a frame may start at any byte. The headroom is the knob that bounds what
//! may be written: the kernel puts a frame at `fill address + 256 + headroom`, and no more than
//! `4096 - 256 - headroom` bytes of it (kernel-facts, sections 3 and 5; `include/net/xsk_buff_pool.h`).

mod ring;
mod rules;
mod socket;
#[cfg(any(test, feature = "test-utils"))]
// A model, for tests, fuzzing and benches: what it cannot do ends it.
#[allow(clippy::unwrap_used, missing_docs, dead_code)]
pub(crate) mod test_kernel;
#[cfg(test)]
mod tests;

pub use rules::{Contiguity, DriverRules};
use socket::RX_RING_SMALL_DESCS;

pub use socket::{
    BindMode, COMPLETION_RING_DESCS, RX_RING_DESCS, SharedFd, SharedUmem, SocketParams, Statistics, TX_RING_DESCS,
    Umem, XskSocket, register_umem, statistics,
};

use crate::guest_memory::{PAGE_BYTES, UmemAddr};

/// UMEM chunk size in bytes: what a fill entry claims.
pub const CHUNK_BYTES: u64 = PAGE_BYTES;
/// XDP_PACKET_HEADROOM of the kernel, always in front of a received frame.
pub const XDP_PACKET_HEADROOM: u64 = 256;
/// Longest frame that fits a chunk without headroom.
pub const FRAME_BYTES_MAX: u32 = (CHUNK_BYTES - XDP_PACKET_HEADROOM) as u32;
/// Longest frame in several pieces: of an MTU of 9216, the largest that is common, and a VLAN tag.
pub const LONG_FRAME_BYTES_MAX: u32 = 9216 + 14 + 4;
/// The kernel wants this much of each chunk left over: skb_shared_info (320) and 128 more (`xdp_umem_reg`).
const FRAME_BYTES_MIN: u32 = 320 + 128;

/// Bits of an rx descriptor's address that are the offset from the fill address (unaligned mode).
const OFFSET_SHIFT: u32 = 48;

/// How the UMEM was laid out: the same for every socket on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UmemLayout {
    /// Longest frame, or piece of a longer one, that the kernel may write to a chunk.
    pub frame_max: u32,
}

impl UmemLayout {
    /// The layout for frames up to `frame_max` bytes, corrected to what the kernel takes; `None` above a chunk.
    pub fn for_frames(frame_max: u32) -> Option<Self> {
        (frame_max <= FRAME_BYTES_MAX).then(|| Self { frame_max: frame_max.max(FRAME_BYTES_MIN) })
    }

    /// The UMEM's headroom.
    pub fn headroom(self) -> u32 {
        FRAME_BYTES_MAX - self.frame_max
    }

    /// Distance from a fill address to the frame that arrives there.
    #[inline]
    pub fn frame_offset(self) -> u64 {
        XDP_PACKET_HEADROOM + u64::from(self.headroom())
    }

    /// The fill address that makes a frame start at `frame`; the front slab keeps it from being negative.
    #[inline]
    pub fn fill_address(self, frame: UmemAddr) -> UmemAddr {
        debug_assert!(frame.0 >= self.frame_offset(), "the front slab is longer than the headroom");
        UmemAddr(frame.0 - self.frame_offset())
    }
}

/// An rx descriptor, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxDesc {
    /// The fill entry that it answers.
    pub fill: UmemAddr,
    /// Where the frame starts.
    pub frame: UmemAddr,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the frame goes on in the next descriptor (XDP_PKT_CONTD).
    pub more: bool,
}

impl From<libc::xdp_desc> for RxDesc {
    #[inline]
    fn from(desc: libc::xdp_desc) -> Self {
        let fill = UmemAddr(desc.addr & ((1 << OFFSET_SHIFT) - 1));
        Self {
            fill,
            frame: fill.plus(desc.addr >> OFFSET_SHIFT),
            len: desc.len,
            more: desc.options & libc::XDP_PKT_CONTD != 0,
        }
    }
}
