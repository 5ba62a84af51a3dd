//! A well-behaved driver of a split virtqueue that does not trust its device.
//!
//! A head is in one of three states, kept in private memory: free, posted (the device's), or returned (popped from
//! the used ring, its descriptors still allocated). Only `posted` heads may come back, each once, with no more bytes
//! than were writable: everything else is a [`Violation`], reported instead of the entry.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::raw::{Descriptor, RawRing, RingLayout, flags};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, GuestPhysAddr};

/// One piece of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies.
    pub address: GuestPhysAddr,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device may write it (rx) or only read it (tx).
    pub writable: bool,
}

impl Segment {
    /// A piece for the device to write.
    #[must_use]
    pub fn writable(address: GuestPhysAddr, len: u32) -> Self {
        Self { address, len, writable: true }
    }

    /// A piece for the device to read.
    #[must_use]
    pub fn readable(address: GuestPhysAddr, len: u32) -> Self {
        Self { address, len, writable: false }
    }
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its head index.
    pub head: u16,
    /// Bytes the device wrote.
    pub len: u32,
}

/// No descriptors are left for the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the virtqueue has too few free descriptors for this chain")]
pub struct RingFull;

/// Something that no device may do (VIRTIO 1.3 section 2.7.8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Violation {
    #[error("used index jumped to {used_idx} while {next_used} was next, on a ring of {size}")]
    UsedIndexJump { used_idx: u16, next_used: u16, size: u16 },
    #[error("used id {id} on a ring of {size}")]
    UsedIdOutOfRange { id: u32, size: u16 },
    #[error("head {head} used, but it is not posted")]
    UsedTwice { head: u16 },
    #[error("head {head} used with length {len}, but {writable_bytes} bytes were writable")]
    UsedLengthTooLarge { head: u16, len: u32, writable_bytes: u32 },
}

/// Which heads a stopped device still owed (see [`SplitDriver::settle`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settlement {
    /// Heads between the ring base and the avail index: posted, not yet taken, or given back.
    pub given_back: u16,
    /// Posted heads that were neither used nor given back.
    pub never_returned: u16,
    /// Heads given back although they had been used.
    pub returned_twice: u16,
}

/// Where indirect tables for chains of this queue are: one table of `entries` per descriptor, back to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectTables {
    /// Address of the table of head 0; aligned to 16.
    pub start: GuestPhysAddr,
    /// Entries of each table.
    pub entries: u16,
}

impl IndirectTables {
    /// One past the last table of a ring of `size`.
    #[must_use]
    pub fn end(&self, size: u16) -> GuestPhysAddr {
        self.table(size)
    }

    pub(super) fn table(&self, head: u16) -> GuestPhysAddr {
        self.start.plus(16 * u64::from(self.entries) * u64::from(head))
    }

    pub(super) fn check(&self, memory: &GuestMemory, size: u16) -> Result<()> {
        memory.locate(self.start, self.end(size).0 - self.start.0)?;
        if !self.start.0.is_multiple_of(16) || self.entries == 0 {
            return Err(Error::config(format!("indirect tables at {:#x}: misaligned or empty", self.start.0)));
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HeadState {
    Free,
    Posted,
    Returned,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    state: HeadState,
    descriptors: u16,
    writable_bytes: u32,
    /// How many heads had been posted before it, ever.
    posted_at: u64,
}

/// The driver side of one split virtqueue.
///
/// [`add`](Self::add) chains, [`publish`](Self::publish) once per burst and kick if told to; [`pop_used`](Self::pop_used)
/// until empty, then [`release`](Self::release) or [`repost`](Self::repost) each head.
#[derive(Debug)]
pub struct SplitDriver {
    ring: RawRing,
    event_idx: bool,
    indirect: Option<IndirectTables>,
    /// Free descriptors, last freed on top.
    free: Vec<u16>,
    /// The next descriptor of an allocated chain, by descriptor.
    links: Vec<u16>,
    heads: Vec<Head>,
    /// What was written into each avail slot; memory may have been changed by a hostile test.
    avail_heads: Vec<u16>,
    next_avail: u16,
    published_avail: u16,
    /// Heads ever posted, and how many of those the device can know of.
    posted_total: u64,
    published_total: u64,
    next_used: u16,
    seen_used: u16,
    /// `next_used` when notifications were last switched off, so that `used_event` never comes round again.
    disabled_at: Option<u16>,
    outstanding: u16,
    broken: bool,
}

impl SplitDriver {
    /// Clears the ring and starts at index 0.
    ///
    /// # Errors
    /// As [`RawRing::new`].
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout, event_idx: bool) -> Result<Self> {
        let ring = RawRing::new(memory, layout)?;
        ring.clear()?;
        let size = usize::from(layout.size);
        let head = Head { state: HeadState::Free, descriptors: 0, writable_bytes: 0, posted_at: 0 };
        Ok(Self {
            ring,
            event_idx,
            indirect: None,
            free: (0..layout.size).rev().collect(),
            links: vec![0; size],
            heads: vec![head; size],
            avail_heads: vec![0; size],
            next_avail: 0,
            published_avail: 0,
            posted_total: 0,
            published_total: 0,
            next_used: 0,
            seen_used: 0,
            disabled_at: None,
            outstanding: 0,
            broken: false,
        })
    }

    /// Gives the driver memory for indirect tables, for [`add_indirect`](Self::add_indirect).
    ///
    /// # Errors
    /// [`Error::Config`] if the tables are misaligned or outside guest memory.
    pub fn use_indirect_tables(&mut self, tables: IndirectTables) -> Result<()> {
        tables.check(self.ring.memory(), self.ring.layout().size)?;
        self.indirect = Some(tables);
        Ok(())
    }

    /// The ring's fields.
    #[must_use]
    pub fn ring(&self) -> &RawRing {
        &self.ring
    }

    /// Descriptors that no chain uses.
    #[must_use]
    pub fn free_descriptors(&self) -> u16 {
        self.free.len() as u16
    }

    /// Heads that the device owes.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Used entries from here on are next to be popped.
    #[must_use]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Puts a chain into the avail ring, one descriptor per segment; unseen by the device until
    /// [`publish`](Self::publish). Returns its head.
    ///
    /// # Errors
    /// [`RingFull`] if there are fewer free descriptors than segments; nothing was changed.
    pub fn add(&mut self, segments: &[Segment]) -> std::result::Result<u16, RingFull> {
        assert!(!segments.is_empty(), "a chain has at least one segment");
        if self.free.len() < segments.len() {
            return Err(RingFull);
        }
        let first_taken = self.free.len() - segments.len();
        // Taken from the top of the stack, so the head is its last element.
        for (position, segment) in segments.iter().enumerate() {
            let place = self.free.len() - 1 - position;
            let index = self.free[place];
            let is_last = place == first_taken;
            let next = if is_last { 0 } else { self.free[place - 1] };
            self.links[usize::from(index)] = next;
            self.ring.set_descriptor(index, segment_descriptor(segment, (!is_last).then_some(next)));
        }
        let head = self.free[self.free.len() - 1];
        self.free.truncate(first_taken);
        self.post(head, segments.len() as u16, segments);
        Ok(head)
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
        let head = self.free.pop().ok_or(RingFull)?;
        let table = tables.table(head);
        for (position, segment) in segments.iter().enumerate() {
            let next = (position + 1 < segments.len()).then_some(position as u16 + 1);
            self.ring
                .set_indirect(table, position as u16, segment_descriptor(segment, next))
                .expect("tables were located when they were given");
        }
        let len = 16 * segments.len() as u32;
        self.ring
            .set_descriptor(head, Descriptor { address: table.0, len, flags: flags::VIRTQ_DESC_F_INDIRECT, next: 0 });
        self.post(head, 1, segments);
        Ok(head)
    }

    fn post(&mut self, head: u16, descriptors: u16, segments: &[Segment]) {
        let writable_bytes = segments.iter().filter(|segment| segment.writable).map(|segment| segment.len).sum();
        self.heads[usize::from(head)] = Head { state: HeadState::Returned, descriptors, writable_bytes, posted_at: 0 };
        self.repost(head);
    }

    /// Puts a returned head into the avail ring again, its descriptors as they are.
    pub fn repost(&mut self, head: u16) {
        let entry = &mut self.heads[usize::from(head)];
        assert!(entry.state == HeadState::Returned, "only a returned head may be posted again");
        entry.state = HeadState::Posted;
        entry.posted_at = self.posted_total;
        self.posted_total += 1;
        self.ring.set_avail_entry(self.next_avail, head);
        let slot = usize::from(self.next_avail & (self.ring.layout().size - 1));
        self.avail_heads[slot] = head;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.outstanding += 1;
    }

    /// Frees a returned head's descriptors.
    pub fn release(&mut self, head: u16) {
        let entry = &mut self.heads[usize::from(head)];
        assert!(entry.state == HeadState::Returned, "only a returned head may be released");
        entry.state = HeadState::Free;
        let first = self.free.len();
        let mut index = head;
        for _ in 0..entry.descriptors {
            self.free.push(index);
            index = self.links[usize::from(index)];
        }
        self.free[first..].reverse();
    }

    /// Publishes what was added. Returns whether the device wants a kick for it.
    pub fn publish(&mut self) -> bool {
        let old = self.published_avail;
        if old == self.next_avail {
            return false;
        }
        self.ring.set_avail_idx(self.next_avail);
        self.published_avail = self.next_avail;
        self.published_total = self.posted_total;
        // SeqCst: the index must be visible before the device's wish is read, or both sides go to sleep (VIRTIO 1.3
        // section 2.7.21). Pairs with the fence between the device's store of avail_event (or used.flags) and its
        // second look at avail.idx.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.ring.avail_event();
            let added = self.next_avail.wrapping_sub(old);
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.ring.used_flags() & flags::VIRTQ_USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes the next used entry; `None` if there is none, or after the used index jumped.
    pub fn pop_used(&mut self) -> Option<std::result::Result<Used, Violation>> {
        if self.next_used == self.seen_used {
            if self.broken {
                return None;
            }
            self.seen_used = self.ring.used_idx();
            let size = self.ring.layout().size;
            let pending = self.seen_used.wrapping_sub(self.next_used);
            if pending > size {
                let used_idx = std::mem::replace(&mut self.seen_used, self.next_used);
                self.broken = true;
                return Some(Err(Violation::UsedIndexJump { used_idx, next_used: self.next_used, size }));
            }
            if pending == 0 {
                return None;
            }
        }
        let entry = self.ring.used_entry(self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        Some(self.take_back(entry.id, entry.len))
    }

    fn take_back(&mut self, id: u32, len: u32) -> std::result::Result<Used, Violation> {
        let size = self.ring.layout().size;
        let head = u16::try_from(id).ok().filter(|&head| head < size);
        let head = head.ok_or(Violation::UsedIdOutOfRange { id, size })?;
        let entry = &mut self.heads[usize::from(head)];
        // A head posted again since the last publish is still unknown to the device: this entry is for its last use.
        if entry.state != HeadState::Posted || entry.posted_at >= self.published_total {
            return Err(Violation::UsedTwice { head });
        }
        entry.state = HeadState::Returned;
        self.outstanding -= 1;
        let writable_bytes = entry.writable_bytes;
        if len > writable_bytes {
            // The chain did come back: give it up, so that it is not counted as lost as well.
            self.release(head);
            return Err(Violation::UsedLengthTooLarge { head, len, writable_bytes });
        }
        Ok(Used { head, len })
    }

    /// Asks for a notification when `after` (at least 1) entries beyond those popped are used. Without EVENT_IDX the
    /// device decides and `after` is 1.
    ///
    /// Returns whether it is safe to sleep: `false` means the entries are there already, look again.
    pub fn enable_notifications(&mut self, after: u16) -> bool {
        let after = if self.event_idx { after } else { 1 };
        if self.event_idx {
            self.ring.set_used_event(self.next_used.wrapping_add(after - 1));
        } else {
            self.ring.set_avail_flags(0);
        }
        self.disabled_at = None;
        // SeqCst: the wish must be visible before the index is read again (VIRTIO 1.3 section 2.7.14). Pairs with the
        // fence between the device's store of used.idx and its read of used_event (or avail.flags).
        fence(Ordering::SeqCst);
        self.ring.used_idx().wrapping_sub(self.next_used) < after
    }

    /// Asks for no notifications. Cheap to call once per burst.
    pub fn disable_notifications(&mut self) {
        if !self.event_idx {
            if self.disabled_at.is_none() {
                self.ring.set_avail_flags(flags::VIRTQ_AVAIL_F_NO_INTERRUPT);
                self.disabled_at = Some(self.next_used);
            }
            return;
        }
        // There is no "never" with EVENT_IDX: an event just passed is 65535 entries away, so move it on in time.
        let is_far = self.disabled_at.is_some_and(|at| self.next_used.wrapping_sub(at) < 0x4000);
        if !is_far {
            self.ring.set_used_event(self.next_used.wrapping_sub(1));
            self.disabled_at = Some(self.next_used);
        }
    }

    /// Compares what the device still owes with what it gave back by stopping at ring base `base`.
    ///
    /// Call it when the device has stopped and every used entry is popped. Invariant: each posted head is in
    /// the avail ring at or after `base`, exactly once.
    ///
    /// # Errors
    /// [`Error::Config`] if `base` is not within a ring's size of the avail index.
    pub fn settle(&self, base: u16) -> Result<Settlement> {
        let size = self.ring.layout().size;
        let given_back = self.published_avail.wrapping_sub(base);
        if given_back > size {
            return Err(Error::config(format!(
                "ring base {base} is impossible: {} heads were made available",
                self.published_avail
            )));
        }
        let mut is_returned = vec![false; usize::from(size)];
        let mut returned_twice = 0;
        for offset in 0..given_back {
            let slot = usize::from(base.wrapping_add(offset) & (size - 1));
            let head = usize::from(self.avail_heads[slot]);
            if is_returned[head] || self.heads[head].state != HeadState::Posted {
                returned_twice += 1;
            }
            is_returned[head] = true;
        }
        let is_lost = |(head, returned): (&Head, &bool)| head.state == HeadState::Posted && !returned;
        let never_returned = self.heads.iter().zip(&is_returned).filter(|pair| is_lost(*pair)).count() as u16;
        Ok(Settlement { given_back, never_returned, returned_twice })
    }
}

fn segment_descriptor(segment: &Segment, next: Option<u16>) -> Descriptor {
    let mut bits = if segment.writable { flags::VIRTQ_DESC_F_WRITE } else { 0 };
    if next.is_some() {
        bits |= flags::VIRTQ_DESC_F_NEXT;
    }
    Descriptor { address: segment.address.0, len: segment.len, flags: bits, next: next.unwrap_or(0) }
}

#[cfg(test)]
mod tests;
