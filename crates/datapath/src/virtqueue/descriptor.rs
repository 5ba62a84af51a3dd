//! One descriptor, as read from guest memory: once, into our own memory.

use std::sync::atomic::Ordering;

use super::chain::Direction;
use crate::guest_memory::{GuestMemory, GuestPhysAddr, UmemAddr};

/// Size of a descriptor in guest memory, in both layouts.
pub(super) const DESCRIPTOR_BYTES: u64 = 16;
/// Where fields are in a descriptor of a packed virtqueue.
pub(super) const LEN_OFFSET: u64 = 8;
pub(super) const ID_OFFSET: u64 = 12;
pub(super) const FLAGS_OFFSET: u64 = 14;

const VIRTQ_DESC_F_NEXT: u16 = 1;
const VIRTQ_DESC_F_WRITE: u16 = 2;
const VIRTQ_DESC_F_INDIRECT: u16 = 4;

/// A descriptor of a split virtqueue (VIRTIO 1.3 §2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub addr: GuestPhysAddr,
    pub len: u32,
    pub flags: u16,
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

/// A descriptor of a packed virtqueue (VIRTIO 1.3 §2.8.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PackedDescriptor {
    /// What it says of its buffer, as a split virtqueue's would; nothing is next.
    pub element: Descriptor,
    pub id: u16,
}

impl PackedDescriptor {
    /// Reads a descriptor of the ring, which is aligned.
    #[inline]
    pub fn read(memory: &GuestMemory, at: UmemAddr) -> Self {
        // Acquire: if its flags make it available, so is all that was written before them. Pairs with the driver's write
        // barrier before it writes them (VIRTIO 1.3 §2.8.21.1).
        let rest = memory.load_u64(at.plus(LEN_OFFSET), Ordering::Acquire);
        // Relaxed: ordered by the load above.
        Self::from_words(memory.load_u64(at, Ordering::Relaxed), rest)
    }

    /// Reads a descriptor of an indirect table, which lies anywhere.
    pub fn read_unaligned(memory: &GuestMemory, at: UmemAddr) -> Self {
        let [addr, rest] = memory.read_words(at).map(u64::from_le);
        Self::from_words(addr, rest)
    }

    /// From what a record has of it.
    pub fn new(addr: u64, len: u32, id: u16, flags: u16) -> Self {
        Self { element: Descriptor { addr: GuestPhysAddr(addr), len, flags, next: 0 }, id }
    }

    #[inline]
    fn from_words(addr: u64, rest: u64) -> Self {
        Self::new(addr, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16)
    }
}
