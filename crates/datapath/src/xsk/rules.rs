//! What a driver may do to memory and what it takes: the limits of direct rx and tx on one socket.
//!
//! In copy mode the kernel is between us and the driver, and there are few. In zero-copy mode the NIC's own limits hold
//! (kernel-facts, sections 3 and 5 to 7); the driver table of the control plane has them by driver.

use super::{FRAME_BYTES_MAX, RX_RING_DESCS, RX_RING_SMALL_DESCS};
use crate::guest_memory::{GuestMemory, PAGE_BYTES, UmemAddr};

/// Limits of one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverRules {
    /// Guest buffers may be given to the driver at all.
    pub direct: bool,
    /// Most bytes that may be written from a received frame's start on.
    pub rx_write_max: u32,
    /// Writes may be padded up to a multiple of this address alignment.
    pub rx_write_align: u32,
    /// Bytes directly in front of a frame that the driver writes too (virtio_net: its own header).
    pub rx_write_before: u32,
    /// The driver goes wrong with fewer rx buffers than this, those of frames in the rx ring not counted.
    pub rx_buffers_min: u32,
    /// Longest frame that is sent.
    pub tx_frame_max: u32,
    /// Shortest frame that the driver takes; shorter ones are padded.
    pub tx_frame_min: u32,
    /// Most descriptors of one frame.
    pub tx_pieces_max: usize,
    /// Which memory is contiguous for the device.
    pub contiguity: Contiguity,
}

/// Which ranges of addresses are contiguous for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contiguity {
    /// The kernel copies: nothing needs to be.
    NotNeeded,
    /// Physical addresses are DMA addresses: whatever lies in one page of the backing file, huge ones included.
    WithinBackingPage,
    /// A translating IOMMU maps every 4 KiB page on its own.
    WithinBasePage,
}

impl DriverRules {
    /// Copy mode (`net/xdp/xsk.c`): the kernel writes no more than `frame_max` bytes, and takes `pieces` of any
    /// address and length.
    pub fn copy_mode(frame_max: u32, pieces: usize) -> Self {
        Self {
            direct: true,
            rx_write_max: frame_max,
            rx_write_align: 1,
            rx_write_before: 0,
            rx_buffers_min: 0,
            tx_frame_max: frame_max,
            tx_frame_min: 0,
            tx_pieces_max: pieces,
            contiguity: Contiguity::NotNeeded,
        }
    }

    /// These rules, with what a chunk can hold as the limit: bounce frames are one chunk long.
    pub fn within_a_chunk(self) -> Self {
        Self {
            tx_frame_max: self.tx_frame_max.min(FRAME_BYTES_MAX),
            tx_frame_min: self.tx_frame_min.min(FRAME_BYTES_MAX),
            rx_write_align: self.rx_write_align.max(1),
            ..self
        }
    }

    /// Entries of the rx ring: few, if as many buffers have to be posted beside those that wait there.
    pub fn rx_ring_descs(&self) -> u32 {
        if self.rx_buffers_min > 0 { RX_RING_SMALL_DESCS } else { RX_RING_DESCS }
    }

    /// Whether nothing that may be written for a frame at `frame` passes the `room` bytes from there on.
    #[inline]
    pub fn write_stays_inside(&self, frame: UmemAddr, room: u32) -> bool {
        self.written_end(frame).0 <= frame.0 + u64::from(room)
    }

    /// Where all ends that may be written for frames that start at `frame`, whether they are delivered or dropped.
    #[inline]
    pub fn written_end(&self, frame: UmemAddr) -> UmemAddr {
        UmemAddr((frame.0 + u64::from(self.rx_write_max)).next_multiple_of(u64::from(self.rx_write_align)))
    }

    /// Whether `len_bytes` from `start` on, which contain `inside`, are one range for the device too: the kernel drops a
    /// fill or tx entry that crosses into a page elsewhere, the former without a trace (`net/xdp/xsk_buff_pool.c`:
    /// xp_check_unaligned). `region_hint` is that of [`GuestMemory::translate`].
    #[inline]
    pub fn is_contiguous(
        &self,
        memory: &GuestMemory,
        start: UmemAddr,
        len_bytes: u64,
        inside: UmemAddr,
        region_hint: usize,
    ) -> bool {
        let page_bytes = match self.contiguity {
            Contiguity::NotNeeded => return true,
            // The pages of the guest's buffer count: a range that begins in memory before them crosses their start.
            Contiguity::WithinBackingPage => memory.page_bytes(inside, region_hint),
            Contiguity::WithinBasePage => PAGE_BYTES,
        };
        memory.offset_in_page(start, page_bytes) + len_bytes <= page_bytes
    }
}
