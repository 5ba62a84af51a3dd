//! A well-behaved driver of a packed virtqueue that does not trust its device.
//!
//! A buffer id plays the part that a head index plays in a split virtqueue: free, posted, or returned. What lies in the
//! ring does not outlast its use, so the segments of a returned buffer are kept here, to be posted again. Nothing of a
//! burst is visible until [`PackedDriver::publish`] writes the flags of its first descriptor.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::raw::{RingLayout, flags};
use super::raw_packed::{PackedDescriptor, RawPackedRing, packed_flags};
use super::split::{IndirectTables, RingFull, Segment, Settlement, Used, Violation};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// A place in the ring and its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn of(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn plus(self, descriptors: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(descriptors);
        let (index, wrap) =
            if index < u32::from(size) { (index, self.wrap) } else { (index - u32::from(size), !self.wrap) };
        Self { index: index as u16, wrap }
    }

    /// How far it is behind `ahead`; `None` if that is more than once round.
    fn up_to(self, ahead: Self, size: u16) -> Option<u16> {
        (0..=size).find(|&distance| self.plus(distance, size) == ahead)
    }

    fn available(self) -> u16 {
        if self.wrap { packed_flags::VIRTQ_DESC_F_AVAIL } else { packed_flags::VIRTQ_DESC_F_USED }
    }

    fn is_used(self, flags: u16) -> bool {
        let both = packed_flags::VIRTQ_DESC_F_AVAIL | packed_flags::VIRTQ_DESC_F_USED;
        flags & both == if self.wrap { both } else { 0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Posted,
    Returned,
}

#[derive(Clone, Debug)]
struct Buffer {
    state: State,
    segments: Vec<Segment>,
    is_indirect: bool,
    /// How many buffers had been posted before it, ever.
    posted_at: u64,
}

impl Buffer {
    fn descriptors(&self) -> u16 {
        if self.is_indirect { 1 } else { self.segments.len() as u16 }
    }

    fn writable_bytes(&self) -> u32 {
        self.segments.iter().filter(|segment| segment.writable).map(|segment| segment.len).sum()
    }
}

/// The driver side of one packed virtqueue; used as [`SplitDriver`](super::SplitDriver) is. Heads are buffer ids.
#[derive(Debug)]
pub struct PackedDriver {
    ring: RawPackedRing,
    event_idx: bool,
    indirect: Option<IndirectTables>,
    /// Free buffer ids, last freed on top.
    free: Vec<u16>,
    buffers: Vec<Buffer>,
    free_descriptors: u16,
    /// The buffer whose chain starts in a slot; memory may have been changed by a hostile test.
    starts: Vec<u16>,
    next: Place,
    published: Place,
    /// Flags of the first descriptor that was added since, to be written last.
    first_flags: Option<u16>,
    /// Buffers ever posted, and how many of those the device can know of.
    posted_total: u64,
    published_total: u64,
    used: Place,
    outstanding: u16,
    outstanding_descriptors: u16,
    broken: bool,
}

impl PackedDriver {
    /// Clears the ring and starts at its beginning.
    ///
    /// # Errors
    /// As [`RawPackedRing::new`].
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout, event_idx: bool) -> Result<Self> {
        let ring = RawPackedRing::new(memory, layout)?;
        ring.clear()?;
        let size = usize::from(layout.size);
        let start = Place { index: 0, wrap: true };
        let buffer = Buffer { state: State::Free, segments: Vec::new(), is_indirect: false, posted_at: 0 };
        Ok(Self {
            ring,
            event_idx,
            indirect: None,
            free: (0..layout.size).rev().collect(),
            buffers: vec![buffer; size],
            free_descriptors: layout.size,
            starts: vec![0; size],
            next: start,
            published: start,
            first_flags: None,
            posted_total: 0,
            published_total: 0,
            used: start,
            outstanding: 0,
            outstanding_descriptors: 0,
            broken: false,
        })
    }

    /// Gives the driver memory for indirect tables, one for each buffer id.
    ///
    /// # Errors
    /// [`Error::Config`] if the tables are misaligned or outside guest memory.
    pub fn use_indirect_tables(&mut self, tables: IndirectTables) -> Result<()> {
        tables.check(self.ring.memory(), self.size())?;
        self.indirect = Some(tables);
        Ok(())
    }

    /// The ring's fields.
    #[must_use]
    pub fn ring(&self) -> &RawPackedRing {
        &self.ring
    }

    fn size(&self) -> u16 {
        self.ring.layout().size
    }

    /// Descriptors that no buffer uses or will use again.
    #[must_use]
    pub fn free_descriptors(&self) -> u16 {
        self.free_descriptors
    }

    /// Buffers that the device owes.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// The ring base at which a device goes on that has used all up to the last one popped and has nothing in flight.
    #[must_use]
    pub fn used_base(&self) -> u32 {
        u32::from(self.used.bits()) | u32::from(self.used.bits()) << 16
    }

    /// Puts a chain into the ring, one descriptor per segment; unseen by the device until [`publish`](Self::publish).
    /// Returns its buffer id.
    ///
    /// # Errors
    /// [`RingFull`] if there are fewer free descriptors than segments; nothing was changed.
    pub fn add(&mut self, segments: &[Segment]) -> std::result::Result<u16, RingFull> {
        self.add_buffer(segments, false)
    }

    /// As [`add`](Self::add), by an indirect table: one descriptor, however many segments.
    ///
    /// # Errors
    /// [`RingFull`] if no descriptor is free, or the table has fewer entries than there are segments.
    ///
    /// # Panics
    /// If [`use_indirect_tables`](Self::use_indirect_tables) was not called.
    pub fn add_indirect(&mut self, segments: &[Segment]) -> std::result::Result<u16, RingFull> {
        let tables = self.indirect.expect("indirect tables were given before an indirect chain is added");
        if segments.len() > usize::from(tables.entries) {
            return Err(RingFull);
        }
        self.add_buffer(segments, true)
    }

    fn add_buffer(&mut self, segments: &[Segment], is_indirect: bool) -> std::result::Result<u16, RingFull> {
        assert!(!segments.is_empty(), "a chain has at least one segment");
        let descriptors = if is_indirect { 1 } else { segments.len() };
        if usize::from(self.free_descriptors) < descriptors {
            return Err(RingFull);
        }
        let id = self.free.pop().ok_or(RingFull)?;
        self.free_descriptors -= descriptors as u16;
        let buffer = &mut self.buffers[usize::from(id)];
        buffer.segments.clear();
        buffer.segments.extend_from_slice(segments);
        (buffer.is_indirect, buffer.state) = (is_indirect, State::Returned);
        if is_indirect {
            self.write_table(id);
        }
        self.repost(id);
        Ok(id)
    }

    fn write_table(&self, id: u16) {
        let Some(tables) = self.indirect else { return };
        for (position, segment) in (0..).zip(&self.buffers[usize::from(id)].segments) {
            let bits = if segment.writable { flags::VIRTQ_DESC_F_WRITE } else { 0 };
            let descriptor = PackedDescriptor { address: segment.address.0, len: segment.len, id: 0, flags: bits };
            self.ring
                .set_indirect(tables.table(id), position, descriptor)
                .expect("tables were located when they were given");
        }
    }

    /// Puts a returned buffer into the ring again, its segments as they are.
    pub fn repost(&mut self, id: u16) {
        let (place, first, size) = (usize::from(id), self.next, self.size());
        assert!(self.buffers[place].state == State::Returned, "only a returned buffer may be posted again");
        let descriptors = self.buffers[place].descriptors();
        for position in (0..descriptors).rev() {
            let at = first.plus(position, size);
            let descriptor = self.descriptor(id, position, at);
            self.ring.set_content(at.index, descriptor);
            if position > 0 {
                self.ring.set_flags(at.index, descriptor.flags);
            } else if self.first_flags.is_none() {
                self.first_flags = Some(descriptor.flags);
            } else {
                self.ring.set_flags(at.index, descriptor.flags);
            }
        }
        self.starts[usize::from(first.index)] = id;
        self.next = first.plus(descriptors, size);
        let buffer = &mut self.buffers[place];
        buffer.state = State::Posted;
        buffer.posted_at = self.posted_total;
        self.posted_total += 1;
        self.outstanding += 1;
        self.outstanding_descriptors += descriptors;
    }

    /// A descriptor of a chain, as it is made available in a place.
    fn descriptor(&self, id: u16, position: u16, at: Place) -> PackedDescriptor {
        let buffer = &self.buffers[usize::from(id)];
        let is_last = position + 1 == buffer.descriptors();
        let more = if is_last { 0 } else { flags::VIRTQ_DESC_F_NEXT };
        // The last one's id is the one that counts.
        let id = if is_last { id } else { 0xffff };
        if let Some(tables) = self.indirect.filter(|_| buffer.is_indirect) {
            let (address, len) = (tables.table(id).0, 16 * buffer.segments.len() as u32);
            return PackedDescriptor { address, len, id, flags: flags::VIRTQ_DESC_F_INDIRECT | at.available() };
        }
        let segment = buffer.segments[usize::from(position)];
        let written = if segment.writable { flags::VIRTQ_DESC_F_WRITE } else { 0 };
        PackedDescriptor { address: segment.address.0, len: segment.len, id, flags: written | more | at.available() }
    }

    /// Frees a returned buffer's id and descriptors.
    pub fn release(&mut self, id: u16) {
        let buffer = &mut self.buffers[usize::from(id)];
        assert!(buffer.state == State::Returned, "only a returned buffer may be released");
        buffer.state = State::Free;
        self.free_descriptors += buffer.descriptors();
        self.free.push(id);
    }

    /// Publishes what was added. Returns whether the device wants a kick for it.
    pub fn publish(&mut self) -> bool {
        let Some(first_flags) = self.first_flags.take() else { return false };
        self.ring.set_flags(self.published.index, first_flags);
        let old = std::mem::replace(&mut self.published, self.next);
        self.published_total = self.posted_total;
        // SeqCst: the flags must be visible before the device's wish is read, or both sides go to sleep (VIRTIO 1.3
        // section 2.8.21.2). Pairs with the fence between the device's store of its event suppression structure and its
        // second look at the ring.
        fence(Ordering::SeqCst);
        let (event, event_flags) = self.ring.device_event();
        match event_flags {
            packed_flags::RING_EVENT_FLAGS_DISABLE => false,
            packed_flags::RING_EVENT_FLAGS_DESC if self.event_idx => {
                let size = self.size();
                let added = old.up_to(self.next, size).unwrap_or(size);
                (0..added).any(|distance| old.plus(distance, size) == Place::of(event))
            }
            _ => true,
        }
    }

    /// Takes the next used descriptor; `None` if there is none, or after the device broke the ring.
    pub fn pop_used(&mut self) -> Option<std::result::Result<Used, Violation>> {
        if self.broken {
            return None;
        }
        let descriptor = self.ring.descriptor(self.used.index);
        if !self.used.is_used(descriptor.flags) {
            return None;
        }
        Some(self.take_back(&descriptor))
    }

    fn take_back(&mut self, used: &PackedDescriptor) -> std::result::Result<Used, Violation> {
        let size = self.size();
        let (id, published_total) = (used.id, self.published_total);
        let posted = self.buffers.get_mut(usize::from(id));
        let Some(buffer) = posted.filter(|buffer| buffer.state == State::Posted && buffer.posted_at < published_total)
        else {
            // Where the next used descriptor will be depends on which buffer this one stood for.
            self.broken = true;
            return Err(match id < size {
                true => Violation::UsedTwice { head: id },
                false => Violation::UsedIdOutOfRange { id: u32::from(id), size },
            });
        };
        buffer.state = State::Returned;
        let (descriptors, writable_bytes) = (buffer.descriptors(), buffer.writable_bytes());
        self.used = self.used.plus(descriptors, size);
        self.outstanding -= 1;
        self.outstanding_descriptors -= descriptors;
        // Reserved without WRITE (VIRTIO 1.3 section 2.8.5).
        let len = if used.flags & flags::VIRTQ_DESC_F_WRITE != 0 { used.len } else { 0 };
        if len > writable_bytes {
            // The chain did come back: give it up, so that it is not counted as lost as well.
            self.release(id);
            return Err(Violation::UsedLengthTooLarge { head: id, len, writable_bytes });
        }
        Ok(Used { head: id, len })
    }

    /// Asks to be notified once descriptors of `buffers` more buffers are used, if each of those in between has one; for
    /// fewer buffers if they have more. Returns `false` if they are used already: look again instead of sleeping.
    pub fn enable_notifications(&mut self, buffers: u16) -> bool {
        let size = self.size();
        let ahead = buffers.min(self.outstanding_descriptors).max(1) - 1;
        if self.event_idx {
            let event = self.used.plus(ahead, size);
            self.ring.set_driver_event(event.bits(), packed_flags::RING_EVENT_FLAGS_DESC);
        } else {
            self.ring.set_driver_event(0, packed_flags::RING_EVENT_FLAGS_ENABLE);
        }
        // SeqCst: our wish is visible before the ring is looked at again. Pairs with the device's fence between writing
        // used flags and reading the wish (VIRTIO 1.3 section 2.8.22).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx { ahead + 1 } else { 1 };
        self.used_descriptors(wanted) < wanted
    }

    /// How many descriptors are used and not popped; no more than up to `enough` are looked for.
    fn used_descriptors(&self, enough: u16) -> u16 {
        let (mut at, mut found) = (self.used, 0);
        while found < enough && found < self.outstanding_descriptors {
            let descriptor = self.ring.descriptor(at.index);
            let Some(buffer) = self.buffers.get(usize::from(descriptor.id)) else { return enough };
            if !at.is_used(descriptor.flags) {
                break;
            }
            let descriptors = buffer.descriptors().max(1);
            found = found.saturating_add(descriptors);
            at = at.plus(descriptors.min(self.size()), self.size());
        }
        found
    }

    /// Asks for no notifications.
    pub fn disable_notifications(&mut self) {
        self.ring.set_driver_event(0, packed_flags::RING_EVENT_FLAGS_DISABLE);
    }

    /// Compares what the device still owes with what it gave back by stopping at ring base `base`.
    ///
    /// Call it when the device has stopped and every used descriptor is popped. Invariant: each posted buffer is in the
    /// ring at or behind `base`, exactly once.
    ///
    /// # Errors
    /// [`Error::Config`] if the base has a used place that is not ours, another avail place, or one in the middle of a
    /// chain.
    pub fn settle(&self, base: u32) -> Result<Settlement> {
        let size = self.size();
        let [avail, used] = [base as u16, (base >> 16) as u16].map(Place::of);
        let impossible = |why: &str| Err(Error::config(format!("ring base {base:#x} is impossible: {why}")));
        if avail != used || used != self.used {
            return impossible("a device that stopped has used all that it has not given back");
        }
        let Some(distance) = avail.up_to(self.published, size) else { return impossible("it is too far behind") };
        let mut is_returned = vec![false; usize::from(size)];
        let (mut at, mut left, mut given_back, mut returned_twice) = (avail, distance, 0, 0);
        while left > 0 {
            let id = self.starts[usize::from(at.index)];
            let buffer = &self.buffers[usize::from(id)];
            let descriptors = buffer.descriptors();
            if descriptors == 0 || descriptors > left {
                return impossible("it is in the middle of a chain");
            }
            returned_twice += u16::from(is_returned[usize::from(id)] || buffer.state != State::Posted);
            is_returned[usize::from(id)] = true;
            given_back += 1;
            at = at.plus(descriptors, size);
            left -= descriptors;
        }
        let is_lost = |(buffer, returned): (&Buffer, &bool)| buffer.state == State::Posted && !returned;
        let never_returned = self.buffers.iter().zip(&is_returned).filter(|pair| is_lost(*pair)).count() as u16;
        Ok(Settlement { given_back, never_returned, returned_twice })
    }
}

#[cfg(test)]
mod tests;
