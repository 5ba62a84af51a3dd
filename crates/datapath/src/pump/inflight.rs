//! What is in the kernel's hands, by the address that it will name when it gives it back.
//!
//! Fill entries may come back in any order (the kernel reuses those of dropped frames first), completions too, so the
//! address is the key. The guest may post one buffer twice: equal keys are allowed, and come out one each.

use crate::guest_memory::UmemAddr;

const NONE: u16 = u16::MAX;
/// Buckets for each slot.
const SPREAD: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Slot<V> {
    key: u64,
    value: V,
    next: u16,
}

/// A multimap with room for `SLOTS` entries: chained hashing, nothing allocated after `new`.
///
/// Sizes are powers of two that the compiler knows, so that a mask keeps an index inside.
#[derive(Debug)]
pub(super) struct InFlight<V: Copy + Default, const SLOTS: usize> {
    buckets: Box<[[u16; SPREAD]; SLOTS]>,
    slots: Box<[Slot<V>; SLOTS]>,
    free: u16,
    len: usize,
}

impl<V: Copy + Default, const SLOTS: usize> InFlight<V, SLOTS> {
    const SIZED: () = assert!(SLOTS.is_power_of_two() && SLOTS < NONE as usize, "slot numbers are 16 bits");

    pub fn new() -> Self {
        let () = Self::SIZED;
        let slot = Slot { key: 0, value: V::default(), next: NONE };
        let mut table =
            Self { buckets: Box::new([[NONE; SPREAD]; SLOTS]), slots: Box::new([slot; SLOTS]), free: NONE, len: 0 };
        table.clear();
        table
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_full(&self) -> bool {
        self.free == NONE
    }

    /// The bucket of a key, as an index of `buckets` and one inside.
    #[inline]
    fn bucket(key: u64) -> (usize, usize) {
        // Fibonacci hashing; buffers are often a power of two apart.
        let hash = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
        (hash / SPREAD % SLOTS, hash % SPREAD)
    }

    #[inline]
    fn slot(&self, number: u16) -> &Slot<V> {
        &self.slots[usize::from(number) % SLOTS]
    }

    #[inline]
    fn slot_mut(&mut self, number: u16) -> &mut Slot<V> {
        &mut self.slots[usize::from(number) % SLOTS]
    }

    /// Adds an entry; the table is not full.
    #[inline]
    pub fn insert(&mut self, key: UmemAddr, value: V) {
        assert!(!self.is_full(), "room was checked before a buffer was given away");
        let (row, column) = Self::bucket(key.0);
        let number = self.free;
        let next = std::mem::replace(&mut self.buckets[row][column], number);
        let slot = self.slot_mut(number);
        let free = slot.next;
        *slot = Slot { key: key.0, value, next };
        self.free = free;
        self.len += 1;
    }

    /// Takes one entry out.
    #[inline]
    pub fn remove(&mut self, key: UmemAddr) -> Option<V> {
        let (row, column) = Self::bucket(key.0);
        let first = self.buckets[row][column];
        let (mut previous, mut number) = (NONE, first);
        while number != NONE {
            let &Slot { key: found, value, next } = self.slot(number);
            if found == key.0 {
                match previous {
                    NONE => self.buckets[row][column] = next,
                    _ => self.slot_mut(previous).next = next,
                }
                self.slot_mut(number).next = self.free;
                self.free = number;
                self.len -= 1;
                return Some(value);
            }
            (previous, number) = (number, next);
        }
        None
    }

    /// One of the entries of a key.
    #[inline]
    pub fn get(&self, key: UmemAddr) -> Option<V> {
        let (row, column) = Self::bucket(key.0);
        let mut number = self.buckets[row][column];
        while number != NONE {
            let slot = self.slot(number);
            if slot.key == key.0 {
                return Some(slot.value);
            }
            number = slot.next;
        }
        None
    }

    /// All values, in no particular order.
    pub fn values(&self) -> impl Iterator<Item = V> + '_ {
        self.entries().map(|(_, value)| value)
    }

    /// All keys with their values, in no particular order.
    pub fn entries(&self) -> impl Iterator<Item = (UmemAddr, V)> + '_ {
        self.buckets.as_flattened().iter().flat_map(move |&first| {
            std::iter::successors((first != NONE).then_some(first), move |&number| {
                let next = self.slot(number).next;
                (next != NONE).then_some(next)
            })
            .map(move |number| self.slot(number))
            .map(|slot| (UmemAddr(slot.key), slot.value))
        })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.as_flattened_mut().fill(NONE);
        for (slot, next) in self.slots.iter_mut().zip(1u16..) {
            slot.next = if usize::from(next) < SLOTS { next } else { NONE };
        }
        self.free = 0;
        self.len = 0;
    }
}

#[cfg(test)]
mod tests;
