//! A virtqueue of either layout: what the pump works with.

use std::sync::Arc;

use super::chain::Direction;
use super::inflight_record::InflightRecord;
use super::packed::PackedQueue;
use super::split::{QueueConfig, SplitQueue, Taken};
use super::write_log::WriteLog;
use crate::error::QueueFault;
use crate::guest_memory::{GuestMemory, Segment, UmemAddr};

/// The device side of a virtqueue.
///
/// What the pump needs of it for every frame lies here, whatever the layout: each operation on the rings costs one branch,
/// always the same for a queue. Those of packed rings are not inlined, to leave the pump's loop small for split ones.
#[derive(Debug)]
pub struct Virtqueue {
    rings: Rings,
    /// As the rings have it.
    memory: Arc<GuestMemory>,
    /// The region of memory that a buffer was found in last.
    region_hint: usize,
    /// As the rings have it, which log what they write themselves.
    log: Option<WriteLog>,
}

#[derive(Debug)]
enum Rings {
    /// VIRTIO 1.3 §2.7.
    Split(SplitQueue),
    /// VIRTIO 1.3 §2.8 (VIRTIO_F_RING_PACKED).
    Packed(PackedQueue),
}

/// The same call to whichever rings they are.
macro_rules! each {
    ($queue:expr, $rings:ident => $call:expr) => {
        match $queue {
            Rings::Split($rings) => $call,
            Rings::Packed($rings) => $call,
        }
    };
}

impl Virtqueue {
    /// Checks the rings and takes the queue up where it was left.
    ///
    /// # Errors
    /// [`QueueFault::BadSize`], [`QueueFault::BadBase`], [`QueueFault::RingOutsideMemory`].
    pub fn new(memory: Arc<GuestMemory>, config: &QueueConfig) -> Result<Self, QueueFault> {
        let rings = match config.packed {
            false => Rings::Split(SplitQueue::new(Arc::clone(&memory), config)?),
            true => Rings::Packed(PackedQueue::new(Arc::clone(&memory), config)?),
        };
        Ok(Self { rings, memory, region_hint: 0, log: None })
    }

    /// Goes on where a back-end ended without notice, if `record` is that of this ring, and keeps it from now on. Before
    /// anything is taken. Returns the number of heads that were in flight.
    pub fn resume(&mut self, record: InflightRecord) -> usize {
        match (&mut self.rings, record) {
            (Rings::Split(rings), InflightRecord::Split(record)) => rings.resume(record),
            (Rings::Packed(rings), InflightRecord::Packed(record)) => rings.resume(record),
            _ => unreachable!("the record of a virtqueue is of its layout"),
        }
    }

    /// Buffers may lie in more memory from now on.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        each!(&mut self.rings, rings => rings.set_memory(Arc::clone(&memory)));
        self.memory = memory;
    }

    /// Logs writes from now on, or no longer. All that was written before is in the log before.
    pub fn set_log(&mut self, log: Option<WriteLog>) {
        each!(&mut self.rings, rings => rings.set_log(log.clone()));
        self.log = log;
    }

    /// Whether writes are logged.
    #[inline]
    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Says that a part of a buffer was written, all of it in one region.
    #[inline]
    pub fn log_buffer(&self, start: UmemAddr, len_bytes: u64) {
        if let Some(log) = &self.log {
            log.buffer(&self.memory, start, len_bytes, self.region_hint);
        }
    }

    /// The memory that the rings and buffers live in.
    #[inline]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The region of memory that translated last, as a hint for the next look-up.
    #[inline]
    pub fn region_hint(&self) -> usize {
        self.region_hint
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        each!(&self.rings, rings => rings.size())
    }

    /// The ring base of vhost-user: where the queue would go on.
    pub fn base(&self) -> u32 {
        match &self.rings {
            Rings::Split(rings) => u32::from(rings.next_avail()),
            Rings::Packed(rings) => rings.base(),
        }
    }

    /// The [`Taken::position`] that the next head of the ring will have.
    #[inline]
    pub fn position(&self) -> u64 {
        each!(&self.rings, rings => rings.position())
    }

    /// Number of heads that can be taken now, at most; 0 if there is none.
    ///
    /// # Errors
    /// [`QueueFault::AvailIndexJump`] if the driver of a split virtqueue published more than the ring holds.
    #[inline]
    pub fn available(&mut self) -> Result<u16, QueueFault> {
        match &mut self.rings {
            Rings::Split(rings) => rings.available(),
            Rings::Packed(rings) => Ok(rings.available()),
        }
    }

    /// Takes the next head, and appends the segments of its chain to `segments`, up to its capacity. `None` if
    /// [`available`](Self::available) promised too much.
    ///
    /// # Errors
    /// A broken chain; then nothing is taken, and `segments` may hold a part of it.
    #[inline]
    pub fn take(&mut self, direction: Direction, segments: &mut Vec<Segment>) -> Result<Option<Taken>, QueueFault> {
        let hint = &mut self.region_hint;
        match &mut self.rings {
            Rings::Split(rings) => rings.take(direction, hint, segments),
            Rings::Packed(rings) => rings.take(direction, hint, segments),
        }
    }

    /// Takes the next head of a split ring if its chain is one segment, as most are; `None` if it is not, and then nothing
    /// is taken. [`available`](Self::available) said that there is one.
    ///
    /// # Errors
    /// [`QueueFault::HeadOutOfRange`].
    #[inline(always)]
    pub fn take_single(&mut self, direction: Direction) -> Result<Option<(Taken, Segment)>, QueueFault> {
        match &mut self.rings {
            Rings::Split(rings) => rings.take_single(direction, &mut self.region_hint),
            Rings::Packed(_) => Ok(None),
        }
    }

    /// Number of the ring's descriptors that a head that was taken and not used holds.
    #[cold]
    pub fn descs_of(&self, taken: Taken) -> u16 {
        each!(&self.rings, rings => rings.descs_of(taken.head))
    }

    /// Gives back the head taken last: it stays in the ring.
    #[inline]
    pub fn untake(&mut self, taken: Taken) {
        each!(&mut self.rings, rings => rings.untake(taken));
    }

    /// Returns, used with length 0, heads of an earlier back-end that were not taken again.
    pub fn give_up_resumed(&mut self) {
        each!(&mut self.rings, rings => rings.give_up_resumed());
    }

    /// Says that a head is used; the driver sees it after [`publish_used`](Self::publish_used).
    #[inline]
    pub fn push_used(&mut self, head: u16, len_bytes: u32) {
        each!(&mut self.rings, rings => rings.push_used(head, len_bytes));
    }

    /// Shows all used heads to the driver.
    #[inline]
    pub fn publish_used(&mut self) {
        each!(&mut self.rings, rings => rings.publish_used());
    }

    /// Whether the driver wants a call for what was published since the last time this was asked.
    #[inline]
    pub fn should_call(&mut self) -> bool {
        each!(&mut self.rings, rings => rings.should_call())
    }

    /// Asks the driver not to kick.
    #[inline]
    pub fn disable_kicks(&mut self) {
        each!(&mut self.rings, rings => rings.disable_kicks());
    }

    /// Asks the driver to kick when it adds a buffer; returns whether one is there already.
    ///
    /// # Errors
    /// As [`available`](Self::available).
    pub fn enable_kicks(&mut self) -> Result<bool, QueueFault> {
        match &mut self.rings {
            Rings::Split(rings) => rings.enable_kicks(),
            Rings::Packed(rings) => Ok(rings.enable_kicks()),
        }
    }

    /// Whether the driver's parts of the rings hold nothing but zeros, as never-shared memory does.
    pub fn looks_unshared(&self) -> bool {
        each!(&self.rings, rings => rings.looks_unshared())
    }

    /// The queue is stopped, and all was given back.
    pub fn stopped(&mut self) {
        if let Rings::Packed(rings) = &mut self.rings {
            rings.end_record();
        }
    }
}
