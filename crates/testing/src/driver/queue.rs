//! The driver side of a virtqueue of either layout.

use std::sync::Arc;

use super::packed::PackedDriver;
use super::raw::RingLayout;
use super::split::{IndirectTables, RingFull, Segment, Settlement, SplitDriver, Used, Violation};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;

/// The driver side of a virtqueue. Heads of a packed one are buffer ids.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there are few of them, and none is moved
pub enum QueueDriver {
    /// VIRTIO 1.3 section 2.7.
    Split(SplitDriver),
    /// VIRTIO 1.3 section 2.8.
    Packed(PackedDriver),
}

macro_rules! each {
    ($driver:expr, $of:ident => $call:expr) => {
        match $driver {
            QueueDriver::Split($of) => $call,
            QueueDriver::Packed($of) => $call,
        }
    };
}

impl QueueDriver {
    /// Clears the ring and starts at its beginning.
    ///
    /// # Errors
    /// [`Error::Config`] if the ring has no possible size, or a part is misaligned or outside guest memory.
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout, event_idx: bool, packed: bool) -> Result<Self> {
        if packed {
            PackedDriver::new(memory, layout, event_idx).map(Self::Packed)
        } else {
            SplitDriver::new(memory, layout, event_idx).map(Self::Split)
        }
    }

    /// As [`SplitDriver::use_indirect_tables`].
    ///
    /// # Errors
    /// [`Error::Config`] if the tables are misaligned or outside guest memory.
    pub fn use_indirect_tables(&mut self, tables: IndirectTables) -> Result<()> {
        each!(self, driver => driver.use_indirect_tables(tables))
    }

    /// Where the ring lies.
    #[must_use]
    pub fn layout(&self) -> &RingLayout {
        each!(self, driver => driver.ring().layout())
    }

    /// Descriptors that no chain uses.
    #[must_use]
    pub fn free_descriptors(&self) -> u16 {
        each!(self, driver => driver.free_descriptors())
    }

    /// Heads that the device owes.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        each!(self, driver => driver.outstanding())
    }

    /// The ring base at which a device goes on that has used all up to the last head popped and has nothing in flight.
    #[must_use]
    pub fn used_base(&self) -> u32 {
        match self {
            Self::Split(driver) => u32::from(driver.next_used()),
            Self::Packed(driver) => driver.used_base(),
        }
    }

    /// As [`SplitDriver::add`].
    ///
    /// # Errors
    /// [`RingFull`] if there are fewer free descriptors than segments; nothing was changed.
    pub fn add(&mut self, segments: &[Segment]) -> std::result::Result<u16, RingFull> {
        each!(self, driver => driver.add(segments))
    }

    /// As [`SplitDriver::add_indirect`].
    ///
    /// # Errors
    /// [`RingFull`] if no descriptor is free, or the table has fewer entries than there are segments.
    ///
    /// # Panics
    /// If [`use_indirect_tables`](Self::use_indirect_tables) was not called.
    pub fn add_indirect(&mut self, segments: &[Segment]) -> std::result::Result<u16, RingFull> {
        each!(self, driver => driver.add_indirect(segments))
    }

    /// Posts a returned head again, its chain as it was.
    pub fn repost(&mut self, head: u16) {
        each!(self, driver => driver.repost(head));
    }

    /// Frees a returned head's descriptors.
    pub fn release(&mut self, head: u16) {
        each!(self, driver => driver.release(head));
    }

    /// Publishes what was added. Returns whether the device wants a kick for it.
    pub fn publish(&mut self) -> bool {
        each!(self, driver => driver.publish())
    }

    /// Takes the next used head; `None` if there is none, or after the device broke the ring.
    pub fn pop_used(&mut self) -> Option<std::result::Result<Used, Violation>> {
        each!(self, driver => driver.pop_used())
    }

    /// Asks to be notified once so many more heads are used. Returns `false` if they are already.
    pub fn enable_notifications(&mut self, heads: u16) -> bool {
        each!(self, driver => driver.enable_notifications(heads))
    }

    /// Asks for no notifications. Cheap to call once per burst.
    pub fn disable_notifications(&mut self) {
        each!(self, driver => driver.disable_notifications());
    }

    /// Compares what the device still owes with what it gave back by stopping at ring base `base`.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot have stopped there.
    pub fn settle(&self, base: u32) -> Result<Settlement> {
        match self {
            Self::Split(driver) => {
                let base = u16::try_from(base);
                driver.settle(base.map_err(|_| Error::config("the base of a split virtqueue has 16 bits"))?)
            }
            Self::Packed(driver) => driver.settle(base),
        }
    }
}
