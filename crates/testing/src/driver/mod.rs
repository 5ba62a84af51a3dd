//! The driver side of virtqueues, split (VIRTIO 1.3 section 2.7) and packed (2.8), usable without the rest of the
//! built-in guest.
//!
//! [`RawRing`] gives bare access to every field and checks nothing: for hostile tests. [`SplitDriver`] is a
//! well-behaved driver on top of it that remembers every head it posted, so that a device which uses one twice,
//! invents one, or claims an impossible length is found out ([`Violation`]). [`RawPackedRing`] and [`PackedDriver`] are
//! the same for packed virtqueues; [`QueueDriver`] is either.
//!
//! ```
//! use std::sync::Arc;
//! use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
//! use mpassthru_testing::memory::{GuestMemory, GuestPhysAddr, RegionConfig};
//!
//! let memory = Arc::new(GuestMemory::new(&[RegionConfig::memfd(0x10_0000, 1 << 20)])?);
//! let layout = RingLayout::contiguous(GuestPhysAddr(0x10_0000), 256);
//! let mut driver = SplitDriver::new(&memory, layout, true)?;
//! let head = driver.add(&[Segment::writable(GuestPhysAddr(0x18_0000), 2048)]).expect("an empty ring has room");
//! let kick_wanted = driver.publish();
//! assert!(kick_wanted && driver.pop_used().is_none());
//! # let _ = head;
//! # Ok::<(), mpassthru_testing::Error>(())
//! ```

mod packed;
mod queue;
mod raw;
mod raw_packed;
mod split;

pub use packed::PackedDriver;
pub use queue::QueueDriver;
pub use raw::{Descriptor, RawRing, RingLayout, UsedEntry, flags};
pub use raw_packed::{PackedDescriptor, RawPackedRing, packed_flags};
pub use split::{IndirectTables, RingFull, Segment, Settlement, SplitDriver, Used, Violation};
