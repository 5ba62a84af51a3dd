//! Entries of rings and tables: their place is checked when they are found, and no more at each access.

use std::ptr::NonNull;
use std::sync::Arc;

use super::{Arena, GuestMemory, UmemAddr};

/// A power of two of values in guest memory, one behind the other. They stay mapped as long as this lives.
#[derive(Debug)]
pub(crate) struct Entries<T> {
    start: NonNull<T>,
    /// Number of values, less 1.
    mask: u16,
    _arena: Arc<Arena>,
}

// SAFETY: a place in a mapping without thread affinity; the values are accessed as all guest memory is.
unsafe impl<T> Send for Entries<T> {}

impl<T: Copy> Entries<T> {
    /// Finds `count` values, whose place the caller has translated.
    pub fn new(memory: &GuestMemory, at: UmemAddr, count: u16) -> Self {
        assert!(count.is_power_of_two(), "indices are taken modulo the number of values by a mask");
        let end = at.0.checked_add(u64::from(count) * size_of::<T>() as u64);
        assert!(end.is_some_and(|end| end <= memory.len_bytes()), "entries lie inside the UMEM");
        // SAFETY: an offset inside the mapping (checked above).
        let start = unsafe { memory.base.add(at.0 as usize) }.cast::<T>();
        assert!(start.is_aligned(), "entries are aligned");
        Self { start, mask: count - 1, _arena: Arc::clone(&memory.arena) }
    }

    #[inline]
    fn at(&self, index: u16) -> NonNull<T> {
        // SAFETY: masked to the number of values, which lie in the mapping that the arena keeps.
        unsafe { self.start.add(usize::from(index & self.mask)) }
    }

    /// Reads the value at `index`, modulo their number, once: the guest may change it at any time.
    #[inline]
    pub fn read(&self, index: u16) -> T {
        // SAFETY: inside the mapping and aligned (checked by `new`).
        unsafe { self.at(index).read_volatile() }
    }

    /// Writes the value at `index`, modulo their number.
    #[inline]
    pub fn write(&self, index: u16, value: T) {
        // SAFETY: as read().
        unsafe { self.at(index).write_volatile(value) };
    }
}
