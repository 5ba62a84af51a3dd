//! Bare access to the three parts of a split virtqueue, by field (VIRTIO 1.3 sections 2.7.5, 2.7.6, 2.7.8).
//!
//! Everything a driver may write can be written here, right or wrong; every access is volatile or atomic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use crate::error::{Error, Result};
use crate::memory::{GuestMemory, GuestPhysAddr};

/// Flags of descriptors and rings, spelled as in the specification.
#[allow(missing_docs)]
pub mod flags {
    pub const VIRTQ_DESC_F_NEXT: u16 = 1;
    pub const VIRTQ_DESC_F_WRITE: u16 = 2;
    pub const VIRTQ_DESC_F_INDIRECT: u16 = 4;
    pub const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;
    pub const VIRTQ_USED_F_NO_NOTIFY: u16 = 1;
}

const DESCRIPTOR_BYTES: u64 = 16;
const USED_ENTRY_BYTES: u64 = 8;

/// A descriptor (VIRTIO 1.3 section 2.7.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer, or of an indirect table.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
    /// Index of the next descriptor, if `VIRTQ_DESC_F_NEXT`.
    pub next: u16,
}

impl Descriptor {
    fn to_le(self) -> Self {
        Self {
            address: self.address.to_le(),
            len: self.len.to_le(),
            flags: self.flags.to_le(),
            next: self.next.to_le(),
        }
    }

    /// Its sixteen bytes, as they lie in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An element of the used ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsedEntry {
    /// Head index of the chain that was used.
    pub id: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// Where a virtqueue lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors, a power of two up to 32768.
    pub size: u16,
    /// Descriptor table, aligned to 16 bytes.
    pub desc: GuestPhysAddr,
    /// Avail ring, aligned to 2 bytes.
    pub avail: GuestPhysAddr,
    /// Used ring, aligned to 4 bytes.
    pub used: GuestPhysAddr,
}

impl RingLayout {
    /// The classic layout: descriptor table and avail ring together, the used ring on a page of its own.
    #[must_use]
    pub fn contiguous(start: GuestPhysAddr, size: u16) -> Self {
        let desc = start.align_up(DESCRIPTOR_BYTES);
        let avail = desc.plus(DESCRIPTOR_BYTES * u64::from(size));
        let used = avail.plus(6 + 2 * u64::from(size)).align_up(4096);
        Self { size, desc, avail, used }
    }

    /// The parts of a packed virtqueue: the descriptor ring in `desc`, and the event suppression structures of the driver
    /// and the device, on a page of their own, in `avail` and `used`.
    #[must_use]
    pub fn packed(start: GuestPhysAddr, size: u16) -> Self {
        let desc = start.align_up(DESCRIPTOR_BYTES);
        let avail = desc.plus(DESCRIPTOR_BYTES * u64::from(size)).align_up(4096);
        Self { size, desc, avail, used: avail.plus(4) }
    }

    /// One past the last byte of the used ring, which is longer than anything of a packed virtqueue.
    #[must_use]
    pub fn end(&self) -> GuestPhysAddr {
        self.used.plus(6 + USED_ENTRY_BYTES * u64::from(self.size))
    }

    /// Address of descriptor `index` of the table.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> GuestPhysAddr {
        self.desc.plus(DESCRIPTOR_BYTES * u64::from(index))
    }
}

/// A virtqueue's fields, without any rule about their use.
///
/// Ring slots are taken modulo the ring's size, as both sides do; nothing else is changed or checked.
#[derive(Clone, Debug)]
pub struct RawRing {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
}

// SAFETY: the pointers lead into `memory`, which is kept alive beside them and is Send and Sync; every access below is
// volatile or atomic.
unsafe impl Send for RawRing {}
// SAFETY: as above.
unsafe impl Sync for RawRing {}

impl RawRing {
    /// Finds the ring in guest memory; writes nothing.
    ///
    /// # Errors
    /// [`Error::Config`] if the size is no power of two up to 32768, or a part is misaligned or outside guest memory.
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout) -> Result<Self> {
        let size = u64::from(layout.size);
        if !layout.size.is_power_of_two() {
            return Err(Error::config(format!("ring size {size}: must be a power of two, at most 32768")));
        }
        if !layout.desc.0.is_multiple_of(16) || !layout.avail.0.is_multiple_of(2) || !layout.used.0.is_multiple_of(4) {
            return Err(Error::config(format!("ring at {:#x} is misaligned (VIRTIO 1.3 section 2.7)", layout.desc.0)));
        }
        Ok(Self {
            desc: memory.locate(layout.desc, DESCRIPTOR_BYTES * size)?,
            avail: memory.locate(layout.avail, 6 + 2 * size)?,
            used: memory.locate(layout.used, 6 + USED_ENTRY_BYTES * size)?,
            memory: Arc::clone(memory),
            layout,
        })
    }

    /// Where the ring lies.
    #[must_use]
    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// The memory it lies in.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }

    /// Writes descriptor `index` (modulo the ring's size) of the table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        // SAFETY: the slot is within the table located in `new`, aligned to 16.
        unsafe { self.desc.cast::<Descriptor>().add(self.slot(index)).write_volatile(descriptor.to_le()) };
    }

    /// Reads descriptor `index` (modulo the ring's size) of the table.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> Descriptor {
        // SAFETY: as in `set_descriptor`.
        unsafe { self.desc.cast::<Descriptor>().add(self.slot(index)).read_volatile().to_le() }
    }

    /// Writes an entry of an indirect table that lies anywhere in guest memory (VIRTIO 1.3 section 2.7.5.3).
    ///
    /// # Errors
    /// [`Error::Config`] if the entry is outside guest memory.
    pub fn set_indirect(&self, table: GuestPhysAddr, index: u16, descriptor: Descriptor) -> Result<()> {
        self.memory.write(table.plus(DESCRIPTOR_BYTES * u64::from(index)), &descriptor.to_bytes())
    }

    /// Puts `head` into the avail ring, at slot `index` modulo the ring's size.
    pub fn set_avail_entry(&self, index: u16, head: u16) {
        // SAFETY: the slot is within the avail ring located in `new`, aligned to 2.
        unsafe { self.avail.add(4).cast::<u16>().add(self.slot(index)).write_volatile(head.to_le()) };
    }

    /// Publishes the avail index.
    pub fn set_avail_idx(&self, index: u16) {
        // Release: descriptors and avail entries are visible before the index. Pairs with the device's Acquire load
        // of avail.idx.
        self.avail_field(2).store(index.to_le(), Ordering::Release);
    }

    /// The avail index as it stands in memory.
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        // Relaxed: only the driver writes it.
        u16::from_le(self.avail_field(2).load(Ordering::Relaxed))
    }

    /// Writes `VIRTQ_AVAIL_F_*`.
    pub fn set_avail_flags(&self, flags: u16) {
        // Relaxed: a hint; `SplitDriver::enable_notifications` orders it with a fence.
        self.avail_field(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Writes `used_event` (VIRTIO 1.3 section 2.7.7.1).
    pub fn set_used_event(&self, index: u16) {
        // Relaxed: as `set_avail_flags`.
        self.avail_field(4 + 2 * usize::from(self.layout.size)).store(index.to_le(), Ordering::Relaxed);
    }

    /// The used index.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        // Acquire: used entries and written buffers are visible after the index. Pairs with the device's Release
        // store of used.idx.
        u16::from_le(self.used_field(2).load(Ordering::Acquire))
    }

    /// The used entry at slot `index` modulo the ring's size.
    #[must_use]
    pub fn used_entry(&self, index: u16) -> UsedEntry {
        // SAFETY: the slot is within the used ring located in `new`, aligned to 4.
        let entry = unsafe { self.used.add(4).cast::<UsedEntry>().add(self.slot(index)).read_volatile() };
        UsedEntry { id: u32::from_le(entry.id), len: u32::from_le(entry.len) }
    }

    /// `VIRTQ_USED_F_*` as the device set them.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        // Relaxed: `SplitDriver::publish` orders it with a fence.
        u16::from_le(self.used_field(0).load(Ordering::Relaxed))
    }

    /// `avail_event` as the device set it (VIRTIO 1.3 section 2.7.10).
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        // Relaxed: as `used_flags`.
        u16::from_le(self.used_field(4 + 8 * usize::from(self.layout.size)).load(Ordering::Relaxed))
    }

    /// Sets all three parts to zero, as a driver does before it hands a queue to the device.
    ///
    /// # Errors
    /// None in practice: the parts were located in `new`.
    pub fn clear(&self) -> Result<()> {
        let size = u64::from(self.layout.size);
        self.memory.zero(self.layout.desc, DESCRIPTOR_BYTES * size)?;
        self.memory.zero(self.layout.avail, 6 + 2 * size)?;
        self.memory.zero(self.layout.used, 6 + USED_ENTRY_BYTES * size)
    }

    fn avail_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass offsets of u16 fields within the avail ring located in `new`, aligned to 2; the memory
        // outlives `self`, and AtomicU16 allows other writers.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast()) }
    }

    fn used_field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as `avail_field`, for the used ring.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionConfig;

    fn ring() -> RawRing {
        let memory = Arc::new(GuestMemory::new(&[RegionConfig::memfd(0x1000, 65536)]).unwrap());
        RawRing::new(&memory, RingLayout::contiguous(GuestPhysAddr(0x1000), 8)).unwrap()
    }

    fn bytes<const N: usize>(ring: &RawRing, address: GuestPhysAddr) -> [u8; N] {
        let mut bytes = [0; N];
        ring.memory().read(address, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn test_fields_lie_where_the_specification_puts_them() {
        let ring = ring();
        let layout = *ring.layout();
        let descriptor = Descriptor { address: 0x0102_0304_0506_0708, len: 0x11, flags: 3, next: 5 };
        ring.set_descriptor(2, descriptor);
        ring.set_avail_entry(9, 7);
        ring.set_avail_idx(0x0203);
        ring.set_avail_flags(1);
        ring.set_used_event(0x0405);
        assert_eq!(bytes::<16>(&ring, layout.desc.plus(32)), descriptor.to_bytes());
        assert_eq!(ring.descriptor(2), descriptor);
        assert_eq!(bytes::<4>(&ring, layout.avail), [1, 0, 3, 2]);
        assert_eq!(bytes::<2>(&ring, layout.avail.plus(4 + 2)), [7, 0]);
        assert_eq!(bytes::<2>(&ring, layout.avail.plus(4 + 16)), [5, 4]);
    }

    #[test]
    fn test_used_ring_is_read_where_the_specification_puts_it() {
        let ring = ring();
        let used = ring.layout().used;
        ring.memory().write(used, &[1, 0, 9, 0]).unwrap();
        ring.memory().write(used.plus(4 + 8), &[6, 0, 0, 0, 64, 0, 0, 0]).unwrap();
        ring.memory().write(used.plus(4 + 64), &[0x34, 0x12]).unwrap();
        assert_eq!((ring.used_flags(), ring.used_idx(), ring.avail_event()), (1, 9, 0x1234));
        assert_eq!(ring.used_entry(9), UsedEntry { id: 6, len: 64 });
    }

    #[test]
    fn test_bad_layouts_are_refused() {
        let memory = Arc::new(GuestMemory::new(&[RegionConfig::memfd(0, 8192)]).unwrap());
        let good = RingLayout::contiguous(GuestPhysAddr(0), 8);
        assert!(RawRing::new(&memory, RingLayout { size: 6, ..good }).is_err());
        assert!(RawRing::new(&memory, RingLayout { used: GuestPhysAddr(8190), ..good }).is_err());
        assert!(RawRing::new(&memory, RingLayout { desc: GuestPhysAddr(8), ..good }).is_err());
        assert!(RawRing::new(&memory, RingLayout { desc: GuestPhysAddr(8192), ..good }).is_err());
    }
}
