//! The device side of a virtqueue, split (VIRTIO 1.3 §2.7) or packed (§2.8).
//!
//! A burst: [`Virtqueue::available`] → [`Virtqueue::take`] for each → [`Virtqueue::push_used`] for each →
//! [`Virtqueue::publish_used`] once → [`Virtqueue::should_call`] once.
//!
//! Invariant: nothing here trusts the driver. Every value is read once, checked once, and a broken ring ends in a
//! [`QueueFault`](crate::error::QueueFault), which the caller answers by stopping this queue only.

mod chain;
mod descriptor;
mod inflight_record;
mod packed;
mod packed_record;
mod queue;
mod split;
mod split_record;
#[cfg(test)]
mod tests;
mod write_log;

pub use chain::Direction;
pub use inflight_record::{InflightRecord, record_bytes};
pub use packed::PackedQueue;
pub use packed_record::PackedRecord;
pub use queue::Virtqueue;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use split::start_position;
pub use split::{QueueConfig, SplitQueue, Taken};
pub use split_record::SplitRecord;
pub use write_log::{Logged, WriteLog};

/// Most descriptors of a virtqueue, in both layouts (VIRTIO 1.3 §2.7, §2.8).
pub const QUEUE_SIZE_MAX: u32 = 32768;

/// Longest chain that is walked; more than any driver makes (QEMU's VIRTQUEUE_MAX_SIZE is 1024 too).
pub const CHAIN_DESCS_MAX: usize = 1024;
