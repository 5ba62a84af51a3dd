//! Guest memory as one range of addresses, so that one UMEM covers it all.
//!
//! ```text
//!   [ front slab ][ region 0 ][ region 1 ] ... [ tail slab ]   (reserved for more regions)
//!   ^ UmemAddr(0)                              ^ end
//! ```
//!
//! The slabs are ours: bounce frames, and room for chunks that start in front of the first guest buffer or end
//! behind the last. Regions lie back to back, those with the biggest pages first, so that every mapping is aligned
//! without a hole: the kernel takes no UMEM with holes (`net/xdp/xdp_umem.c`).
//!
//! A `GuestMemory` does not change. Regions that are added while virtqueues run make a new one on the same [`Arena`],
//! in which every address of before means what it did; a UMEM that was registered before covers it up to its own
//! `end` (docs/decisions/0010). The tail slab moves: the kernel keeps the pages that it has pinned, and nothing is ever
//! written there.
//!
//! Invariant: there is no Rust reference into guest memory, for the guest changes it at any time. Everything goes
//! through the volatile, atomic and memcpy accessors of this module, on addresses that [`GuestMemory::translate`]
//! has checked.

mod address;
mod arena;
mod dirty_log;
mod entries;
mod mapping;
mod region;
mod shared_file;
mod sum;
#[cfg(test)]
mod tests;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

pub use address::{GuestPhysAddr, UmemAddr, UserAddr};
pub use dirty_log::DirtyLog;
pub(crate) use entries::Entries;
pub use region::{Region, RegionSpec};
pub use shared_file::{FileSpec, SharedFile};
pub(crate) use sum::add as add_words;

use crate::error::Error;
use arena::{Arena, address};
use region::Extent;

/// Base page size; also the UMEM chunk size.
pub const PAGE_BYTES: u64 = 4096;
/// Room behind the last region, so that `address + chunk <= size` holds for its last buffer.
const TAIL_SLAB_BYTES: u64 = 2 * PAGE_BYTES;
/// A kvcalloc of the kernel caps the number of chunks of a pool (kernel-facts, section 2: `mm/slub.c`).
const UMEM_CHUNKS_MAX: u64 = 16_777_215;

/// A piece of guest memory that is contiguous in the UMEM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub addr: UmemAddr,
    /// Its length in bytes.
    pub len: u32,
}

impl Segment {
    /// Cuts up to `len` bytes off its front.
    #[inline]
    pub fn take(&mut self, len: u32) -> Self {
        let taken = Self { addr: self.addr, len: len.min(self.len) };
        self.addr = self.addr.plus(u64::from(taken.len));
        self.len -= taken.len;
        taken
    }
}

/// The mapped memory of one guest, and our slabs around it. Unmapped when the last one on its arena is dropped.
#[derive(Debug)]
pub struct GuestMemory {
    /// Keeps the range mapped; `base` lies inside it.
    arena: Arc<Arena>,
    /// Host address of `UmemAddr(0)`.
    base: NonNull<u8>,
    slab_bytes: u64,
    /// Where the regions end and the tail slab begins.
    end: UmemAddr,
    /// Sorted by guest-physical address, without overlap.
    regions: Box<[Region]>,
}

// SAFETY: the mapping is plain memory without thread affinity; shared access goes through volatile, atomic or memcpy
// accessors, and what each thread may touch is decided by the virtqueue protocol.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps the regions back to back behind a front slab of `slab_bytes` (a multiple of the page size).
    ///
    /// # Errors
    /// [`Error::Refused`] if regions overlap, wrap around or make a UMEM larger than the kernel takes; [`Error::Host`] if a file
    /// cannot be mapped.
    pub fn map(specs: &[RegionSpec], slab_bytes: u64) -> Result<Self, Error> {
        Self::map_with_room(specs, slab_bytes, UMEM_CHUNKS_MAX * PAGE_BYTES)
    }

    /// As [`map`](Self::map), with addresses to grow to `most_bytes`, or to less if there are fewer.
    fn map_with_room(specs: &[RegionSpec], slab_bytes: u64, most_bytes: u64) -> Result<Self, Error> {
        assert!(slab_bytes.is_multiple_of(PAGE_BYTES), "slabs are whole pages");
        check_overlap(specs.iter().map(range))?;
        let extents = extents(specs)?;
        check_size(slab_bytes, &extents)?;
        let align = extents.first().map_or(PAGE_BYTES, |e| e.page_bytes);

        // The first region starts at a multiple of its page size; the slab ends there.
        let least_bytes = slab_bytes + total_bytes(&extents) + TAIL_SLAB_BYTES;
        let arena = Arena::reserve(least_bytes + align, most_bytes.max(least_bytes) + align)?;
        let base = (arena.start() + slab_bytes).next_multiple_of(align) - slab_bytes;
        let base = NonNull::new(base as *mut u8).ok_or_else(|| Error::Refused("mapped at address zero".into()))?;
        arena.map_slab(address(base, UmemAddr(0)), slab_bytes)?;
        let none =
            Self { arena: Arc::new(arena), base, slab_bytes, end: UmemAddr(slab_bytes), regions: Box::default() };
        none.extended(&extents)
    }

    /// The same memory with more regions behind those there are, at addresses that nothing used before. `None` if their
    /// pages cannot be aligned there without a hole, or if there is no room for so many: then everything has to be mapped
    /// anew.
    /// Only the newest memory of an arena can be extended.
    ///
    /// # Errors
    /// As [`map`](Self::map); then nothing has changed.
    pub fn with_regions(&self, specs: &[RegionSpec]) -> Result<Option<Self>, Error> {
        check_overlap(specs.iter().map(range).chain(self.regions.iter().map(|r| (r.guest_phys, r.size_bytes))))?;
        let extents = extents(specs)?;
        let is_aligned = |extent: &Extent| self.offset_in_page(self.end, extent.page_bytes) == 0;
        let is_small_enough = check_size(self.end.0, &extents).is_ok()
            && self.arena.has_room(self.base, self.end.plus(total_bytes(&extents)));
        if !extents.first().is_none_or(is_aligned) || !is_small_enough {
            return Ok(None);
        }
        self.extended(&extents).map(Some)
    }

    /// Maps extents behind the regions there are, those with the biggest pages first; the first one is aligned there.
    fn extended(&self, extents: &[Extent]) -> Result<Self, Error> {
        let end = self.end.plus(total_bytes(extents));
        self.arena.grow(self.base, self.end, end, || {
            let mut at = self.end;
            for extent in extents {
                self.arena.map_extent(address(self.base, at), extent)?;
                at = at.plus(extent.len_bytes);
            }
            Ok(())
        })?;
        let mut at = self.end;
        let mut regions = self.regions.to_vec();
        for extent in extents {
            regions.push(extent.mapped_at(at));
            at = at.plus(extent.len_bytes);
        }
        regions.sort_by_key(|r| r.guest_phys);
        let (arena, regions) = (Arc::clone(&self.arena), regions.into_boxed_slice());
        Ok(Self { arena, base: self.base, slab_bytes: self.slab_bytes, end, regions })
    }
    /// Length of the UMEM in bytes: slabs and all regions.
    pub fn len_bytes(&self) -> u64 {
        self.end.0 + TAIL_SLAB_BYTES
    }

    /// Where the regions end: a UMEM that is registered now holds all guest memory below this.
    pub fn end(&self) -> UmemAddr {
        self.end
    }

    /// Whether anybody else holds this memory, or another one on the same arena.
    pub fn is_shared(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1 || Arc::strong_count(&self.arena) > 1
    }

    /// Whether addresses mean the same in both.
    pub fn is_same_arena(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.arena, &other.arena)
    }

    /// Length of the front slab: `UmemAddr(0)` up to here is ours, never the guest's.
    pub fn slab_bytes(&self) -> u64 {
        self.slab_bytes
    }

    /// The guest's regions, by guest-physical address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Host address of the whole mapping, for XDP_UMEM_REG.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Where a guest-physical range lies in the UMEM: the part of it inside the region where it starts.
    ///
    /// The result is shorter than `len` only if the range leaves its region; the caller asks again for the rest.
    /// `hint` is the region found last; buffers of one queue mostly share one.
    #[inline]
    pub fn translate(&self, addr: GuestPhysAddr, len: u32, hint: &mut usize) -> Option<Segment> {
        let (region, offset) = self.region_of(addr, hint)?;
        let room = region.size_bytes - offset;
        Some(Segment { addr: region.umem.plus(offset), len: u64::from(len).min(room) as u32 })
    }

    /// As [`translate`](Self::translate), if all of the range lies in one region.
    #[inline]
    pub fn translate_whole(&self, addr: GuestPhysAddr, len: u32, hint: &mut usize) -> Option<Segment> {
        let (region, offset) = self.region_of(addr, hint)?;
        (u64::from(len) <= region.size_bytes - offset).then(|| Segment { addr: region.umem.plus(offset), len })
    }

    /// The region that an address lies in, and how far from its start.
    #[inline]
    fn region_of(&self, addr: GuestPhysAddr, hint: &mut usize) -> Option<(&Region, u64)> {
        let region = match self.regions.get(*hint) {
            Some(region) if addr.0.wrapping_sub(region.guest_phys.0) < region.size_bytes => region,
            _ => self.find(addr, hint)?,
        };
        Some((region, addr.0 - region.guest_phys.0))
    }

    #[cold]
    fn find(&self, addr: GuestPhysAddr, hint: &mut usize) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.guest_phys <= addr).checked_sub(1)?;
        let region = &self.regions[index];
        *hint = index;
        (addr.0 - region.guest_phys.0 < region.size_bytes).then_some(region)
    }

    /// Where a range of the front-end's addresses lies in the UMEM; all of it must be in one region.
    pub fn translate_user(&self, addr: UserAddr, len_bytes: u64) -> Option<UmemAddr> {
        self.regions.iter().find_map(|region| {
            let offset = addr.0.checked_sub(region.user.0)?;
            let fits = offset.checked_add(len_bytes)? <= region.size_bytes;
            fits.then(|| region.umem.plus(offset))
        })
    }

    /// The guest's own address of a byte; `None` in our slabs. `hint` as in `translate`.
    pub fn guest_phys(&self, addr: UmemAddr, hint: usize) -> Option<GuestPhysAddr> {
        let holds = |region: &&Region| addr.0.wrapping_sub(region.umem.0) < region.size_bytes;
        let region = self.regions.get(hint).filter(holds).or_else(|| self.regions.iter().find(holds))?;
        region.guest_phys.checked_add(addr.0 - region.umem.0)
    }

    /// Page size of the memory at an address: that of its file, or of our slabs. `hint` as in `translate`.
    #[inline]
    pub fn page_bytes(&self, addr: UmemAddr, hint: usize) -> u64 {
        let holds = |region: &Region| addr.0.wrapping_sub(region.umem.0) < region.size_bytes;
        match self.regions.get(hint) {
            Some(region) if holds(region) => region.page_bytes,
            _ => self.regions.iter().find(|region| holds(region)).map_or(PAGE_BYTES, |region| region.page_bytes),
        }
    }

    /// Distance of an address from the start of the page of `page_bytes` that it lies in. Huge pages are aligned in our
    /// address space, not in the UMEM.
    #[inline]
    pub fn offset_in_page(&self, addr: UmemAddr, page_bytes: u64) -> u64 {
        (self.base.as_ptr() as u64 + addr.0) & (page_bytes - 1)
    }

    /// Host address of a byte. Anything done with it must stay inside the mapping.
    #[inline]
    pub(crate) fn ptr(&self, addr: UmemAddr) -> *mut u8 {
        debug_assert!(addr.0 < self.len_bytes(), "a UMEM address lies inside the UMEM");
        // SAFETY: every UmemAddr comes from translate() or the slabs, so it is an offset inside this one mapping.
        unsafe { self.base.as_ptr().add(addr.0 as usize) }
    }

    /// Copies `bytes` into memory at `addr`.
    #[inline]
    pub fn write(&self, addr: UmemAddr, bytes: &[u8]) {
        self.check(addr, bytes.len() as u64);
        // SAFETY: both ranges are valid for their length (checked above); `bytes` is ours and does not overlap.
        unsafe { libc::memcpy(self.ptr(addr).cast(), bytes.as_ptr().cast(), bytes.len()) };
    }

    /// Copies memory at `addr` into `bytes`: once, whatever becomes of it meanwhile.
    #[inline]
    pub fn read_bytes(&self, addr: UmemAddr, bytes: &mut [u8]) {
        self.check(addr, bytes.len() as u64);
        // SAFETY: both ranges are valid for their length (checked above); `bytes` is ours and does not overlap.
        unsafe { libc::memcpy(bytes.as_mut_ptr().cast(), self.ptr(addr).cast(), bytes.len()) };
    }

    /// Copies `N` bytes into memory at `addr`: a store or a few, where [`write`](Self::write) is a call.
    #[inline]
    pub(crate) fn write_array<const N: usize>(&self, addr: UmemAddr, bytes: [u8; N]) {
        self.check(addr, N as u64);
        // SAFETY: the range is valid for its length (checked above), and any address will do.
        unsafe { self.ptr(addr).cast::<[u8; N]>().write_unaligned(bytes) };
    }

    /// Copies `len` bytes from `from` to `to`; the ranges may overlap.
    #[inline]
    pub fn copy(&self, from: UmemAddr, to: UmemAddr, len: u32) {
        self.check(from, u64::from(len));
        self.check(to, u64::from(len));
        // SAFETY: both ranges lie inside the mapping (checked above); memmove allows overlap.
        unsafe { libc::memmove(self.ptr(to).cast(), self.ptr(from).cast(), len as usize) };
    }

    /// Fills memory at `addr` with zeros.
    #[inline]
    pub fn zero(&self, addr: UmemAddr, len: u32) {
        self.check(addr, u64::from(len));
        // SAFETY: the range lies inside the mapping (checked above).
        unsafe { libc::memset(self.ptr(addr).cast(), 0, len as usize) };
    }

    /// The sum of a range as an Internet checksum takes it, see [`sum`]; read once.
    #[inline]
    pub(crate) fn sum(&self, addr: UmemAddr, len: u32) -> u64 {
        self.check(addr, u64::from(len));
        // SAFETY: the range lies inside the mapping (checked above).
        unsafe { sum::sum(self.ptr(addr), len as usize) }
    }

    /// Whether every byte of a range is zero.
    pub fn is_zero(&self, addr: UmemAddr, len_bytes: u64) -> bool {
        self.check(addr, len_bytes);
        // SAFETY: the range lies inside the mapping (checked above); bytes are read once, volatile.
        (0..len_bytes).all(|i| unsafe { self.ptr(addr.plus(i)).read_volatile() } == 0)
    }

    /// Reads a few bytes once. The compiler may not read them again: the guest could have changed them.
    #[inline]
    pub(crate) fn read<const N: usize>(&self, addr: UmemAddr) -> [u8; N] {
        self.check(addr, N as u64);
        // SAFETY: inside the mapping (checked above).
        std::array::from_fn(|i| unsafe { self.ptr(addr).add(i).read_volatile() })
    }

    /// Reads two 64-bit words once. The compiler may not read them again: the guest could have changed them.
    #[inline]
    pub(crate) fn read_words(&self, addr: UmemAddr) -> [u64; 2] {
        self.check(addr, 16);
        let from = self.ptr(addr).cast::<u64>();
        if !from.is_aligned() {
            return self.read_unaligned_words(addr);
        }
        // SAFETY: inside the mapping (checked above) and aligned (checked above).
        unsafe { from.cast::<[u64; 2]>().read_volatile() }
    }

    #[cold]
    fn read_unaligned_words(&self, addr: UmemAddr) -> [u64; 2] {
        // SAFETY: `read_words` has checked that 16 bytes are inside the mapping.
        let byte = |i| unsafe { self.ptr(addr).add(i).read_volatile() };
        [0, 8].map(|start| u64::from_ne_bytes(std::array::from_fn(|i| byte(start + i))))
    }

    /// Loads a 16-bit ring field.
    #[inline]
    pub(crate) fn load_u16(&self, addr: UmemAddr, order: Ordering) -> u16 {
        u16::from_le(self.atomic_u16(addr).load(order))
    }

    /// Stores a 16-bit ring field.
    #[inline]
    pub(crate) fn store_u16(&self, addr: UmemAddr, value: u16, order: Ordering) {
        self.atomic_u16(addr).store(value.to_le(), order);
    }

    /// Loads a 32-bit ring field.
    #[inline]
    pub(crate) fn load_u32(&self, addr: UmemAddr, order: Ordering) -> u32 {
        u32::from_le(self.atomic_u32(addr).load(order))
    }

    /// Stores a 32-bit ring field.
    #[inline]
    pub(crate) fn store_u32(&self, addr: UmemAddr, value: u32, order: Ordering) {
        self.atomic_u32(addr).store(value.to_le(), order);
    }

    /// Loads a 64-bit ring field.
    #[inline]
    pub(crate) fn load_u64(&self, addr: UmemAddr, order: Ordering) -> u64 {
        self.check(addr, 8);
        // SAFETY: inside the mapping, which lives as long as &self; descriptors of a packed ring are aligned to 16 (checked
        // when the queue was made). The reference is to an atomic: the guest may change it at any time.
        let field = unsafe { AtomicU64::from_ptr(self.ptr(addr).cast()) };
        u64::from_le(field.load(order))
    }

    #[inline]
    fn atomic_u16(&self, addr: UmemAddr) -> &AtomicU16 {
        self.check(addr, 2);
        // SAFETY: inside the mapping, which lives as long as &self; ring fields are 2-aligned (checked when the queue
        // was made). The reference is to an atomic: the guest may change it at any time.
        unsafe { AtomicU16::from_ptr(self.ptr(addr).cast()) }
    }

    #[inline]
    fn atomic_u32(&self, addr: UmemAddr) -> &AtomicU32 {
        self.check(addr, 4);
        // SAFETY: as in atomic_u16; these fields are 4-aligned.
        unsafe { AtomicU32::from_ptr(self.ptr(addr).cast()) }
    }

    /// Asserts that a range lies inside the mapping. The tail slab is longer than what is mostly accessed at once: then the
    /// start alone has to be looked at.
    #[inline]
    fn check(&self, addr: UmemAddr, len_bytes: u64) {
        let is_inside = if len_bytes <= TAIL_SLAB_BYTES {
            addr <= self.end
        } else {
            addr.0.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes())
        };
        assert!(is_inside, "an access stays inside the UMEM");
    }
}

/// [`GuestMemory::sum`] of bytes of ours.
#[inline]
pub(crate) fn sum_bytes(bytes: &[u8]) -> u64 {
    // SAFETY: the slice's own range.
    unsafe { sum::sum(bytes.as_ptr(), bytes.len()) }
}

fn range(spec: &RegionSpec) -> (GuestPhysAddr, u64) {
    (spec.guest_phys, spec.size_bytes)
}

/// Refuses ranges of guest-physical addresses, by start and length, that overlap or wrap around.
fn check_overlap(ranges: impl Iterator<Item = (GuestPhysAddr, u64)>) -> Result<(), Error> {
    let broken = |what| Error::Refused(format!("cannot map guest memory: {what}; the front-end sent a broken table"));
    let mut sorted: Vec<_> = ranges.collect();
    sorted.sort_unstable();
    let mut previous = None;
    for (start, size_bytes) in sorted {
        let end = start
            .checked_add(size_bytes)
            .ok_or_else(|| broken(format!("the region at {:#x} passes the end of the address space", start.0)))?;
        if let Some((before, _)) = previous.filter(|&(_, end)| end > start) {
            return Err(broken(format!("regions at {before:#x} and {:#x} overlap", start.0)));
        }
        previous = Some((start.0, end));
    }
    Ok(())
}

/// What is to be mapped of the files, the biggest pages first.
fn extents(specs: &[RegionSpec]) -> Result<Vec<Extent>, Error> {
    let mut extents = specs.iter().map(Extent::of).collect::<Result<Vec<_>, _>>()?;
    extents.sort_by_key(|e| std::cmp::Reverse(e.page_bytes));
    Ok(extents)
}

fn total_bytes(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len_bytes).sum()
}

/// Refuses what makes, with `before` bytes in front of it, a UMEM that the kernel would not take.
fn check_size(before: u64, extents: &[Extent]) -> Result<(), Error> {
    let fits = extents
        .iter()
        .try_fold(before + TAIL_SLAB_BYTES, |sum, extent| sum.checked_add(extent.len_bytes))
        .is_some_and(|bytes| bytes / PAGE_BYTES <= UMEM_CHUNKS_MAX);
    if fits {
        return Ok(());
    }
    let gib = extents.iter().map(|e| e.len_bytes as f64).sum::<f64>() / (1u64 << 30) as f64;
    Err(Error::Refused(format!(
        "cannot use guest memory of {gib:.1} GiB as a UMEM: the kernel takes at most {UMEM_CHUNKS_MAX} chunks of \
         {PAGE_BYTES} bytes, just under 64 GiB; give the guest less memory"
    )))
}
