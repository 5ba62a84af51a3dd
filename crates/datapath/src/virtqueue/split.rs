//! One split virtqueue, seen from the device.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::QUEUE_SIZE_MAX;
use super::chain::{self, Direction, Table};
use super::descriptor::{DESCRIPTOR_BYTES, Descriptor};
use super::split_record::SplitRecord;
use super::write_log::WriteLog;
use crate::error::QueueFault;
use crate::guest_memory::{Entries, GuestMemory, Segment, UmemAddr, UserAddr};

const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;
const VIRTQ_USED_F_NO_NOTIFY: u16 = 1;
const USED_ELEMENT_BYTES: u64 = 8;
/// flags and idx, in front of the entries of the avail and the used ring.
const RING_HEADER_BYTES: u64 = 4;
/// Where idx is in the used ring.
const USED_IDX_OFFSET: u64 = 2;

/// Positions in the avail ring start here; below are heads that an earlier back-end took, whose entries are gone.
pub(super) const RING_POSITIONS: u64 = 1 << 32;

/// A head that was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Its index; of a packed virtqueue, the buffer id.
    pub head: u16,
    /// The queue's position when it was taken: never the same again, for a head may be kept while 65536 others pass.
    pub position: u64,
}

/// Where the rings of a queue are and how they are used.
#[derive(Debug, Clone, Copy)]
pub struct QueueConfig {
    /// Number of descriptors, up to 32768; a power of two if it is a split virtqueue.
    pub size: u32,
    /// Where to go on (SET_VRING_BASE): the next avail entry to take. In a packed virtqueue both places in its ring.
    pub base: u32,
    /// Descriptor table, or ring, in the front-end's addresses.
    pub desc: UserAddr,
    /// Avail ring, in the front-end's addresses. In a packed virtqueue the driver's event suppression structure.
    pub avail: UserAddr,
    /// Used ring, in the front-end's addresses. In a packed virtqueue the device's event suppression structure.
    pub used: UserAddr,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_RING_PACKED was negotiated.
    pub packed: bool,
}

/// The device side of a split virtqueue. Holds the memory that its rings live in.
#[derive(Debug)]
pub struct SplitQueue {
    memory: Arc<GuestMemory>,
    size: u16,
    desc: UmemAddr,
    descs: Entries<[u64; 2]>,
    avail: UmemAddr,
    avail_entries: Entries<u16>,
    used: UmemAddr,
    /// Head and length of each.
    used_entries: Entries<[u32; 2]>,
    event_idx: bool,
    /// Next avail entry to take; free-running. Its low 16 bits are the ring's index; all of it is one head's alone.
    position: u64,
    /// Heads that an earlier back-end took and did not use: the next to be taken, before those of the avail ring.
    again: VecDeque<u16>,
    /// How many of those have been taken.
    again_taken: u64,
    /// What is in flight, for whoever comes after this process.
    record: Option<SplitRecord>,
    /// Avail index as last seen.
    avail_idx: u16,
    /// Next used entry to write; free-running. Entries up to here may not be published yet.
    next_used: u16,
    /// Used index as last published.
    used_idx: u16,
    /// Used index when the driver was last considered for a call.
    called_at: u16,
    /// Where writes to guest memory are logged, if they are. Never while nobody migrates: one branch per burst then.
    log: Option<WriteLog>,
}

impl SplitQueue {
    /// Checks the rings and takes the queue up where it was left.
    ///
    /// # Errors
    /// [`QueueFault::BadSize`], [`QueueFault::BadBase`], [`QueueFault::RingOutsideMemory`].
    pub fn new(memory: Arc<GuestMemory>, config: &QueueConfig) -> Result<Self, QueueFault> {
        if !config.size.is_power_of_two() || config.size > QUEUE_SIZE_MAX {
            return Err(QueueFault::BadSize { size: config.size });
        }
        let bad_base = QueueFault::BadBase { base: config.base, size: config.size };
        let base = u16::try_from(config.base).map_err(|_| bad_base)?;
        let entries = u64::from(config.size);
        let place = |ring, addr: UserAddr, align, len_bytes| {
            memory
                .translate_user(addr, len_bytes)
                .filter(|at| at.0.is_multiple_of(align) && addr.0.is_multiple_of(align))
                .ok_or(QueueFault::RingOutsideMemory { ring, address: addr.0, len_bytes })
        };
        // Each ring ends with a 16-bit event field (VIRTIO 1.3 §2.7.6, §2.7.8).
        let desc = place("descriptor table", config.desc, 16, entries * DESCRIPTOR_BYTES)?;
        let avail = place("avail ring", config.avail, 2, RING_HEADER_BYTES + entries * 2 + 2)?;
        let used = place("used ring", config.used, 4, RING_HEADER_BYTES + entries * USED_ELEMENT_BYTES + 2)?;
        // Relaxed: the used index is ours alone; it says what an earlier back-end published.
        let used_idx = memory.load_u16(used.plus(USED_IDX_OFFSET), Ordering::Relaxed);
        // Relaxed: a plausible value is all that is wanted; available() looks again.
        let avail_idx = memory.load_u16(avail.plus(2), Ordering::Relaxed);
        let size = config.size as u16;
        let position = start_position(base, used_idx, avail_idx, size);
        Ok(Self {
            size,
            desc,
            descs: Entries::new(&memory, desc, size),
            avail,
            avail_entries: Entries::new(&memory, avail.plus(RING_HEADER_BYTES), size),
            used,
            used_entries: Entries::new(&memory, used.plus(RING_HEADER_BYTES), size),
            memory,
            event_idx: config.event_idx,
            position,
            again: VecDeque::new(),
            again_taken: 0,
            record: None,
            avail_idx: position as u16,
            next_used: used_idx,
            used_idx,
            called_at: used_idx,
            log: None,
        })
    }

    /// Goes on where a back-end ended without notice, if `record` is that of this ring, and keeps it from now on. Before
    /// anything is taken. Returns the number of heads that were in flight.
    ///
    /// Heads taken last stay in the avail ring, by rewinding it; those that cannot be are taken again, in their order.
    pub fn resume(&mut self, mut record: SplitRecord) -> usize {
        // Acquire: as in available().
        let avail_idx = self.memory.load_u16(self.avail.plus(2), Ordering::Acquire);
        let found = record.recover(self.used_idx, avail_idx, |index| self.avail_entry(index));
        let mut heads = found.unwrap_or_default();
        let in_flight = heads.len();
        if heads.is_empty() {
            record.begin(self.used_idx);
        } else {
            self.position = ring_position(self.used_idx.wrapping_add(in_flight as u16));
        }
        if self.next_avail() != self.used_idx.wrapping_add(in_flight as u16) {
            // The front-end says that heads are gone which were never ours. A record could not tell where it is.
            record.invalidate();
            return 0;
        }
        while let Some(&head) = heads.last()
            && head == self.avail_entry(self.next_avail().wrapping_sub(1))
        {
            self.position -= 1;
            record.untaken(head);
            heads.pop();
        }
        self.avail_idx = self.next_avail();
        self.again = heads.into();
        self.record = Some(record);
        in_flight
    }

    #[inline]
    fn avail_entry(&self, index: u16) -> u16 {
        // Ordered by the Acquire load of the index.
        u16::from_le(self.avail_entries.read(index))
    }

    /// Buffers may lie in more memory from now on.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        assert!(memory.is_same_arena(&self.memory), "a running queue's addresses keep their meaning");
        self.memory = memory;
    }

    /// Logs writes from now on, or no longer. All that was written before is in the log before.
    pub fn set_log(&mut self, log: Option<WriteLog>) {
        debug_assert_eq!(self.used_idx, self.next_used, "what is written but not published is not logged yet");
        self.log = log;
    }

    #[inline]
    fn log_used_ring(&self, offset: u64, len_bytes: u64) {
        if let Some(log) = &self.log {
            log.used_ring(offset, len_bytes);
        }
    }

    /// Says that used entries from `first` on, and the index, were written.
    #[cold]
    fn log_published(&self, log: &WriteLog, first: u16) {
        let size = u64::from(self.size);
        let count = u64::from(self.used_idx.wrapping_sub(first)).min(size);
        let start = u64::from(first) & (size - 1);
        let up_to_end = count.min(size - start);
        log.used_ring(RING_HEADER_BYTES + start * USED_ELEMENT_BYTES, up_to_end * USED_ELEMENT_BYTES);
        log.used_ring(RING_HEADER_BYTES, (count - up_to_end) * USED_ELEMENT_BYTES);
        log.used_ring(USED_IDX_OFFSET, 2);
        log.published();
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The ring base: the next avail entry that would be taken.
    #[inline]
    pub fn next_avail(&self) -> u16 {
        self.position as u16
    }

    /// The next entry of the avail ring, as the [`Taken::position`] that its head will have.
    #[inline]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Number of heads that can be taken now.
    ///
    /// # Errors
    /// [`QueueFault::AvailIndexJump`] if the driver published more than the ring holds.
    #[inline]
    pub fn available(&mut self) -> Result<u16, QueueFault> {
        // Acquire: ring entries and descriptors written before the index are seen. Pairs with the driver's write
        // barrier before it stores avail->idx (VIRTIO 1.3 §2.7.13.3).
        self.avail_idx = self.memory.load_u16(self.avail.plus(2), Ordering::Acquire);
        let ahead = self.avail_idx.wrapping_sub(self.next_avail());
        if ahead > self.size {
            return Err(QueueFault::AvailIndexJump {
                avail_idx: self.avail_idx,
                next_avail: self.next_avail(),
                ahead,
                size: self.size,
            });
        }
        Ok(ahead.saturating_add(self.again.len() as u16))
    }

    /// Takes the next head and appends the segments of its chain to `segments`, up to its capacity.
    /// [`available`](Self::available) said that there is one, so that it is never `None`. `hint` as in [`GuestMemory::translate`].
    ///
    /// # Errors
    /// [`QueueFault::HeadOutOfRange`], or a broken chain; then nothing is taken, and `segments` may hold a part of it.
    pub fn take(
        &mut self,
        direction: Direction,
        hint: &mut usize,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<Taken>, QueueFault> {
        let taken = self.take_head()?;
        if let Err(fault) = self.walk(taken.head, direction, hint, segments) {
            self.untake(taken);
            return Err(fault);
        }
        Ok(Some(taken))
    }

    /// Takes the next head if its chain is one segment, as most are; `None` if it is not, and then nothing is taken.
    /// [`available`](Self::available) said that there is one.
    ///
    /// # Errors
    /// [`QueueFault::HeadOutOfRange`].
    #[inline(always)]
    pub fn take_single(
        &mut self,
        direction: Direction,
        hint: &mut usize,
    ) -> Result<Option<(Taken, Segment)>, QueueFault> {
        if !self.again.is_empty() {
            return Ok(None);
        }
        let head = self.next_head()?;
        let first = Descriptor::from_words(self.descs.read(head));
        Ok(chain::single(&self.memory, &first, direction, hint).map(|segment| (self.take_from_ring(head), segment)))
    }

    /// Takes the next head, whatever its chain.
    ///
    /// # Errors
    /// [`QueueFault::HeadOutOfRange`].
    pub(crate) fn take_head(&mut self) -> Result<Taken, QueueFault> {
        if !self.again.is_empty() {
            return Ok(self.take_again());
        }
        self.next_head().map(|head| self.take_from_ring(head))
    }

    /// The head that is next in the avail ring.
    #[inline(always)]
    fn next_head(&self) -> Result<u16, QueueFault> {
        debug_assert_ne!(self.next_avail(), self.avail_idx, "a head is taken only if one is available");
        let head = self.avail_entry(self.next_avail());
        if head < self.size { Ok(head) } else { Err(QueueFault::HeadOutOfRange { head, size: self.size }) }
    }

    #[inline(always)]
    fn take_from_ring(&mut self, head: u16) -> Taken {
        let taken = Taken { head, position: self.position };
        self.position += 1;
        if let Some(record) = &mut self.record {
            record.taken(head);
        }
        taken
    }

    #[cold]
    fn take_again(&mut self) -> Taken {
        let Some(head) = self.again.pop_front() else { unreachable!("the caller has looked") };
        self.again_taken += 1;
        Taken { head, position: self.again_taken - 1 }
    }

    /// Number of the ring's descriptors that a head holds: one if they are in a table of its own.
    pub fn descs_of(&self, head: u16) -> u16 {
        let table = Table { start: self.desc, size: u32::from(self.size) };
        chain::count(&self.memory, table, head)
    }

    /// Gives back the head taken last: the driver's entry stays in the avail ring.
    #[inline]
    pub fn untake(&mut self, taken: Taken) {
        if taken.position < RING_POSITIONS {
            self.again.push_front(taken.head);
            self.again_taken -= 1;
            return;
        }
        self.position -= 1;
        debug_assert_eq!(taken.position, self.position, "only the head taken last can be given back");
        if let Some(record) = &mut self.record {
            record.untaken(taken.head);
        }
    }

    /// Returns, used with length 0, heads of an earlier back-end that were not taken again.
    pub fn give_up_resumed(&mut self) {
        while let Some(head) = self.again.pop_front() {
            self.push_used(head, 0);
        }
    }

    /// Appends the segments of a chain to `segments`, up to its capacity.
    ///
    /// # Errors
    /// A broken chain.
    pub(crate) fn walk(
        &self,
        head: u16,
        direction: Direction,
        hint: &mut usize,
        segments: &mut Vec<Segment>,
    ) -> Result<(), QueueFault> {
        let table = Table { start: self.desc, size: u32::from(self.size) };
        chain::walk(&self.memory, table, head, direction, hint, segments)
    }

    /// Writes a used entry; the driver sees it after [`publish_used`](Self::publish_used).
    #[inline(always)]
    pub fn push_used(&mut self, head: u16, len_bytes: u32) {
        if let Some(record) = &mut self.record
            && !record.used(head)
        {
            self.publish_full_batch(head);
        }
        self.used_entries.write(self.next_used, [u32::from(head).to_le(), len_bytes.to_le()]);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes room for `head` in the record.
    #[cold]
    fn publish_full_batch(&mut self, head: u16) {
        self.publish_used();
        let has_room = self.record.as_mut().is_none_or(|record| record.used(head));
        debug_assert!(has_room, "a batch that was published is empty");
    }

    /// Shows all written used entries to the driver.
    #[inline]
    pub fn publish_used(&mut self) {
        if self.used_idx != self.next_used {
            let first = self.used_idx;
            self.used_idx = self.next_used;
            if let Some(record) = &self.record {
                record.before_publish();
            }
            // Release: used entries and the frames themselves are visible before the index. Pairs with the driver's
            // read barrier after it loads used->idx (VIRTIO 1.3 §2.7.14).
            self.memory.store_u16(self.used.plus(USED_IDX_OFFSET), self.used_idx, Ordering::Release);
            if let Some(record) = &mut self.record {
                record.published(self.used_idx);
            }
            if let Some(log) = &self.log {
                self.log_published(log, first);
            }
        }
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline]
    pub fn should_call(&mut self) -> bool {
        let (old, new) = (self.called_at, self.used_idx);
        if old == new {
            return false;
        }
        // SeqCst fence: our used->idx store is visible before the driver's wish is read. Pairs with the driver's full
        // barrier between writing used_event/flags and looking at used->idx again (VIRTIO 1.3 §2.7.7.1).
        fence(Ordering::SeqCst);
        self.called_at = new;
        if self.event_idx {
            let event = self.memory.load_u16(self.used_event(), Ordering::Relaxed);
            crossed(event, new, old)
        } else {
            self.memory.load_u16(self.avail, Ordering::Relaxed) & VIRTQ_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver not to kick. With EVENT_IDX the stale avail_event does that by itself.
    #[inline]
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.memory.store_u16(self.used, VIRTQ_USED_F_NO_NOTIFY, Ordering::Relaxed);
            self.log_used_ring(0, 2);
        }
    }

    /// Asks the driver to kick when it adds a buffer; returns whether one is there already.
    ///
    /// # Errors
    /// [`QueueFault::AvailIndexJump`].
    pub fn enable_kicks(&mut self) -> Result<bool, QueueFault> {
        if self.event_idx {
            let avail_event = RING_HEADER_BYTES + u64::from(self.size) * USED_ELEMENT_BYTES;
            self.memory.store_u16(self.used.plus(avail_event), self.avail_idx, Ordering::Relaxed);
            self.log_used_ring(avail_event, 2);
        } else {
            self.memory.store_u16(self.used, 0, Ordering::Relaxed);
            self.log_used_ring(0, 2);
        }
        // SeqCst fence: our wish is visible before avail->idx is read again. Pairs with the driver's full barrier
        // between storing avail->idx and reading avail_event/flags (VIRTIO 1.3 §2.7.13.4).
        fence(Ordering::SeqCst);
        let seen = self.avail_idx;
        self.available()?;
        Ok(self.avail_idx != seen)
    }

    /// Whether descriptor table and avail ring hold nothing but zeros, as never-shared memory does.
    pub fn looks_unshared(&self) -> bool {
        self.memory.is_zero(self.avail, RING_HEADER_BYTES + 2 * u64::from(self.size))
            && self.memory.is_zero(self.desc, DESCRIPTOR_BYTES * u64::from(self.size))
    }

    fn used_event(&self) -> UmemAddr {
        self.avail.plus(RING_HEADER_BYTES + 2 * u64::from(self.size))
    }
}

/// Where to go on in the avail ring: at the front-end's base, unless it says that used heads are to be taken again, or
/// heads that are not there. DPDK's virtio-user says 0 for a ring that it has used for long; at the used index nothing is
/// lost as long as heads were used in their order.
pub(crate) fn start_position(base: u16, used_idx: u16, avail_idx: u16, size: u16) -> u64 {
    let outstanding = avail_idx.wrapping_sub(used_idx);
    let is_impossible = outstanding <= size && base.wrapping_sub(used_idx) > outstanding;
    ring_position(if is_impossible { used_idx } else { base })
}

/// The position of an avail index, with room below it for all that may be rewound: an index that has just wrapped too.
fn ring_position(idx: u16) -> u64 {
    RING_POSITIONS + (1 << 16) + u64::from(idx)
}

/// Whether an index moving from `old` to `new` has passed `event` (vring_need_event, VIRTIO 1.3 §2.7.10).
#[inline]
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
