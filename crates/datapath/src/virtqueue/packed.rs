//! One packed virtqueue, seen from the device (VIRTIO 1.3 §2.8).
//!
//! There is one ring of descriptors, which both sides write. The driver puts a chain into consecutive slots; the device
//! writes one used descriptor for it, at its own place in the ring, and goes on behind as many slots as the chain had:
//!
//! ```text
//!           used                      avail
//!            │                          │
//!  ──────────┼──────────────────────────┼───────────────────────────────
//!  the       │ as many descriptors as   │ available chains, then slots
//!  driver's  │ are in flight            │ that are the driver's again
//! ```
//!
//! The distance from `used` to `avail` is the number of descriptors in flight, whatever the order in which their chains
//! are used. So what was taken last is never overwritten before it is used, and can be given back by going back with
//! `avail`, as in a split virtqueue.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::chain::{self, Direction, Table};
use super::descriptor::{DESCRIPTOR_BYTES, Descriptor, FLAGS_OFFSET, ID_OFFSET, LEN_OFFSET, PackedDescriptor};
use super::packed_record::{Chain, PackedRecord, Recovered};
use super::split::{QueueConfig, RING_POSITIONS, Taken};
use super::write_log::WriteLog;
use super::{CHAIN_DESCS_MAX, QUEUE_SIZE_MAX};
use crate::error::QueueFault;
use crate::guest_memory::{GuestMemory, Segment, UmemAddr, UserAddr};

const VIRTQ_DESC_F_WRITE: u16 = 2;
const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const VIRTQ_DESC_F_USED: u16 = 1 << 15;
/// Event suppression (§2.8.10): a ring offset with its wrap counter in the low half, one of these in the high half.
const RING_EVENT_FLAGS_ENABLE: u32 = 0;
const RING_EVENT_FLAGS_DISABLE: u32 = 1;
const RING_EVENT_FLAGS_DESC: u32 = 2;
const EVENT_BYTES: u64 = 4;
/// The offset where it means nothing: so that no wish of ours is all zeros (see [`PackedQueue::resume`]).
const UNUSED_OFFSET: u32 = 0x7fff;

/// A place in the ring, and the lap that it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The slot.
    pub index: u16,
    /// The wrap counter (§2.8.1).
    pub wrap: bool,
}

impl Cursor {
    /// Where a fresh ring begins.
    pub const START: Self = Self { index: 0, wrap: true };

    /// As event suppression structures and vhost-user's ring bases have it: bit 15 is the wrap counter.
    pub fn from_bits(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// Goes on by up to a ring's length.
    #[inline]
    pub fn advance(&mut self, descs: u16, size: u16) {
        debug_assert!(descs <= size && self.index < size, "a cursor goes round once at most");
        let index = u32::from(self.index) + u32::from(descs);
        let wraps = index >= u32::from(size);
        self.wrap ^= wraps;
        self.index = (if wraps { index - u32::from(size) } else { index }) as u16;
    }

    /// Goes back by up to a ring's length.
    #[inline]
    fn back(&mut self, descs: u16, size: u16) {
        self.advance(size - descs, size);
        self.wrap = !self.wrap;
    }

    /// How far this one is ahead of `behind`; `None` if that is more than a ring's length.
    pub fn ahead_of(self, behind: Self, size: u16) -> Option<u16> {
        if self.wrap == behind.wrap {
            self.index.checked_sub(behind.index)
        } else {
            (self.index <= behind.index).then(|| size - (behind.index - self.index))
        }
    }

    /// Flags of a descriptor here that the driver has made available, NEXT and the like left out.
    pub fn avail_flags(self) -> u16 {
        if self.wrap { VIRTQ_DESC_F_AVAIL } else { VIRTQ_DESC_F_USED }
    }

    /// Whether a descriptor here with these flags is one that the driver has made available.
    #[inline]
    pub fn is_available(self, flags: u16) -> bool {
        flags & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED) == self.avail_flags()
    }

    /// Flags of a used descriptor here.
    fn used_flags(self) -> u16 {
        if self.wrap { VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED } else { 0 }
    }
}

/// Where the segments of a chain are put.
struct Segments<'a> {
    direction: Direction,
    hint: &'a mut usize,
    segments: &'a mut Vec<Segment>,
}

/// The first used descriptor of a batch: its flags are written last.
#[derive(Debug, Clone, Copy)]
struct Batch {
    start: Cursor,
    flags: u16,
    descs: u16,
}

/// The device side of a packed virtqueue. Holds the memory that its rings live in.
#[derive(Debug)]
pub struct PackedQueue {
    memory: Arc<GuestMemory>,
    size: u16,
    ring: UmemAddr,
    driver_event: UmemAddr,
    device_event: UmemAddr,
    event_idx: bool,
    /// Next chain to take.
    avail: Cursor,
    /// Next used descriptor to write.
    used: Cursor,
    /// How many chains were taken, for [`Taken::position`].
    position: u64,
    /// Whether a chain was seen at `avail` that has not been taken.
    is_waiting: bool,
    /// Where [`take`](Self::take) found no more. Chains that were given back since wait for others to join them.
    end: Option<Cursor>,
    /// Descriptors of the chain that a buffer id stands for while it is in flight; 0 while it is not.
    descs: Box<[u16]>,
    /// Descriptors that the driver has not been shown as used yet.
    held_descs: u16,
    /// What was used and is not shown yet.
    batch: Option<Batch>,
    /// Chains that an earlier back-end took and did not use: the next to be taken, before those of the ring.
    again: VecDeque<Chain>,
    /// How many of those have been taken.
    again_taken: u64,
    /// What is in flight, for whoever comes after this process.
    record: Option<PackedRecord>,
    /// Where `used` was when used descriptors were last shown, and how many descriptors were used by then.
    shown: Cursor,
    shown_descs: u64,
    /// `shown_descs` when the driver was last considered for a call.
    called_at: u64,
    /// Where writes to guest memory are logged, if they are.
    log: Option<WriteLog>,
}

impl PackedQueue {
    /// Checks the parts of the ring and takes the queue up where it was left.
    ///
    /// # Errors
    /// [`QueueFault::BadSize`], [`QueueFault::BadBase`], [`QueueFault::RingOutsideMemory`].
    pub fn new(memory: Arc<GuestMemory>, config: &QueueConfig) -> Result<Self, QueueFault> {
        if config.size == 0 || config.size > QUEUE_SIZE_MAX {
            return Err(QueueFault::BadSize { size: config.size });
        }
        let size = config.size as u16;
        let place = |ring, addr: UserAddr, align, len_bytes| {
            memory
                .translate_user(addr, len_bytes)
                .filter(|at| at.0.is_multiple_of(align) && addr.0.is_multiple_of(align))
                .ok_or(QueueFault::RingOutsideMemory { ring, address: addr.0, len_bytes })
        };
        // VIRTIO 1.3 §2.8.10.1.
        let ring = place("descriptor ring", config.desc, 16, u64::from(size) * DESCRIPTOR_BYTES)?;
        let driver_event = place("driver event suppression structure", config.avail, 4, EVENT_BYTES)?;
        let device_event = place("device event suppression structure", config.used, 4, EVENT_BYTES)?;
        let (avail, used, held_descs) =
            start_cursors(config.base, size).ok_or(QueueFault::BadBase { base: config.base, size: config.size })?;
        Ok(Self {
            memory,
            size,
            ring,
            driver_event,
            device_event,
            event_idx: config.event_idx,
            avail,
            used,
            position: RING_POSITIONS,
            is_waiting: false,
            end: None,
            descs: vec![0; usize::from(size)].into_boxed_slice(),
            held_descs,
            batch: None,
            again: VecDeque::new(),
            again_taken: 0,
            record: None,
            shown: used,
            shown_descs: 0,
            called_at: 0,
            log: None,
        })
    }

    /// Goes on where a back-end ended without notice, if `record` is that of this ring, and keeps it from now on. Before
    /// anything is taken. Returns the number of chains that were in flight.
    ///
    /// Chains taken last stay in the ring, by going back; those whose slots are gone are taken again, in their order.
    ///
    /// There is no index in memory that would tell whether the ring is still the one of the record, or one that a driver
    /// has set up anew. But the structure that only a device writes tells.
    pub fn resume(&mut self, mut record: PackedRecord) -> usize {
        let found = record.recover(|slot| self.slot_flags(slot, Ordering::Acquire));
        let found = found.filter(|found| self.is_as_left(found));
        self.disable_kicks();
        let Some(Recovered { used, chains }) = found else {
            if self.held_descs == 0 {
                record.begin(self.used);
                self.record = Some(record);
            } else {
                // The front-end says that chains are gone which were never ours. A record could not tell where they are.
                record.invalidate();
            }
            return 0;
        };
        let in_flight = chains.len();
        (self.used, self.shown) = (used, used);
        self.avail = used;
        self.held_descs = 0;
        for chain in &chains {
            self.avail.advance(chain.descs, self.size);
            self.held_descs += chain.descs;
            self.descs[usize::from(chain.id)] = chain.descs;
        }
        self.hide_unshown();
        self.again = chains.into();
        while let Some(&chain) = self.again.back()
            && self.is_in_ring(chain, &record)
        {
            self.avail.back(chain.descs, self.size);
            self.held_descs -= chain.descs;
            self.descs[usize::from(chain.id)] = 0;
            record.untaken(chain.id);
            self.again.pop_back();
        }
        self.record = Some(record);
        in_flight
    }

    /// Whether the ring can be one whose device was left so.
    fn is_as_left(&self, found: &Recovered) -> bool {
        let Recovered { used, chains } = found;
        let (mut at, in_flight) = (*used, chains.iter().map(|chain| u32::from(chain.descs)).sum::<u32>());
        if at.index >= self.size || in_flight > u32::from(self.size) {
            return false;
        }
        // A driver that starts over zeroes it, and we never do.
        if self.memory.load_u32(self.device_event, Ordering::Relaxed) == 0 {
            return false;
        }
        // The driver has not touched them since they were made available. Used descriptors may have been written over all
        // but the first, and not been shown.
        for ahead in 0..in_flight {
            let flags = self.slot_flags(at.index, Ordering::Relaxed);
            let is_ours = flags & VIRTQ_DESC_F_AVAIL == at.avail_flags() & VIRTQ_DESC_F_AVAIL;
            if !is_ours || (ahead == 0 && !at.is_available(flags)) {
                return false;
            }
            at.advance(1, self.size);
        }
        // What waits behind is not in flight.
        let mut is_in_flight = vec![false; usize::from(self.size)];
        chains.iter().for_each(|chain| is_in_flight[usize::from(chain.id)] = true);
        let mut ahead = in_flight as u16;
        while ahead < self.size && at.is_available(self.slot_flags(at.index, Ordering::Acquire)) {
            let (descs, id) = self.waiting_chain(at, self.size - ahead);
            if is_in_flight.get(usize::from(id)).is_some_and(|&known| known) {
                return false;
            }
            ahead += descs;
            at.advance(descs, self.size);
        }
        true
    }

    /// Length and buffer id of an available chain.
    fn waiting_chain(&self, mut at: Cursor, room: u16) -> (u16, u16) {
        let mut descs = 1;
        loop {
            let desc = PackedDescriptor::read(&self.memory, self.slot(at.index));
            if !desc.element.has_next() || descs == room {
                return (descs, desc.id);
            }
            at.advance(1, self.size);
            descs += 1;
        }
    }

    /// Makes used descriptors that were never shown look available again: the driver would take them for used as soon as
    /// it is shown the one in front of them. It looks at no slot but the first.
    fn hide_unshown(&mut self) {
        let mut at = self.used;
        for _ in 0..self.held_descs {
            if !at.is_available(self.slot_flags(at.index, Ordering::Relaxed)) {
                self.memory.store_u16(self.slot(at.index).plus(FLAGS_OFFSET), at.avail_flags(), Ordering::Relaxed);
                self.log_slots(at, 1);
            }
            at.advance(1, self.size);
        }
    }

    /// Whether the chain in front of `avail` is this one.
    fn is_in_ring(&self, chain: Chain, record: &PackedRecord) -> bool {
        let mut at = self.avail;
        at.back(chain.descs, self.size);
        record.descriptors(chain.id).all(|recorded| {
            let desc = PackedDescriptor::read(&self.memory, self.slot(at.index));
            at.advance(1, self.size);
            desc == recorded
        })
    }

    #[inline]
    fn slot(&self, index: u16) -> UmemAddr {
        self.ring.plus(u64::from(index) * DESCRIPTOR_BYTES)
    }

    #[inline]
    fn slot_flags(&self, index: u16, order: Ordering) -> u16 {
        self.memory.load_u16(self.slot(index).plus(FLAGS_OFFSET), order)
    }

    /// Buffers may lie in more memory from now on.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        assert!(memory.is_same_arena(&self.memory), "a running queue's addresses keep their meaning");
        self.memory = memory;
    }

    /// Logs writes from now on, or no longer. All that was written before is in the log before.
    pub fn set_log(&mut self, log: Option<WriteLog>) {
        debug_assert!(self.batch.is_none(), "what is written but not published is not logged yet");
        self.log = log;
    }

    /// Says that used descriptors were written to up to `descs` slots. They are logged where they are: the address that
    /// the front-end gives for the used ring is that of the device area, which has none (QEMU's `used_phys`).
    fn log_slots(&self, start: Cursor, descs: u16) {
        let Some(log) = &self.log else { return };
        let up_to_end = descs.min(self.size - start.index);
        log.ring(&self.memory, self.slot(start.index), u64::from(up_to_end) * DESCRIPTOR_BYTES);
        log.ring(&self.memory, self.ring, u64::from(descs - up_to_end) * DESCRIPTOR_BYTES);
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The ring base (vhost-user.rst, "Vring descriptor indices for packed virtqueues"): the next chain that would be
    /// taken in the low half, the next used descriptor in the high half.
    pub fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    /// The slot of the next used descriptor that the driver is to be shown.
    #[cfg(test)]
    pub(super) fn shown(&self) -> u16 {
        self.shown.index
    }

    /// The [`Taken::position`] of the next chain.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Number of chains that can be taken now, at most: how many there are is seen only by taking them.
    #[inline(never)]
    pub fn available(&mut self) -> u16 {
        let room = self.size - self.held_descs;
        // Relaxed: take() looks again.
        self.is_waiting = room > 0 && self.avail.is_available(self.slot_flags(self.avail.index, Ordering::Relaxed));
        (if self.is_waiting { room } else { 0 }).saturating_add(self.again.len() as u16)
    }

    /// Takes the next chain, if there is one, and appends its segments to `segments`, up to its capacity.
    /// [`Taken::head`] is the buffer id. `hint` as in [`GuestMemory::translate`].
    ///
    /// # Errors
    /// A broken chain; then nothing is taken, and `segments` may hold a part of it.
    #[inline(never)]
    pub fn take(
        &mut self,
        direction: Direction,
        hint: &mut usize,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<Taken>, QueueFault> {
        let mut into = Segments { direction, hint, segments };
        if let Some(&chain) = self.again.front() {
            return self.take_again(chain, &mut into).map(Some);
        }
        let walked = self.walk(&mut into);
        if let Some(record) = &mut self.record {
            match walked {
                Ok(Some(chain)) => record.taken(chain),
                Ok(None) => {}
                Err(_) => record.abandon(),
            }
        }
        let walked = walked?;
        self.is_waiting = false;
        let Some(Chain { id, descs }) = walked else {
            self.end = Some(self.avail);
            return Ok(None);
        };
        self.end = None;
        self.descs[usize::from(id)] = descs;
        self.held_descs += descs;
        self.avail.advance(descs, self.size);
        let taken = Taken { head: id, position: self.position };
        self.position += 1;
        Ok(Some(taken))
    }

    /// Walks the chain at `avail`, if there is one.
    #[inline]
    fn walk(&mut self, into: &mut Segments<'_>) -> Result<Option<Chain>, QueueFault> {
        // A slot beyond is one that the driver has not got back yet, whatever it writes there.
        let room = self.size - self.held_descs;
        let (head, limit) = (self.avail.index, room.min(CHAIN_DESCS_MAX as u16));
        let mut at = self.avail;
        for before in 0..limit {
            let desc = PackedDescriptor::read(&self.memory, self.slot(at.index));
            if before == 0 && !at.is_available(desc.element.flags) {
                return Ok(None);
            }
            self.append(head, before, &desc, into)?;
            if let Some(record) = &mut self.record {
                record.add(&desc);
            }
            if !desc.element.has_next() {
                return self.check_id(desc.id).map(|id| Some(Chain { id, descs: before + 1 }));
            }
            at.advance(1, self.size);
        }
        if room == 0 { Ok(None) } else { Err(QueueFault::ChainTooLong { head, limit: u32::from(limit) }) }
    }

    /// Appends the segments of the descriptor that `before` others of its chain are in front of.
    #[inline]
    fn append(
        &self,
        head: u16,
        before: u16,
        desc: &PackedDescriptor,
        into: &mut Segments<'_>,
    ) -> Result<(), QueueFault> {
        let (element, hint) = (&desc.element, &mut *into.hint);
        if !element.is_indirect() {
            return self.append_buffer(head, element, into);
        }
        if before > 0 || element.has_next() {
            return Err(chain::bad_table(head, element));
        }
        let ring = Table { start: self.ring, size: u32::from(self.size) };
        let table = chain::indirect_table(&self.memory, ring, head, element, hint)?;
        if table.size > CHAIN_DESCS_MAX as u32 {
            return Err(QueueFault::ChainTooLong { head, limit: CHAIN_DESCS_MAX as u32 });
        }
        for index in 0..u64::from(table.size) {
            // All of them, one behind the other; WRITE is the only flag that means something here (§2.8.7).
            let at = table.start.plus(index * DESCRIPTOR_BYTES);
            let PackedDescriptor { element, .. } = PackedDescriptor::read_unaligned(&self.memory, at);
            self.append_buffer(head, &element, into)?;
        }
        Ok(())
    }

    #[inline]
    fn append_buffer(&self, head: u16, element: &Descriptor, into: &mut Segments<'_>) -> Result<(), QueueFault> {
        if element.is_device_writable() != (into.direction == Direction::DeviceWrites) {
            return Err(QueueFault::WrongDirection { head });
        }
        chain::append(&self.memory, head, element, into.hint, into.segments)
    }

    /// A buffer id stands for one buffer at a time.
    #[inline]
    fn check_id(&self, id: u16) -> Result<u16, QueueFault> {
        match self.descs.get(usize::from(id)) {
            Some(0) => Ok(id),
            Some(_) => Err(QueueFault::IdInFlight { id }),
            None => Err(QueueFault::HeadOutOfRange { head: id, size: self.size }),
        }
    }

    /// Takes a chain of an earlier back-end once more, as it was written down.
    #[cold]
    fn take_again(&mut self, chain: Chain, into: &mut Segments<'_>) -> Result<Taken, QueueFault> {
        let descriptors: Vec<_> = self.record.iter().flat_map(|record| record.descriptors(chain.id)).collect();
        for (before, desc) in (0..).zip(&descriptors) {
            self.append(chain.id, before, desc, into)?;
        }
        self.again.pop_front();
        self.again_taken += 1;
        Ok(Taken { head: chain.id, position: self.again_taken - 1 })
    }

    /// Number of the ring's descriptors that a chain holds.
    pub fn descs_of(&self, id: u16) -> u16 {
        self.descs[usize::from(id)]
    }

    /// Gives back the chain taken last: it stays in the ring.
    #[inline(never)]
    pub fn untake(&mut self, taken: Taken) {
        if taken.position < RING_POSITIONS {
            self.untake_again(taken.head);
            return;
        }
        self.position -= 1;
        debug_assert_eq!(taken.position, self.position, "only the chain taken last can be given back");
        let descs = std::mem::take(&mut self.descs[usize::from(taken.head)]);
        self.held_descs -= descs;
        self.avail.back(descs, self.size);
        self.is_waiting = true;
        if let Some(record) = &mut self.record {
            record.untaken(taken.head);
        }
    }

    #[cold]
    fn untake_again(&mut self, id: u16) {
        self.again.push_front(Chain { id, descs: self.descs[usize::from(id)] });
        self.again_taken -= 1;
    }

    /// Returns, used with length 0, chains of an earlier back-end that were not taken again.
    pub fn give_up_resumed(&mut self) {
        while let Some(chain) = self.again.pop_front() {
            self.push_used(chain.id, 0);
        }
    }

    /// Writes a used descriptor; the driver sees it after [`publish_used`](Self::publish_used).
    #[inline(never)]
    pub fn push_used(&mut self, id: u16, len_bytes: u32) {
        let descs = std::mem::take(&mut self.descs[usize::from(id)]);
        debug_assert!(descs > 0, "a chain is used once");
        let at = self.slot(self.used.index);
        self.memory.store_u32(at.plus(LEN_OFFSET), len_bytes, Ordering::Relaxed);
        self.memory.store_u16(at.plus(ID_OFFSET), id, Ordering::Relaxed);
        let written = if len_bytes > 0 { VIRTQ_DESC_F_WRITE } else { 0 };
        let flags = self.used.used_flags() | written;
        match &mut self.batch {
            Some(batch) => {
                batch.descs += descs;
                // Relaxed: the driver comes here only after it has seen the first flags of the batch.
                self.memory.store_u16(at.plus(FLAGS_OFFSET), flags, Ordering::Relaxed);
            }
            None => self.batch = Some(Batch { start: self.used, flags, descs }),
        }
        self.used.advance(descs, self.size);
        if let Some(record) = &mut self.record {
            record.used(id);
        }
    }

    /// Shows all written used descriptors to the driver.
    #[inline(never)]
    pub fn publish_used(&mut self) {
        let Some(batch) = self.batch.take() else { return };
        self.held_descs -= batch.descs;
        self.shown_descs += u64::from(batch.descs);
        self.shown = self.used;
        if let Some(record) = &mut self.record {
            record.before_publish(self.used);
        }
        // Release: used descriptors and the frames themselves are visible before the flags of the first one, which the
        // driver waits for. Pairs with its read barrier after it has read them (VIRTIO 1.3 §2.8.22).
        let flags = self.slot(batch.start.index).plus(FLAGS_OFFSET);
        self.memory.store_u16(flags, batch.flags, Ordering::Release);
        if let Some(record) = &mut self.record {
            record.published();
        }
        if let Some(log) = &self.log {
            self.log_slots(batch.start, batch.descs);
            log.published();
        }
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline(never)]
    pub fn should_call(&mut self) -> bool {
        let since = self.shown_descs - self.called_at;
        if since == 0 {
            return false;
        }
        // SeqCst fence: our used flags are visible before the driver's wish is read. Pairs with the driver's full barrier
        // between writing its event suppression structure and looking at the ring again (VIRTIO 1.3 §2.8.22).
        fence(Ordering::SeqCst);
        self.called_at = self.shown_descs;
        // Both halves at once: they belong together.
        let event = self.memory.load_u32(self.driver_event, Ordering::Relaxed);
        match event >> 16 & 3 {
            RING_EVENT_FLAGS_DISABLE => false,
            RING_EVENT_FLAGS_DESC if self.event_idx => self.passed(Cursor::from_bits(event as u16), since),
            _ => true,
        }
    }

    /// Whether the slot at `event` is among the last `since` that were used.
    #[inline]
    fn passed(&self, event: Cursor, since: u64) -> bool {
        let this_lap = i64::from(self.shown.index) - i64::from(event.index);
        let ago = if event.wrap == self.shown.wrap { this_lap } else { this_lap + i64::from(self.size) };
        ago > 0 && ago as u64 <= since
    }

    /// Asks the driver not to kick.
    #[inline(never)]
    pub fn disable_kicks(&mut self) {
        self.store_device_event(RING_EVENT_FLAGS_DISABLE << 16 | UNUSED_OFFSET);
    }

    /// Asks the driver to kick when it adds a buffer; returns whether one is there already.
    pub fn enable_kicks(&mut self) -> bool {
        let end = self.end.filter(|end| self.is_waiting && *end != self.avail);
        let wish = if self.event_idx {
            RING_EVENT_FLAGS_DESC << 16 | u32::from(end.unwrap_or(self.avail).bits())
        } else {
            RING_EVENT_FLAGS_ENABLE << 16 | UNUSED_OFFSET
        };
        self.store_device_event(wish);
        // SeqCst fence: our wish is visible before the ring is looked at again. Pairs with the driver's full barrier
        // between writing flags and reading our event suppression structure (VIRTIO 1.3 §2.8.21.2).
        fence(Ordering::SeqCst);
        if let Some(end) = end {
            // Relaxed: take() looks again.
            return end.is_available(self.slot_flags(end.index, Ordering::Relaxed));
        }
        // A chain that is known to wait does so for room of ours: more of them are no news.
        let was_waiting = self.is_waiting;
        self.available();
        self.is_waiting && !was_waiting
    }

    fn store_device_event(&self, event: u32) {
        // Relaxed: one store, so that no driver sees half of it.
        self.memory.store_u32(self.device_event, event, Ordering::Relaxed);
        if let Some(log) = &self.log {
            log.used_ring(0, EVENT_BYTES);
        }
    }

    /// Whether the descriptor ring and the driver's event suppression structure hold nothing but zeros, as never-shared
    /// memory does.
    pub fn looks_unshared(&self) -> bool {
        self.memory.is_zero(self.driver_event, EVENT_BYTES)
            && self.memory.is_zero(self.ring, DESCRIPTOR_BYTES * u64::from(self.size))
    }

    /// The queue is stopped, and all was given back: where it goes on is for the front-end to say from now on.
    pub fn end_record(&mut self) {
        if let Some(mut record) = self.record.take() {
            record.invalidate();
        }
    }
}

/// Where to go on: `avail`, `used`, and the number of descriptors between them. `None` if the base is outside the ring.
///
/// DPDK's virtio-user leaves the high half of a base out. A device that has stopped has used all that it took, so that
/// both are equal in all cases but one: a front-end that cannot know better after a crash.
pub(crate) fn start_cursors(base: u32, size: u16) -> Option<(Cursor, Cursor, u16)> {
    let (avail, used) = (Cursor::from_bits(base as u16), Cursor::from_bits((base >> 16) as u16));
    if avail.index >= size {
        return None;
    }
    match avail.ahead_of(used, size).filter(|_| base >> 16 != 0 && used.index < size) {
        Some(held) => Some((avail, used, held)),
        None => Some((avail, avail, 0)),
    }
}
