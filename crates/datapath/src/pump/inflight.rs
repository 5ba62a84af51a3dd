//! What is in the kernel's hands, by the address that it will name when it gives it back.
//!
//! Fill entries may come back in any order (the kernel reuses those of dropped frames first), completions too, so the
//! address is the key. The guest may post one buffer twice: equal keys are allowed, and come out one each.

use crate::guest_memory::UmemAddr;

/// No address: a UMEM is far smaller.
const FREE: u64 = u64::MAX;

#[derive(Debug, Clone, Copy)]
struct Place<V> {
    key: u64,
    value: V,
}

/// A multimap of `PLACES / 4` entries at most: open addressing with linear probing, nothing allocated after `new`.
///
/// Invariant: from the place that an entry's key hashes to, up to its own, no place is free.
///
/// The number of places is a power of two that the compiler knows, so that a mask keeps an index inside. Most entries are
/// in the first place that is looked at, for so few are taken, and buffers are mostly as far apart as their neighbours.
#[derive(Debug)]
pub(super) struct InFlight<V: Copy + Default, const PLACES: usize> {
    places: Box<[Place<V>; PLACES]>,
    len: usize,
}

impl<V: Copy + Default, const PLACES: usize> InFlight<V, PLACES> {
    const CAPACITY: usize = PLACES / 4;
    const BITS: u32 = {
        assert!(PLACES.is_power_of_two() && Self::CAPACITY > 0, "an index is the top bits of a hash");
        PLACES.ilog2()
    };

    pub fn new() -> Self {
        Self { places: Box::new([Place { key: FREE, value: V::default() }; PLACES]), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of entries that can be added.
    #[cfg(test)]
    pub fn room(&self) -> usize {
        Self::CAPACITY - self.len
    }

    /// Where to look for a key first.
    #[inline]
    fn home(key: u64) -> usize {
        // Fibonacci hashing: the top bits depend on all of the key.
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - Self::BITS)) as usize
    }

    /// Where a key is, or the free place that ends the search for it.
    #[inline]
    fn find(&self, key: u64) -> usize {
        let mut index = Self::home(key);
        while ![key, FREE].contains(&self.places[index].key) {
            index = (index + 1) % PLACES;
        }
        index
    }

    /// Adds an entry; there is room.
    #[inline]
    pub fn insert(&mut self, key: UmemAddr, value: V) {
        assert!(self.len < Self::CAPACITY, "room was checked before a buffer was given away");
        let mut index = Self::home(key.0);
        while self.places[index].key != FREE {
            index = (index + 1) % PLACES;
        }
        self.places[index] = Place { key: key.0, value };
        self.len += 1;
    }

    /// Adds an entry where no other is looked for first: none of this key is there then. Returns false, having done nothing,
    /// if that place is taken or there is no room.
    #[inline]
    pub fn insert_alone(&mut self, key: UmemAddr, value: V) -> bool {
        let place = &mut self.places[Self::home(key.0)];
        if place.key != FREE || self.len >= Self::CAPACITY {
            return false;
        }
        *place = Place { key: key.0, value };
        self.len += 1;
        true
    }

    /// Takes one entry out.
    #[inline]
    pub fn remove(&mut self, key: UmemAddr) -> Option<V> {
        let index = self.find(key.0);
        let Place { key: found, value } = self.places[index];
        if found == FREE {
            return None;
        }
        self.len -= 1;
        self.places[index].key = FREE;
        if self.places[(index + 1) % PLACES].key != FREE {
            self.close_gap(index);
        }
        Some(value)
    }

    /// Moves entries behind a freed place up to it, where it cuts them off from their homes.
    fn close_gap(&mut self, mut gap: usize) {
        let distance = |from: usize, to: usize| to.wrapping_sub(from) % PLACES;
        let mut index = (gap + 1) % PLACES;
        while self.places[index].key != FREE {
            if distance(Self::home(self.places[index].key), index) >= distance(gap, index) {
                self.places[gap] = self.places[index];
                self.places[index].key = FREE;
                gap = index;
            }
            index = (index + 1) % PLACES;
        }
    }

    /// One of the entries of a key.
    #[inline]
    pub fn get(&self, key: UmemAddr) -> Option<V> {
        let Place { key: found, value } = self.places[self.find(key.0)];
        (found != FREE).then_some(value)
    }

    /// All values, in no particular order.
    pub fn values(&self) -> impl Iterator<Item = V> + '_ {
        self.entries().map(|(_, value)| value)
    }

    /// All keys with their values, in no particular order.
    pub fn entries(&self) -> impl Iterator<Item = (UmemAddr, V)> + '_ {
        self.places.iter().filter(|place| place.key != FREE).map(|place| (UmemAddr(place.key), place.value))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.places.iter_mut().for_each(|place| place.key = FREE);
        self.len = 0;
    }
}

#[cfg(test)]
mod tests;
