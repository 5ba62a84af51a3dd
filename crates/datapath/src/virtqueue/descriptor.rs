//! One descriptor of a split virtqueue (VIRTIO 1.3 §2.7.5), as read from guest memory: once, into our own memory.

use super::chain::Direction;
use crate::guest_memory::{GuestMemory, GuestPhysAddr, UmemAddr};

/// Size of a descriptor in guest memory.
pub(super) const DESCRIPTOR_BYTES: u64 = 16;

const VIRTQ_DESC_F_NEXT: u16 = 1;
const VIRTQ_DESC_F_WRITE: u16 = 2;
const VIRTQ_DESC_F_INDIRECT: u16 = 4;

#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub addr: GuestPhysAddr,
    pub len: u32,
    flags: u16,
    pub next: u16,
}

impl Descriptor {
    #[inline]
    pub fn read(memory: &GuestMemory, at: UmemAddr) -> Self {
        Self::from_words(memory.read_words(at))
    }

    /// From the two little-endian words that it is in memory.
    #[inline]
    pub fn from_words(words: [u64; 2]) -> Self {
        let [addr, rest] = words.map(u64::from_le);
        Self { addr: GuestPhysAddr(addr), len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    pub fn has_next(&self) -> bool {
        self.flags & VIRTQ_DESC_F_NEXT != 0
    }

    /// The device may write to it, and only that.
    pub fn is_device_writable(&self) -> bool {
        self.flags & VIRTQ_DESC_F_WRITE != 0
    }

    /// It is all of a chain, and its buffer is of this direction.
    #[inline]
    pub fn is_alone(&self, direction: Direction) -> bool {
        let written = if direction == Direction::DeviceWrites { VIRTQ_DESC_F_WRITE } else { 0 };
        self.flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE | VIRTQ_DESC_F_INDIRECT) == written
    }

    pub fn is_indirect(&self) -> bool {
        self.flags & VIRTQ_DESC_F_INDIRECT != 0
    }
}
