//! Bare access to the three parts of a packed virtqueue, by field (VIRTIO 1.3 sections 2.8.9 and 2.8.10).
//!
//! Everything a driver may write can be written here, right or wrong; every access is volatile or atomic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::raw::RingLayout;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, GuestPhysAddr};

/// Flags of descriptors and of event suppression, spelled as in the specification; NEXT, WRITE and INDIRECT are those of
/// split virtqueues.
#[allow(missing_docs)]
pub mod packed_flags {
    pub const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
    pub const VIRTQ_DESC_F_USED: u16 = 1 << 15;
    pub const RING_EVENT_FLAGS_ENABLE: u16 = 0;
    pub const RING_EVENT_FLAGS_DISABLE: u16 = 1;
    pub const RING_EVENT_FLAGS_DESC: u16 = 2;
}

const DESCRIPTOR_BYTES: u64 = 16;
const EVENT_BYTES: u64 = 4;

/// A descriptor of the ring (VIRTIO 1.3 section 2.8.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedDescriptor {
    /// Guest-physical address of the buffer, or of an indirect table.
    pub address: u64,
    /// Its length in bytes; in a used descriptor, how many of them were written.
    pub len: u32,
    /// The buffer id.
    pub id: u16,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
}

impl PackedDescriptor {
    /// Its sixteen bytes, as they lie in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.id.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// A packed virtqueue's fields, without any rule about their use. In its layout, `desc` is the descriptor ring, `avail`
/// the driver's event suppression structure and `used` the device's.
#[derive(Clone, Debug)]
pub struct RawPackedRing {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    ring: *mut u8,
    driver_event: *mut u8,
    device_event: *mut u8,
}

// SAFETY: the pointers lead into `memory`, which is kept alive beside them and is Send and Sync; every access below is
// volatile or atomic.
unsafe impl Send for RawPackedRing {}
// SAFETY: as above.
unsafe impl Sync for RawPackedRing {}

impl RawPackedRing {
    /// Finds the ring in guest memory; writes nothing.
    ///
    /// # Errors
    /// [`Error::Config`] if the size is not 1 to 32768, or a part is misaligned or outside guest memory.
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout) -> Result<Self> {
        if !(1..=32768).contains(&layout.size) {
            return Err(Error::config(format!("ring size {}: must be 1 to 32768", layout.size)));
        }
        if !layout.desc.0.is_multiple_of(16) || !(layout.avail.0 | layout.used.0).is_multiple_of(4) {
            return Err(Error::config(format!("ring at {:#x} is misaligned (VIRTIO 1.3 section 2.8)", layout.desc.0)));
        }
        Ok(Self {
            ring: memory.locate(layout.desc, DESCRIPTOR_BYTES * u64::from(layout.size))?,
            driver_event: memory.locate(layout.avail, EVENT_BYTES)?,
            device_event: memory.locate(layout.used, EVENT_BYTES)?,
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

    fn slot(&self, index: u16) -> *mut u8 {
        assert!(index < self.layout.size, "a slot of the ring");
        // SAFETY: the slot is within the ring located in `new`.
        unsafe { self.ring.add(16 * usize::from(index)) }
    }

    /// Writes all of a descriptor but its flags.
    pub fn set_content(&self, index: u16, descriptor: PackedDescriptor) {
        let slot = self.slot(index);
        // SAFETY: a slot of the ring has 16 bytes, aligned to 16.
        unsafe {
            slot.cast::<u64>().write_volatile(descriptor.address.to_le());
            slot.add(8).cast::<u32>().write_volatile(descriptor.len.to_le());
            slot.add(12).cast::<u16>().write_volatile(descriptor.id.to_le());
        }
    }

    /// Writes a descriptor's flags, after its content.
    pub fn set_flags(&self, index: u16, flags: u16) {
        // Release: the chain is visible before its first flags. Pairs with the device's Acquire load of the flags.
        self.flags_field(index).store(flags.to_le(), Ordering::Release);
    }

    /// Writes a descriptor, its flags last.
    pub fn set_descriptor(&self, index: u16, descriptor: PackedDescriptor) {
        self.set_content(index, descriptor);
        self.set_flags(index, descriptor.flags);
    }

    /// Reads a descriptor, its flags first.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> PackedDescriptor {
        // Acquire: used descriptor and written buffers are visible after the flags. Pairs with the device's Release store
        // of the first flags of a batch.
        let flags = u16::from_le(self.flags_field(index).load(Ordering::Acquire));
        let slot = self.slot(index);
        // SAFETY: as in `set_content`.
        let (address, len, id) = unsafe {
            let (len, id) = (slot.add(8).cast::<u32>(), slot.add(12).cast::<u16>());
            (slot.cast::<u64>().read_volatile(), len.read_volatile(), id.read_volatile())
        };
        PackedDescriptor { address: u64::from_le(address), len: u32::from_le(len), id: u16::from_le(id), flags }
    }

    /// Writes an entry of an indirect table that lies anywhere in guest memory (VIRTIO 1.3 section 2.8.7).
    ///
    /// # Errors
    /// [`Error::Config`] if the entry is outside guest memory.
    pub fn set_indirect(&self, table: GuestPhysAddr, index: u16, descriptor: PackedDescriptor) -> Result<()> {
        self.memory.write(table.plus(DESCRIPTOR_BYTES * u64::from(index)), &descriptor.to_bytes())
    }

    /// Writes the driver's event suppression structure: a ring offset with its wrap counter in bit 15, and flags.
    pub fn set_driver_event(&self, offset_and_wrap: u16, flags: u16) {
        let event = u32::from(offset_and_wrap) | u32::from(flags) << 16;
        // Relaxed: a hint; `PackedDriver::enable_notifications` orders it with a fence.
        self.event(self.driver_event).store(event.to_le(), Ordering::Relaxed);
    }

    /// The device's event suppression structure: a ring offset with its wrap counter in bit 15, and flags.
    #[must_use]
    pub fn device_event(&self) -> (u16, u16) {
        // Relaxed: `PackedDriver::publish` orders it with a fence.
        let event = u32::from_le(self.event(self.device_event).load(Ordering::Relaxed));
        (event as u16, (event >> 16) as u16)
    }

    /// Sets all three parts to zero, as a driver does before it hands a queue to the device.
    ///
    /// # Errors
    /// None in practice: the parts were located in `new`.
    pub fn clear(&self) -> Result<()> {
        self.memory.zero(self.layout.desc, DESCRIPTOR_BYTES * u64::from(self.layout.size))?;
        self.memory.zero(self.layout.avail, EVENT_BYTES)?;
        self.memory.zero(self.layout.used, EVENT_BYTES)
    }

    fn flags_field(&self, index: u16) -> &AtomicU16 {
        // SAFETY: the flags of a slot of the ring, aligned to 2; the memory outlives `self`, and AtomicU16 allows other
        // writers.
        unsafe { AtomicU16::from_ptr(self.slot(index).add(14).cast()) }
    }

    fn event(&self, at: *mut u8) -> &AtomicU32 {
        // SAFETY: callers pass one of the two structures located in `new`, aligned to 4; as `flags_field`.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionConfig;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::new(&[RegionConfig::memfd(0x1000, 65536)]).unwrap())
    }

    fn bytes<const N: usize>(ring: &RawPackedRing, address: GuestPhysAddr) -> [u8; N] {
        let mut bytes = [0; N];
        ring.memory().read(address, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn test_fields_lie_where_the_specification_puts_them() {
        let ring = RawPackedRing::new(&memory(), RingLayout::packed(GuestPhysAddr(0x1000), 6)).unwrap();
        let layout = *ring.layout();
        let descriptor = PackedDescriptor { address: 0x0102_0304_0506_0708, len: 0x11, id: 5, flags: 0x8082 };
        ring.set_descriptor(2, descriptor);
        ring.set_driver_event(0x8003, 2);
        ring.memory().write(layout.used, &[4, 0x80, 1, 0]).unwrap();
        assert_eq!(bytes::<16>(&ring, layout.desc.plus(32)), descriptor.to_bytes());
        assert_eq!(bytes::<16>(&ring, layout.desc.plus(32))[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes::<16>(&ring, layout.desc.plus(32))[8..], [0x11, 0, 0, 0, 5, 0, 0x82, 0x80]);
        assert_eq!(ring.descriptor(2), descriptor);
        assert_eq!(bytes::<4>(&ring, layout.avail), [3, 0x80, 2, 0]);
        assert_eq!(ring.device_event(), (0x8004, 1));
        ring.clear().unwrap();
        assert_eq!((ring.descriptor(2), ring.device_event()), (PackedDescriptor::default(), (0, 0)));
    }

    #[test]
    fn test_bad_layouts_are_refused() {
        let memory = memory();
        let good = RingLayout::packed(GuestPhysAddr(0x1000), 6);
        assert!(RawPackedRing::new(&memory, RingLayout { size: 0, ..good }).is_err());
        assert!(RawPackedRing::new(&memory, RingLayout { size: 32769, ..good }).is_err());
        assert!(RawPackedRing::new(&memory, RingLayout { avail: GuestPhysAddr(0x1802), ..good }).is_err());
        assert!(RawPackedRing::new(&memory, RingLayout { used: GuestPhysAddr(0x1802), ..good }).is_err());
        assert!(RawPackedRing::new(&memory, RingLayout { desc: GuestPhysAddr(0x1008), ..good }).is_err());
        assert!(RawPackedRing::new(&memory, RingLayout { size: 4097, ..good }).is_err(), "past the end of memory");
    }
}
