//! What is in the kernel's hands, by the address that it will name when it gives it back.
//!
//! Fill entries may come back in any order (the kernel reuses those of dropped frames first), completions too, so the
//! address is the key. The guest may post one buffer twice: equal keys are allowed, and come out one each.

use crate::guest_memory::UmemAddr;

const NONE: u16 = u16::MAX;

#[derive(Debug, Clone, Copy)]
struct Slot<V> {
    key: u64,
    next: u16,
    value: V,
}

/// A multimap of fixed capacity: chained hashing, nothing allocated after `new`.
#[derive(Debug)]
pub(super) struct InFlight<V: Copy + Default> {
    buckets: Box<[u16]>,
    slots: Box<[Slot<V>]>,
    free: u16,
    len: usize,
}

impl<V: Copy + Default> InFlight<V> {
    /// Room for `capacity` entries, fewer than 65535.
    pub fn with_capacity(capacity: usize) -> Self {
        assert!(capacity < usize::from(NONE), "slot numbers are 16 bits");
        let mut table = Self {
            buckets: vec![NONE; (2 * capacity).next_power_of_two()].into_boxed_slice(),
            slots: vec![Slot { key: 0, next: NONE, value: V::default() }; capacity].into_boxed_slice(),
            free: NONE,
            len: 0,
        };
        table.clear();
        table
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_full(&self) -> bool {
        self.free == NONE
    }

    #[inline]
    fn bucket(&self, key: u64) -> usize {
        // Fibonacci hashing; buffers are often a power of two apart.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        hash as usize & (self.buckets.len() - 1)
    }

    /// Adds an entry; the table is not full.
    #[inline]
    pub fn insert(&mut self, key: UmemAddr, value: V) {
        assert!(!self.is_full(), "room was checked before a buffer was given away");
        let bucket = self.bucket(key.0);
        let slot = self.free;
        self.free = self.slots[usize::from(slot)].next;
        self.slots[usize::from(slot)] = Slot { key: key.0, next: self.buckets[bucket], value };
        self.buckets[bucket] = slot;
        self.len += 1;
    }

    /// Takes one entry out.
    #[inline]
    pub fn remove(&mut self, key: UmemAddr) -> Option<V> {
        let bucket = self.bucket(key.0);
        let mut previous = NONE;
        let mut slot = self.buckets[bucket];
        while slot != NONE {
            let entry = self.slots[usize::from(slot)];
            if entry.key == key.0 {
                match previous {
                    NONE => self.buckets[bucket] = entry.next,
                    _ => self.slots[usize::from(previous)].next = entry.next,
                }
                self.slots[usize::from(slot)].next = self.free;
                self.free = slot;
                self.len -= 1;
                return Some(entry.value);
            }
            previous = slot;
            slot = entry.next;
        }
        None
    }

    /// One of the entries of a key.
    #[inline]
    pub fn get(&self, key: UmemAddr) -> Option<V> {
        let mut slot = self.buckets[self.bucket(key.0)];
        while slot != NONE {
            let entry = &self.slots[usize::from(slot)];
            if entry.key == key.0 {
                return Some(entry.value);
            }
            slot = entry.next;
        }
        None
    }

    /// All values, in no particular order.
    pub fn values(&self) -> impl Iterator<Item = V> + '_ {
        self.entries().map(|(_, value)| value)
    }

    /// All keys with their values, in no particular order.
    pub fn entries(&self) -> impl Iterator<Item = (UmemAddr, V)> + '_ {
        self.buckets.iter().flat_map(move |&first| {
            std::iter::successors((first != NONE).then_some(first), move |&slot| {
                let next = self.slots[usize::from(slot)].next;
                (next != NONE).then_some(next)
            })
            .map(move |slot| &self.slots[usize::from(slot)])
            .map(|slot| (UmemAddr(slot.key), slot.value))
        })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.fill(NONE);
        let count = self.slots.len();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            slot.next = if i + 1 < count { (i + 1) as u16 } else { NONE };
        }
        self.free = if count == 0 { NONE } else { 0 };
        self.len = 0;
    }
}

#[cfg(test)]
mod tests;
