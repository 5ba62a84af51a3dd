//! What a virtqueue owes its driver, kept apart from the code under test: chains are walked a second time here.

use super::world::World;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const CHAIN_DESCS_MAX: usize = 1024;

/// Where the rings of a queue are: offsets in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Ring {
    pub size: u64,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
}

/// A head that the device has taken.
#[derive(Debug)]
pub struct Taken {
    pub position: u64,
    pub head: u16,
    pub capacity_bytes: u64,
    /// `(offset, length)` in guest memory.
    pub segments: Vec<(u64, u64)>,
}

/// One virtqueue.
#[derive(Debug, Default)]
pub struct Side {
    /// While it runs.
    pub ring: Option<Ring>,
    /// Taken, not used.
    pub taken: Vec<Taken>,
    /// Where the device stands in the avail ring.
    pub position: u64,
    pub used_idx: u16,
    pub faulted: bool,
    /// Where the next start goes on.
    pub base: u16,
    /// Where the driver puts its next descriptor.
    pub next_desc: u16,
}

impl Ring {
    pub fn avail_idx(&self) -> u64 {
        self.avail + 2
    }

    pub fn avail_entry(&self, index: u16) -> u64 {
        self.avail + 4 + 2 * (u64::from(index) % self.size)
    }

    pub fn used_event(&self) -> u64 {
        self.avail + 4 + 2 * self.size
    }

    pub fn used_idx(&self) -> u64 {
        self.used + 2
    }

    fn used_entry(&self, index: u16) -> u64 {
        self.used + 4 + 8 * (u64::from(index) % self.size)
    }

    /// Whether the device may write here without a buffer being posted.
    pub fn may_write(&self, offset: u64) -> bool {
        (self.used..self.used + 6 + 8 * self.size).contains(&offset)
    }

    /// Whether the driver wants a call for the used entries from `old` up to `new`.
    pub fn wants_call(&self, world: &World, old: u16, new: u16) -> bool {
        if old == new {
            return false;
        }
        if !self.event_idx {
            return world.read_u16(self.avail) & 1 == 0;
        }
        let event = world.read_u16(self.used_event());
        (0..new.wrapping_sub(old)).any(|i| old.wrapping_add(i) == event)
    }

    /// The segments of a chain; `None` if it is broken (VIRTIO 1.3 §2.7.5).
    pub fn chain(&self, world: &World, head: u16, writable: bool) -> Option<Vec<(u64, u64)>> {
        let mut segments = Vec::new();
        let (mut table, mut entries, mut index, mut indirect) = (self.desc, self.size, u64::from(head), false);
        for _ in 0..CHAIN_DESCS_MAX {
            if index >= entries {
                return None;
            }
            let bytes: [u8; 16] = world.read(table + 16 * index);
            let address = u64::from_le_bytes(bytes[..8].try_into().ok()?);
            let len = u64::from(u32::from_le_bytes(bytes[8..12].try_into().ok()?));
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            if flags & DESC_F_INDIRECT != 0 {
                entries = len / 16;
                let fits = len % 16 == 0 && entries > 0 && entries <= self.size;
                let place = world.plan.locate(address, len).filter(|&(_, inside)| inside == len);
                table = place.filter(|_| fits && !indirect && flags & DESC_F_NEXT == 0)?.0;
                (index, indirect) = (0, true);
                continue;
            }
            if (flags & DESC_F_WRITE != 0) != writable {
                return None;
            }
            let (mut at, mut left) = (address, len);
            while left > 0 {
                let (offset, inside) = world.plan.locate(at, left)?;
                segments.push((offset, inside));
                left -= inside;
                at = at.checked_add(inside)?;
            }
            if segments.len() > CHAIN_DESCS_MAX {
                return None;
            }
            if flags & DESC_F_NEXT == 0 {
                return Some(segments);
            }
            index = u64::from(u16::from_le_bytes([bytes[14], bytes[15]]));
        }
        None
    }

    /// Whether the driver broke the ring where the device stands.
    pub fn is_broken(&self, world: &World, position: u64, writable: bool) -> bool {
        let ahead = world.read_u16(self.avail_idx()).wrapping_sub(position as u16);
        let head = world.read_u16(self.avail_entry(position as u16));
        u64::from(ahead) > self.size || u64::from(head) >= self.size || self.chain(world, head, writable).is_none()
    }
}

impl Side {
    /// Writes down the heads taken up to `position`. Returns whether the model can still tell them apart.
    pub fn take(&mut self, world: &World, ring: &Ring, position: u64, writable: bool) -> bool {
        let mut exact = true;
        for position in self.position..position {
            let head = world.read_u16(ring.avail_entry(position as u16));
            assert!(u64::from(head) < ring.size, "took head {head}, which is no descriptor");
            let segments = ring.chain(world, head, writable);
            let segments = segments.unwrap_or_else(|| panic!("took head {head}, whose chain is broken"));
            exact &= self.taken.iter().all(|taken| taken.head != head);
            exact &= !writable || segments.iter().all(|&(start, _)| start >= world.plan.buffers_at());
            let capacity_bytes = segments.iter().map(|&(_, len)| len).sum();
            self.taken.push(Taken { position, head, capacity_bytes, segments });
        }
        if position < self.position {
            self.give_back(position);
        }
        self.position = position;
        exact
    }

    /// The ring was rewound to `position`: all from there on were taken and not used.
    fn give_back(&mut self, position: u64) {
        let mut back: Vec<u64> = self.taken.iter().map(|taken| taken.position).filter(|&at| at >= position).collect();
        back.sort_unstable();
        assert!(back.iter().copied().eq(position..self.position), "gives {back:?} back by rewinding to {position}");
        self.taken.retain(|taken| taken.position < position);
    }

    /// Whether a byte lies in a buffer that the device has.
    pub fn holds(&self, offset: u64) -> bool {
        let inside = |&(start, len): &(u64, u64)| offset >= start && offset - start < len;
        self.taken.iter().any(|taken| taken.segments.iter().any(inside))
    }

    /// Takes the new used entries in: each names a head that the device has, and no more bytes than it holds.
    pub fn use_heads(&mut self, world: &World, ring: &Ring) {
        let now = world.read_u16(ring.used_idx());
        assert!(
            u64::from(now.wrapping_sub(self.used_idx)) <= ring.size,
            "used index ran from {} to {now}",
            self.used_idx
        );
        while self.used_idx != now {
            let entry: [u8; 8] = world.read(ring.used_entry(self.used_idx));
            let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let is_it = |taken: &Taken| u32::from(taken.head) == id && u64::from(len) <= taken.capacity_bytes;
            let found = self.taken.iter().position(is_it);
            let found =
                found.unwrap_or_else(|| panic!("head {id} used with {len} bytes; the device does not have it so"));
            self.taken.swap_remove(found);
            self.used_idx = self.used_idx.wrapping_add(1);
        }
    }

    /// The queue is stopped: what is not used was taken last, and `base` gives it back.
    pub fn settle(&mut self, base: u16) {
        let mut left: Vec<u64> = self.taken.drain(..).map(|taken| taken.position).collect();
        left.sort_unstable();
        let expected = self.position - left.len() as u64;
        assert_eq!(base, expected as u16, "the base gives {} heads back", left.len());
        assert!(left.iter().copied().eq(expected..self.position), "given back {left:?} of {}", self.position);
    }
}
