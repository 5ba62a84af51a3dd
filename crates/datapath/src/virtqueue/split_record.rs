//! Which heads of a split virtqueue are in flight.
//!
//! ```text
//! 0          8         10         12                14         16
//! | features | version | desc_num | last_batch_head | used_idx | 16 bytes for each descriptor …
//!                                       each: | inflight | padding | next (at 6) | counter (at 8) |
//! ```
//!
//! The layout and the order of stores are vhost-user.rst, "Inflight I/O tracking", split virtqueue. The avail position
//! needs no field, for each head that was taken is in flight or used: it is the used index plus the number of heads in
//! flight.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::inflight_record::in_program_order;
use crate::guest_memory::SharedFile;

#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

/// Of one head.
#[repr(C)]
struct State {
    inflight: AtomicU8,
    padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const HEADER_BYTES: u64 = size_of::<Header>() as u64;
const STATE_BYTES: u64 = size_of::<State>() as u64;
const _: () = assert!(HEADER_BYTES == 16 && STATE_BYTES == 16, "the layout is the specification's");

/// The only version there is; 0 is a record that nobody has begun.
const VERSION_1: u16 = 1;

/// Bytes in front, and for each descriptor.
pub(super) const SIZES: (u64, u64) = (HEADER_BYTES, STATE_BYTES);

/// The record of one split virtqueue.
#[derive(Debug)]
pub struct SplitRecord {
    /// Keeps mapped what `header` and `states` point at.
    _file: SharedFile,
    header: NonNull<[Header]>,
    /// By head.
    states: NonNull<[State]>,
    /// Orders heads by when they were taken.
    next_counter: u64,
    /// Heads used since used entries were last published.
    batch: Vec<u16>,
}

// SAFETY: the pointers are into the file's mapping, which is `Send` itself.
unsafe impl Send for SplitRecord {}

impl SplitRecord {
    pub(super) fn new(file: SharedFile, size: u16) -> Self {
        let (header, states) = (file.values(0, 1), file.values(HEADER_BYTES, usize::from(size)));
        Self { _file: file, header, states, next_counter: 0, batch: Vec::with_capacity(usize::from(size)) }
    }

    #[inline]
    fn header(&self) -> &Header {
        // SAFETY: one value, inside the mapping that `_file` keeps; it is made of atomics.
        unsafe { self.header.cast().as_ref() }
    }

    #[inline]
    fn states(&self) -> &[State] {
        // SAFETY: inside the mapping that `_file` keeps; states are made of atomics.
        unsafe { self.states.as_ref() }
    }

    #[inline]
    fn state(&self, head: u16) -> &State {
        &self.states()[usize::from(head)]
    }

    fn size(&self) -> u16 {
        self.states.len() as u16
    }

    /// A head was taken.
    #[inline]
    pub fn taken(&mut self, head: u16) {
        let state = self.state(head);
        state.counter.store(self.next_counter, Ordering::Relaxed);
        in_program_order();
        state.inflight.store(1, Ordering::Relaxed);
        in_program_order();
        self.next_counter += 1;
    }

    /// The head taken last is in the avail ring again.
    #[inline]
    pub fn untaken(&mut self, head: u16) {
        self.state(head).inflight.store(0, Ordering::Relaxed);
        in_program_order();
    }

    /// A head was used; the driver does not see it yet. Returns false, having done nothing, if no more heads can be used
    /// before they are published: only a driver that posts a head twice gets there.
    #[inline]
    pub fn used(&mut self, head: u16) -> bool {
        if self.batch.len() == self.batch.capacity() {
            return false;
        }
        let last = &self.header().last_batch_head;
        // Only ever read back by whoever finds the record, who checks it.
        self.state(head).next.store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        in_program_order();
        last.store(head, Ordering::Relaxed);
        self.batch.push(head);
        true
    }

    /// Call it before the used index is stored: the batch is complete.
    #[inline]
    pub fn before_publish(&self) {
        in_program_order();
    }

    /// The used index was stored: the driver sees the batch.
    #[inline]
    pub fn published(&mut self, used_idx: u16) {
        in_program_order();
        for &head in &self.batch {
            self.state(head).inflight.store(0, Ordering::Relaxed);
        }
        self.batch.clear();
        in_program_order();
        self.header().used_idx.store(used_idx, Ordering::Relaxed);
        in_program_order();
    }

    /// Completes what the writer of the record was at when it ended. Returns the heads in flight in the order in which
    /// they were taken, or `None` if this is not the record of a ring with these indices.
    ///
    /// `used_idx` and `avail_idx` are those of the ring now, `avail_entry` reads an entry of it by its index.
    pub fn recover(&mut self, used_idx: u16, avail_idx: u16, avail_entry: impl Fn(u16) -> u16) -> Option<Vec<u16>> {
        let load = |field: &AtomicU16| field.load(Ordering::Relaxed);
        let header = self.header();
        let outstanding = avail_idx.wrapping_sub(used_idx);
        let unrecorded = used_idx.wrapping_sub(load(&header.used_idx));
        if load(&header.version) != VERSION_1
            || load(&header.desc_num) != self.size()
            || outstanding.max(unrecorded) > self.size()
        {
            return None;
        }
        self.finish_batch(unrecorded)?;
        self.header().used_idx.store(used_idx, Ordering::Relaxed);
        in_program_order();

        let mut heads: Vec<(u64, u16)> = (0..self.size())
            .filter(|&head| self.state(head).inflight.load(Ordering::Relaxed) == 1)
            .map(|head| (self.state(head).counter.load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        if heads.len() > usize::from(outstanding) {
            return None;
        }
        let is_in_flight = |head: u16| head < self.size() && self.state(head).inflight.load(Ordering::Relaxed) == 1;
        let position = used_idx.wrapping_add(heads.len() as u16);
        let pending = avail_idx.wrapping_sub(position);
        if (0..pending).any(|ahead| is_in_flight(avail_entry(position.wrapping_add(ahead)))) {
            return None;
        }
        self.next_counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(heads.into_iter().map(|(_, head)| head).collect())
    }

    /// Clears the marks of a batch of `count` heads that was published but not recorded as such.
    fn finish_batch(&self, count: u16) -> Option<()> {
        let mut head = self.header().last_batch_head.load(Ordering::Relaxed);
        for _ in 0..count {
            if head >= self.size() {
                return None;
            }
            self.state(head).inflight.store(0, Ordering::Relaxed);
            head = self.state(head).next.load(Ordering::Relaxed);
        }
        in_program_order();
        Some(())
    }

    /// Starts the record anew: nothing is in flight.
    pub fn begin(&mut self, used_idx: u16) {
        self.invalidate();
        for head in 0..self.size() {
            self.state(head).inflight.store(0, Ordering::Relaxed);
        }
        self.header().desc_num.store(self.size(), Ordering::Relaxed);
        self.header().used_idx.store(used_idx, Ordering::Relaxed);
        self.next_counter = 0;
        in_program_order();
        self.header().version.store(VERSION_1, Ordering::Relaxed);
        in_program_order();
    }

    /// Makes the record one that nobody will go by.
    pub fn invalidate(&mut self) {
        self.header().version.store(0, Ordering::Relaxed);
        in_program_order();
    }
}
