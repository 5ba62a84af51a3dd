//! Which heads of a virtqueue are in flight, in memory that outlives this process.
//!
//! ```text
//! 0          8         10         12                14         16
//! | features | version | desc_num | last_batch_head | used_idx | 16 bytes for each descriptor …
//!                                       each: | inflight | padding | next (at 6) | counter (at 8) |
//! ```
//!
//! The layout and the order of stores are vhost-user.rst, "Inflight I/O tracking", split virtqueue. They make every
//! moment a possible end: whoever opens the record afterwards knows which heads were taken and not used. The avail
//! position needs no field, for each head that was taken is in flight or used: it is the used index plus the number of
//! heads in flight.
//!
//! A process that is killed has done all of its stores up to some point of its program, and none after it; what has to
//! be kept in order is therefore the compiler only.
//!
//! Invariant: what is found in a record is not trusted. A record that does not match its ring is started anew.

use std::os::fd::RawFd;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::error::HostError;
use crate::guest_memory::{FileSpec, SharedFile};

const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX: u64 = 14;
const HEADER_BYTES: u64 = 16;
const DESC_STATE_BYTES: u64 = 16;
const INFLIGHT: u64 = 0;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

/// The only version there is; 0 is a record that nobody has begun.
const VERSION_1: u16 = 1;

/// Length in bytes of the record of a virtqueue of `size` descriptors.
pub fn record_bytes(size: u32) -> u64 {
    HEADER_BYTES + DESC_STATE_BYTES * u64::from(size)
}

/// The record of one virtqueue.
#[derive(Debug)]
pub struct InflightRecord {
    file: SharedFile,
    size: u16,
    /// Orders heads by when they were taken.
    next_counter: u64,
    /// Heads used since used entries were last published.
    batch: Vec<u16>,
}

impl InflightRecord {
    /// Maps the record of a virtqueue of `size` descriptors, which starts `offset` bytes into a file.
    ///
    /// # Errors
    /// As [`SharedFile::map`]. EINVAL if `size` is no queue size, or `offset` no multiple of 8.
    pub fn map(fd: RawFd, offset: u64, size: u32) -> Result<Self, HostError> {
        let what = format!("the record of what is in flight on a virtqueue of {size} descriptors");
        if !offset.is_multiple_of(8) {
            return Err(HostError::new(libc::EINVAL, format!("cannot map {what}"), "it must start at a multiple of 8"));
        }
        let file = SharedFile::map(&FileSpec { fd, offset, size_bytes: record_bytes(size) }, &what)?;
        let size = u16::try_from(size)
            .map_err(|_| HostError::new(libc::EINVAL, format!("cannot map {what}"), "a ring has at most 32768"))?;
        Ok(Self { file, size, next_counter: 0, batch: Vec::with_capacity(usize::from(size)) })
    }

    /// A head was taken.
    #[inline]
    pub fn taken(&mut self, head: u16) {
        let state = state(head);
        self.file.u64(state + COUNTER).store(self.next_counter, Ordering::Relaxed);
        self.next_counter += 1;
        in_program_order();
        self.file.u8(state + INFLIGHT).store(1, Ordering::Relaxed);
        in_program_order();
    }

    /// The head taken last is in the avail ring again.
    #[inline]
    pub fn untaken(&mut self, head: u16) {
        self.file.u8(state(head) + INFLIGHT).store(0, Ordering::Relaxed);
        in_program_order();
    }

    /// Whether no more heads can be used before they are published. Only a driver that posts a head twice gets there.
    #[inline]
    pub fn batch_is_full(&self) -> bool {
        self.batch.len() == usize::from(self.size)
    }

    /// A head was used; the driver does not see it yet.
    #[inline]
    pub fn used(&mut self, head: u16) {
        let last = self.file.u16(LAST_BATCH_HEAD);
        // Only ever read back by whoever finds the record, who checks it.
        self.file.u16(state(head) + NEXT).store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        in_program_order();
        last.store(head, Ordering::Relaxed);
        self.batch.push(head);
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
            self.file.u8(state(head) + INFLIGHT).store(0, Ordering::Relaxed);
        }
        self.batch.clear();
        in_program_order();
        self.file.u16(USED_IDX).store(used_idx, Ordering::Relaxed);
        in_program_order();
    }

    /// Completes what the writer of the record was at when it ended. Returns the heads in flight in the order in which
    /// they were taken, or `None` if this is not the record of a ring with these indices.
    ///
    /// `used_idx` and `avail_idx` are those of the ring now, `avail_entry` reads an entry of it by its index.
    pub fn recover(&mut self, used_idx: u16, avail_idx: u16, avail_entry: impl Fn(u16) -> u16) -> Option<Vec<u16>> {
        let load = |offset| self.file.u16(offset).load(Ordering::Relaxed);
        let outstanding = avail_idx.wrapping_sub(used_idx);
        let unrecorded = used_idx.wrapping_sub(load(USED_IDX));
        if load(VERSION) != VERSION_1 || load(DESC_NUM) != self.size || outstanding.max(unrecorded) > self.size {
            return None;
        }
        self.finish_batch(unrecorded)?;
        self.file.u16(USED_IDX).store(used_idx, Ordering::Relaxed);
        in_program_order();

        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.file.u8(state(head) + INFLIGHT).load(Ordering::Relaxed) == 1)
            .map(|head| (self.file.u64(state(head) + COUNTER).load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        if heads.len() > usize::from(outstanding) {
            return None;
        }
        let is_in_flight =
            |head: u16| head < self.size && self.file.u8(state(head) + INFLIGHT).load(Ordering::Relaxed) == 1;
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
        let mut head = self.file.u16(LAST_BATCH_HEAD).load(Ordering::Relaxed);
        for _ in 0..count {
            if head >= self.size {
                return None;
            }
            self.file.u8(state(head) + INFLIGHT).store(0, Ordering::Relaxed);
            head = self.file.u16(state(head) + NEXT).load(Ordering::Relaxed);
        }
        in_program_order();
        Some(())
    }

    /// Starts the record anew: nothing is in flight.
    pub fn begin(&mut self, used_idx: u16) {
        self.invalidate();
        for head in 0..self.size {
            self.file.u8(state(head) + INFLIGHT).store(0, Ordering::Relaxed);
        }
        self.file.u16(DESC_NUM).store(self.size, Ordering::Relaxed);
        self.file.u16(USED_IDX).store(used_idx, Ordering::Relaxed);
        self.next_counter = 0;
        in_program_order();
        self.file.u16(VERSION).store(VERSION_1, Ordering::Relaxed);
        in_program_order();
    }

    /// Makes the record one that nobody will go by.
    pub fn invalidate(&mut self) {
        self.file.u16(VERSION).store(0, Ordering::Relaxed);
        in_program_order();
    }
}

/// Where the state of a head is.
#[inline]
fn state(head: u16) -> u64 {
    HEADER_BYTES + DESC_STATE_BYTES * u64::from(head)
}

/// Keeps the compiler from moving stores across; see the module's documentation. Costs nothing.
#[inline]
fn in_program_order() {
    compiler_fence(Ordering::SeqCst);
}
