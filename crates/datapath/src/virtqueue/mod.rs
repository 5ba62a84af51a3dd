//! The device side of a split virtqueue (VIRTIO 1.3 §2.7).
//!
//! A burst: [`SplitQueue::available`] → [`SplitQueue::take`] for each → [`SplitQueue::push_used`] for each → [`SplitQueue::publish_used`] once → [`SplitQueue::should_call`] once.
//!
//! Invariant: nothing here trusts the driver. Every value is read once, checked once, and a broken ring ends in a
//! [`QueueFault`](crate::error::QueueFault), which the caller answers by stopping this queue only.

mod chain;
mod descriptor;
mod inflight_record;
mod split;
#[cfg(test)]
mod tests;
mod write_log;

pub use chain::Direction;
pub use inflight_record::{InflightRecord, record_bytes};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use split::start_position;
pub use split::{QueueConfig, SplitQueue, Taken};
pub use write_log::{Logged, WriteLog};

/// Longest chain that is walked; more than any driver makes (QEMU's VIRTQUEUE_MAX_SIZE is 1024 too).
pub const CHAIN_DESCS_MAX: usize = 1024;
