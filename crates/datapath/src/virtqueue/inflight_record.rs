//! What is in flight on a virtqueue, in memory that outlives this process (vhost-user.rst, "Inflight I/O tracking").
//!
//! The order of stores makes every moment a possible end: whoever opens a record afterwards knows what was taken and not
//! used. A process that is killed has done all of its stores up to some point of its program, and none after it; what has
//! to be kept in order is therefore the compiler only.
//!
//! Invariant: what is found in a record is not trusted. A record that does not match its ring is started anew.

use std::os::fd::RawFd;
use std::sync::atomic::{Ordering, compiler_fence};

use super::QUEUE_SIZE_MAX;
use super::packed_record::{self, PackedRecord};
use super::split_record::{self, SplitRecord};
use crate::error::HostError;
use crate::guest_memory::{FileSpec, SharedFile};

/// The record of one virtqueue.
#[derive(Debug)]
pub enum InflightRecord {
    /// Of a split virtqueue.
    Split(SplitRecord),
    /// Of a packed virtqueue.
    Packed(PackedRecord),
}

/// Length in bytes of the record of a virtqueue of `size` descriptors.
pub fn record_bytes(size: u32, packed: bool) -> u64 {
    let (header, entry) = if packed { packed_record::SIZES } else { split_record::SIZES };
    header + entry * u64::from(size)
}

impl InflightRecord {
    /// Maps the record of a virtqueue of `size` descriptors, which starts `offset` bytes into a file.
    ///
    /// # Errors
    /// As [`SharedFile::map`]. EINVAL if `size` is no queue size, or `offset` no multiple of 8.
    pub fn map(fd: RawFd, offset: u64, size: u32, packed: bool) -> Result<Self, HostError> {
        let what = format!("the record of what is in flight on a virtqueue of {size} descriptors");
        let refused = |why| Err(HostError::new(libc::EINVAL, format!("cannot map {what}"), why));
        if !offset.is_multiple_of(8) {
            return refused("it must start at a multiple of 8");
        }
        if size > QUEUE_SIZE_MAX {
            return refused("a ring has at most 32768");
        }
        let file = SharedFile::map(&FileSpec { fd, offset, size_bytes: record_bytes(size, packed) }, &what)?;
        let size = size as u16;
        Ok(if packed { Self::Packed(PackedRecord::new(file, size)) } else { Self::Split(SplitRecord::new(file, size)) })
    }
}

/// Keeps the compiler from moving stores across; see the module's documentation. Costs nothing.
#[inline]
pub(super) fn in_program_order() {
    compiler_fence(Ordering::SeqCst);
}
