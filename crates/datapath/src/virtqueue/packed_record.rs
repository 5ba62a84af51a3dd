//! Which chains of a packed virtqueue are in flight, and what their descriptors were: used descriptors of others may
//! have been written over them.
//!
//! ```text
//! 0          8         10         12          14              16         18             20          21              32
//! | features | version | desc_num | free_head | old_free_head | used_idx | old_used_idx | used_wrap | old_used_wrap | -
//!
//! entries of 32 bytes:  | inflight | - | next | last | num | counter | id | flags | len | addr |
//!                         0              2      4      6     8         16   18      20    24
//! ```
//!
//! The layout and the order of stores are vhost-user.rst, "Inflight I/O tracking", packed virtqueue. An entry holds one
//! descriptor; those of a chain are linked by `next`, and so are the free ones. The fields without `old_` are ahead of the
//! ring while a batch is being shown: if the ring does not have it, the others count.

use std::sync::atomic::Ordering;

use super::descriptor::PackedDescriptor;
use super::inflight_record::in_program_order;
use super::packed::Cursor;
use crate::guest_memory::SharedFile;

const VERSION: u64 = 8;
const DESC_NUM: u64 = 10;
const FREE_HEAD: u64 = 12;
const OLD_FREE_HEAD: u64 = 14;
/// used_idx, old_used_idx, used_wrap and old_used_wrap, stored at once: no end of ours leaves one with another's wrap.
const USED: u64 = 16;
const HEADER_BYTES: u64 = 32;

const ENTRY_BYTES: u64 = 32;
const INFLIGHT: u64 = 0;
const NEXT: u64 = 2;
const LAST: u64 = 4;
const NUM: u64 = 6;
const COUNTER: u64 = 8;
const ID: u64 = 16;
const FLAGS: u64 = 18;
const LEN: u64 = 20;
const ADDR: u64 = 24;

/// The only version there is; 0 is a record that nobody has begun.
const VERSION_1: u16 = 1;

/// Bytes in front, and for each descriptor.
pub(super) const SIZES: (u64, u64) = (HEADER_BYTES, ENTRY_BYTES);

/// A chain of descriptors, by its buffer id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chain {
    pub id: u16,
    pub descs: u16,
}

/// What a record says.
#[derive(Debug)]
pub(super) struct Recovered {
    /// Where the next used descriptor is to be.
    pub used: Cursor,
    /// The chains in flight, in the order in which they were taken.
    pub chains: Vec<Chain>,
}

/// A chain that is being written down.
#[derive(Debug, Clone, Copy)]
struct Open {
    head: u16,
    last: u16,
    descs: u16,
}

/// The record of one packed virtqueue. What is needed of it again is kept here as well, for others may write to the file.
#[derive(Debug)]
pub struct PackedRecord {
    file: SharedFile,
    size: u16,
    /// Orders chains by when they were taken.
    next_counter: u64,
    /// The first free entry; `size` if there is none.
    free_head: u16,
    /// The entry behind each one, free or in the same chain.
    next: Box<[u16]>,
    /// The last entry of each chain, by its first.
    last: Box<[u16]>,
    /// The first entry of each chain, by its buffer id.
    head: Box<[u16]>,
    open: Option<Open>,
    /// Where the next used descriptor will be, once what is being shown is.
    used: Cursor,
    /// First entries of the chains used since used descriptors were last shown.
    batch: Vec<u16>,
}

impl PackedRecord {
    pub(super) fn new(file: SharedFile, size: u16) -> Self {
        let links = || vec![0; usize::from(size)].into_boxed_slice();
        let batch = Vec::with_capacity(usize::from(size));
        Self {
            file,
            size,
            next_counter: 0,
            free_head: 0,
            next: links(),
            last: links(),
            head: links(),
            open: None,
            used: Cursor::START,
            batch,
        }
    }

    #[inline]
    fn store_u16(&self, at: u64, value: u16) {
        self.file.u16(at).store(value, Ordering::Relaxed);
    }

    #[inline]
    fn load_u16(&self, at: u64) -> u16 {
        self.file.u16(at).load(Ordering::Relaxed)
    }

    #[inline]
    fn set_inflight(&self, head: u16, inflight: bool) {
        self.file.u8(entry(head) + INFLIGHT).store(u8::from(inflight), Ordering::Relaxed);
    }

    #[inline]
    fn set_free_head(&mut self, free_head: u16) {
        self.free_head = free_head;
        self.store_u16(FREE_HEAD, free_head);
    }

    /// The next descriptor of a chain was read.
    #[inline]
    pub(super) fn add(&mut self, desc: &PackedDescriptor) {
        let at = self.free_head;
        let mut open = self.open.unwrap_or(Open { head: at, last: at, descs: 0 });
        if open.descs == 0 {
            self.file.u64(entry(at) + COUNTER).store(self.next_counter, Ordering::Relaxed);
            self.next_counter += 1;
            in_program_order();
            self.set_inflight(at, true);
        }
        open.last = at;
        open.descs += 1;
        self.open = Some(open);
        self.store_u16(entry(at) + ID, desc.id);
        self.store_u16(entry(at) + FLAGS, desc.element.flags);
        self.file.u32(entry(at) + LEN).store(desc.element.len, Ordering::Relaxed);
        self.file.u64(entry(at) + ADDR).store(desc.element.addr.0, Ordering::Relaxed);
        in_program_order();
        self.set_free_head(self.next[usize::from(at)]);
    }

    /// The chain whose descriptors were added was taken.
    #[inline]
    pub(super) fn taken(&mut self, chain: Chain) {
        let Some(Open { head, last, descs }) = self.open.take() else { return };
        debug_assert_eq!(descs, chain.descs, "every descriptor was added");
        self.head[usize::from(chain.id)] = head;
        self.last[usize::from(head)] = last;
        self.store_u16(entry(head) + NUM, descs);
        self.store_u16(entry(head) + LAST, last);
        in_program_order();
        self.store_u16(OLD_FREE_HEAD, self.free_head);
        in_program_order();
    }

    /// The chain whose descriptors were added is broken.
    #[cold]
    pub(super) fn abandon(&mut self) {
        if let Some(Open { head, .. }) = self.open.take() {
            self.set_inflight(head, false);
            self.set_free_head(head);
        }
    }

    /// The chain taken last is in the ring again.
    #[inline]
    pub(super) fn untaken(&mut self, id: u16) {
        let head = self.head[usize::from(id)];
        self.free(head);
        in_program_order();
        self.set_inflight(head, false);
        in_program_order();
        self.store_u16(OLD_FREE_HEAD, self.free_head);
        in_program_order();
    }

    /// Puts the entries of a chain in front of the free ones.
    #[inline]
    fn free(&mut self, head: u16) {
        let last = self.last[usize::from(head)];
        self.next[usize::from(last)] = self.free_head;
        self.store_u16(entry(last) + NEXT, self.free_head);
        in_program_order();
        self.set_free_head(head);
    }

    /// A chain was used; the driver does not see it yet.
    #[inline]
    pub(super) fn used(&mut self, id: u16) {
        self.batch.push(self.head[usize::from(id)]);
    }

    /// Call it before the flags of the batch are written: where the next used descriptor will be.
    #[inline]
    pub(super) fn before_publish(&mut self, used: Cursor) {
        for position in 0..self.batch.len() {
            self.free(self.batch[position]);
        }
        let old = std::mem::replace(&mut self.used, used);
        self.store_used(used, old);
        in_program_order();
    }

    fn store_used(&self, new: Cursor, old: Cursor) {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&new.index.to_ne_bytes());
        bytes[2..4].copy_from_slice(&old.index.to_ne_bytes());
        [bytes[4], bytes[5]] = [new.wrap, old.wrap].map(u8::from);
        self.file.u64(USED).store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }

    /// The new place, and the old one.
    fn load_used(&self) -> (Cursor, Cursor) {
        let bytes = self.file.u64(USED).load(Ordering::Relaxed).to_ne_bytes();
        let cursor = |idx: usize, wrap: usize| Cursor {
            index: u16::from_ne_bytes([bytes[idx], bytes[idx + 1]]),
            wrap: bytes[wrap] != 0,
        };
        (cursor(0, 4), cursor(2, 5))
    }

    /// The flags were written: the driver sees the batch.
    #[inline]
    pub(super) fn published(&mut self) {
        in_program_order();
        for &head in &self.batch {
            self.set_inflight(head, false);
        }
        self.batch.clear();
        in_program_order();
        self.store_u16(OLD_FREE_HEAD, self.free_head);
        in_program_order();
        self.store_used(self.used, self.used);
        in_program_order();
    }

    /// The descriptors of a chain in flight, as they were when it was taken.
    pub(super) fn descriptors(&self, id: u16) -> impl Iterator<Item = PackedDescriptor> + '_ {
        let head = self.head[usize::from(id)];
        let last = self.last[usize::from(head)];
        std::iter::successors(Some(head), move |&at| (at != last).then(|| self.next[usize::from(at)])).map(|at| {
            let addr = self.file.u64(entry(at) + ADDR).load(Ordering::Relaxed);
            let len = self.file.u32(entry(at) + LEN).load(Ordering::Relaxed);
            PackedDescriptor::new(addr, len, self.load_u16(entry(at) + ID), self.load_u16(entry(at) + FLAGS))
        })
    }

    /// Completes or undoes what the writer of the record was at when it ended; `None` if this is no sound record.
    ///
    /// `slot_flags` reads the flags of a descriptor of the ring.
    pub(super) fn recover(&mut self, slot_flags: impl Fn(u16) -> u16) -> Option<Recovered> {
        if self.load_u16(VERSION) != VERSION_1 || self.load_u16(DESC_NUM) != self.size {
            return None;
        }
        let (new, old) = self.load_used();
        if new.index.max(old.index) >= self.size {
            return None;
        }
        let is_shown = new != old && !old.is_available(slot_flags(old.index));
        let (used, free_head) = if is_shown { (new, FREE_HEAD) } else { (old, OLD_FREE_HEAD) };
        self.clear_free_entries(self.load_u16(free_head));
        let chains = self.chains_in_flight()?;
        self.used = used;
        self.published();
        Some(Recovered { used, chains })
    }

    /// Whatever is free is not in flight.
    fn clear_free_entries(&self, mut at: u16) {
        for _ in 0..self.size {
            if at >= self.size {
                break;
            }
            self.set_inflight(at, false);
            at = self.load_u16(entry(at) + NEXT);
        }
        in_program_order();
    }

    /// Reads the chains in flight, and makes every other entry a free one. `None` if they are no lists of their own.
    fn chains_in_flight(&mut self) -> Option<Vec<Chain>> {
        let inflight = |at: &u16| self.file.u8(entry(*at) + INFLIGHT).load(Ordering::Relaxed) == 1;
        let counter = |at| self.file.u64(entry(at) + COUNTER).load(Ordering::Relaxed);
        let mut heads: Vec<(u64, u16)> = (0..self.size).filter(inflight).map(|at| (counter(at), at)).collect();
        heads.sort_unstable();
        let mut is_owned = vec![false; usize::from(self.size)];
        let mut chains: Vec<Chain> = Vec::with_capacity(heads.len());
        let mut is_known = vec![false; usize::from(self.size)];
        for &(_, head) in &heads {
            let chain = self.read_chain(head, &mut is_owned)?;
            let known = is_known.get_mut(usize::from(chain.id)).filter(|known| !**known)?;
            *known = true;
            chains.push(chain);
        }
        self.next_counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let mut free_head = self.size;
        for at in (0..self.size).rev().filter(|&at| !is_owned[usize::from(at)]) {
            self.next[usize::from(at)] = free_head;
            self.store_u16(entry(at) + NEXT, free_head);
            free_head = at;
        }
        in_program_order();
        self.set_free_head(free_head);
        Some(chains)
    }

    fn read_chain(&mut self, head: u16, is_owned: &mut [bool]) -> Option<Chain> {
        let (descs, last) = (self.load_u16(entry(head) + NUM), self.load_u16(entry(head) + LAST));
        let mut at = head;
        for left in (0..descs).rev() {
            let owned = is_owned.get_mut(usize::from(at)).filter(|owned| !**owned)?;
            *owned = true;
            if left > 0 {
                let next = self.load_u16(entry(at) + NEXT);
                self.next[usize::from(at)] = next;
                at = next;
            }
        }
        if descs == 0 || at != last {
            return None;
        }
        let id = self.load_u16(entry(last) + ID);
        *self.head.get_mut(usize::from(id))? = head;
        self.last[usize::from(head)] = last;
        Some(Chain { id, descs })
    }

    /// Starts the record anew: nothing is in flight, and the next used descriptor will be at `used`.
    pub(super) fn begin(&mut self, used: Cursor) {
        self.invalidate();
        for at in 0..self.size {
            self.next[usize::from(at)] = at + 1;
            self.store_u16(entry(at) + NEXT, at + 1);
            self.set_inflight(at, false);
        }
        self.set_free_head(0);
        self.store_u16(DESC_NUM, self.size);
        self.next_counter = 0;
        self.open = None;
        self.batch.clear();
        self.before_publish(used);
        self.published();
        self.store_u16(VERSION, VERSION_1);
        in_program_order();
    }

    /// Makes the record one that nobody will go by.
    pub(super) fn invalidate(&mut self) {
        self.store_u16(VERSION, 0);
        in_program_order();
    }
}

/// Where an entry is.
#[inline]
fn entry(index: u16) -> u64 {
    HEADER_BYTES + ENTRY_BYTES * u64::from(index)
}
