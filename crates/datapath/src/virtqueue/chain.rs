//! Walking a descriptor chain: from a head index to the segments of guest memory that it names.

use super::CHAIN_DESCS_MAX;
use super::descriptor::{DESCRIPTOR_BYTES, Descriptor};
use crate::error::QueueFault;
use crate::guest_memory::{GuestMemory, Segment, UmemAddr};

/// Which way the buffers of a queue go. A chain of net rx is all device-writable, one of tx all device-readable
/// (VIRTIO 1.3 §5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// rx: the device writes.
    DeviceWrites,
    /// tx: the device reads.
    DeviceReads,
}

/// A descriptor table: the queue's own, or an indirect one.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub start: UmemAddr,
    pub size: u32,
}

impl Table {
    /// Reads a descriptor; `index` is below the size.
    #[inline]
    pub fn read(self, memory: &GuestMemory, index: u16) -> Descriptor {
        Descriptor::read(memory, self.start.plus(u64::from(index) * DESCRIPTOR_BYTES))
    }
}

/// The segment of a chain that is one descriptor, in one region: as most are. `None` for all else, broken or not.
#[inline]
pub(super) fn single(
    memory: &GuestMemory,
    first: &Descriptor,
    direction: Direction,
    hint: &mut usize,
) -> Option<Segment> {
    let is_single = first.is_alone(direction) && first.len > 0;
    is_single.then(|| memory.translate_whole(first.addr, first.len, hint)).flatten()
}

/// Appends the segments of the chain that starts at `head` to `segments`, in chain order; empty ones are left out.
///
/// A buffer that spans two regions becomes two segments. `hint` speeds translation up, see [`GuestMemory::translate`].
///
/// # Errors
/// Any broken chain; `segments` may then hold a part of it.
pub(super) fn walk(
    memory: &GuestMemory,
    queue: Table,
    head: u16,
    direction: Direction,
    hint: &mut usize,
    segments: &mut Vec<Segment>,
) -> Result<(), QueueFault> {
    let mut table = queue;
    let mut in_indirect = false;
    let mut desc = table.read(memory, head);
    for _ in 0..CHAIN_DESCS_MAX {
        if desc.is_indirect() {
            if in_indirect || desc.has_next() {
                return Err(bad_table(head, &desc));
            }
            table = indirect_table(memory, queue, head, &desc, hint)?;
            in_indirect = true;
            desc = table.read(memory, 0);
            continue;
        }
        if desc.is_device_writable() != (direction == Direction::DeviceWrites) {
            return Err(QueueFault::WrongDirection { head });
        }
        append(memory, head, &desc, hint, segments)?;
        if !desc.has_next() {
            return Ok(());
        }
        if u32::from(desc.next) >= table.size {
            return Err(QueueFault::NextOutOfRange { head, next: desc.next, size: table.size });
        }
        desc = table.read(memory, desc.next);
    }
    Err(QueueFault::ChainTooLong { head, limit: CHAIN_DESCS_MAX as u32 })
}

/// Number of descriptors of the queue's own table in the chain that starts at `head`. Whatever the driver has made of it
/// since it was walked, that is a number and nothing else.
pub(super) fn count(memory: &GuestMemory, queue: Table, head: u16) -> u16 {
    let mut desc = queue.read(memory, head);
    let mut descs = 1;
    while desc.has_next() && u32::from(desc.next) < queue.size && descs < CHAIN_DESCS_MAX as u16 {
        desc = queue.read(memory, desc.next);
        descs += 1;
    }
    descs
}

/// Translates one buffer. It may lie across regions that the guest sees as one range.
#[inline]
pub(super) fn append(
    memory: &GuestMemory,
    head: u16,
    desc: &Descriptor,
    hint: &mut usize,
    segments: &mut Vec<Segment>,
) -> Result<(), QueueFault> {
    let outside = QueueFault::BufferOutsideMemory { head, address: desc.addr.0, len_bytes: desc.len };
    let (mut addr, mut left) = (desc.addr, desc.len);
    while left > 0 {
        if segments.len() >= segments.capacity() {
            return Err(QueueFault::ChainTooLong { head, limit: CHAIN_DESCS_MAX as u32 });
        }
        let segment = memory.translate(addr, left, hint).ok_or(outside)?;
        left -= segment.len;
        addr = addr.checked_add(u64::from(segment.len)).ok_or(outside)?;
        segments.push(segment);
    }
    Ok(())
}

/// Checks an indirect descriptor (VIRTIO 1.3 §2.7.5.3): a table of at least one and at most queue-size descriptors,
/// inside one region. The write flag of the descriptor itself means nothing (§2.7.5.3.2).
pub(super) fn indirect_table(
    memory: &GuestMemory,
    queue: Table,
    head: u16,
    desc: &Descriptor,
    hint: &mut usize,
) -> Result<Table, QueueFault> {
    let size = desc.len / DESCRIPTOR_BYTES as u32;
    let whole = u64::from(desc.len).is_multiple_of(DESCRIPTOR_BYTES) && size > 0 && size <= queue.size;
    let segment = memory.translate_whole(desc.addr, desc.len, hint).filter(|_| whole);
    segment.map(|segment| Table { start: segment.addr, size }).ok_or_else(|| bad_table(head, desc))
}

#[cold]
pub(super) fn bad_table(head: u16, desc: &Descriptor) -> QueueFault {
    QueueFault::BadIndirectTable { head, address: desc.addr.0, len_bytes: desc.len }
}
