//! The shared rings: producer (fill, tx) and consumer (completion, rx), single-threaded on our side.
//!
//! Verbs: reserve/submit and peek/release. Indices run free over 32 bits. Our own index is private; the kernel's is
//! cached and read again only when the cache says full or empty. The barriers are those of
//! `net/xdp/xsk_queue.h`, (A) to (D) in its opening comment.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::HostError;

/// One mapped ring.
#[derive(Debug)]
struct Ring<T> {
    start: NonNull<u8>,
    len_bytes: usize,
    /// Number of entries, less 1: that is a power of two.
    mask: u32,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
}

// SAFETY: a mapping without thread affinity; one thread owns the ring at a time (&mut self to use it).
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    fn map(fd: RawFd, offsets: &libc::xdp_ring_offset, page_offset: u64, size: u32) -> Result<Self, HostError> {
        assert!(size.is_power_of_two(), "ring indices are taken modulo the size by a mask");
        let len_bytes = offsets.desc as usize + size as usize * size_of::<T>();
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len_bytes, access, flags, fd, page_offset as libc::off_t) };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(address) if start != libc::MAP_FAILED => address,
            _ => return Err(HostError::last("cannot map an AF_XDP ring", |_| "free some memory")),
        };
        // SAFETY: the kernel's XDP_MMAP_OFFSETS name places inside the mapping.
        let at = |offset: u64| unsafe { start.add(offset as usize) };
        let [producer, consumer, flags] =
            [offsets.producer, offsets.consumer, offsets.flags].map(|word| at(word).cast());
        Ok(Self { start, len_bytes, mask: size - 1, producer, consumer, flags, entries: at(offsets.desc).cast() })
    }

    #[inline]
    fn size(&self) -> u32 {
        self.mask + 1
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: an aligned word inside the mapping, which lives as long as &self; the kernel changes it atomically.
        unsafe { self.producer.as_ref() }
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as producer().
        unsafe { self.consumer.as_ref() }
    }

    #[inline]
    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as producer().
        unsafe { self.flags.as_ref() }
    }

    #[inline]
    fn entry(&self, index: u32) -> NonNull<T> {
        let slot = (index & self.mask) as usize;
        // SAFETY: the mapping holds mask + 1 entries from `entries` on.
        unsafe { self.entries.add(slot) }
    }

    #[inline]
    fn needs_wakeup(&self) -> bool {
        // Relaxed: a hint; the kernel sets it before it looks at the ring for the last time.
        self.flags().load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; nothing refers to it any more.
        let failed = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len_bytes) };
        assert!(failed == 0, "a range that mmap returned can be unmapped");
    }
}

/// fill or tx: we produce, the kernel consumes.
#[derive(Debug)]
pub(super) struct Producer<T: Copy> {
    ring: Ring<T>,
    /// Next entry to write; not yet visible to the kernel between `write` and `submit`.
    next: u32,
    /// The kernel's consumer index, as last read.
    consumed: u32,
}

impl<T: Copy> Producer<T> {
    pub fn map(fd: RawFd, offsets: &libc::xdp_ring_offset, page_offset: u64, size: u32) -> Result<Self, HostError> {
        Ok(Self { ring: Ring::map(fd, offsets, page_offset, size)?, next: 0, consumed: 0 })
    }

    /// Number of entries that can be written, at least `wanted` if there are that many.
    #[inline]
    pub fn free(&mut self, wanted: u32) -> u32 {
        let free = self.ring.size() - self.next.wrapping_sub(self.consumed);
        if free >= wanted {
            return free;
        }
        // Acquire: the kernel has read the entries that we are about to overwrite. (D) pairs with (A)'s counterpart,
        // the kernel's store of the consumer index.
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.ring.size() - self.next.wrapping_sub(self.consumed)
    }

    /// Writes the next entry. [`free`](Self::free) said that there is room.
    #[inline]
    pub fn write(&mut self, entry: T) {
        debug_assert!(self.next.wrapping_sub(self.consumed) < self.ring.size(), "room was reserved");
        // SAFETY: inside the mapping (entry()), and the kernel does not look at it before submit().
        unsafe { self.ring.entry(self.next).write_volatile(entry) };
        self.next = self.next.wrapping_add(1);
    }

    /// Shows all written entries to the kernel.
    #[inline]
    pub fn submit(&mut self) {
        // Release: (B) entries are visible before the index. Pairs with (C), the kernel's load of the producer index.
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// Entries that the kernel has not consumed yet.
    #[inline]
    pub fn pending(&mut self) -> u32 {
        // Acquire: as in free().
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.next.wrapping_sub(self.consumed)
    }

    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// completion or rx: the kernel produces, we consume.
#[derive(Debug)]
pub(super) struct Consumer<T: Copy> {
    ring: Ring<T>,
    /// Next entry to read; the kernel may reuse it only after `release`.
    next: u32,
}

impl<T: Copy> Consumer<T> {
    pub fn map(fd: RawFd, offsets: &libc::xdp_ring_offset, page_offset: u64, size: u32) -> Result<Self, HostError> {
        Ok(Self { ring: Ring::map(fd, offsets, page_offset, size)?, next: 0 })
    }

    /// Number of entries that can be read.
    #[inline]
    pub fn peek(&self) -> u32 {
        // Acquire: (C) entries are read after the index. Pairs with (B), the kernel's store of the producer index.
        self.ring.producer().load(Ordering::Acquire).wrapping_sub(self.next)
    }

    /// Reads the next entry. [`peek`](Self::peek) said that there is one.
    #[inline]
    pub fn read(&mut self) -> T {
        // SAFETY: inside the mapping (entry()), written by the kernel before the index that peek() saw.
        let entry = unsafe { self.ring.entry(self.next).read_volatile() };
        self.next = self.next.wrapping_add(1);
        entry
    }

    /// Gives all read entries back to the kernel.
    #[inline]
    pub fn release(&mut self) {
        // Release: (D) our reads are done before the kernel sees the index. Pairs with the kernel's load of the
        // consumer index before it writes, (A).
        self.ring.consumer().store(self.next, Ordering::Release);
    }
}

/// What only the kernel does; see `test_kernel`.
#[cfg(any(test, feature = "test-utils"))]
impl<T: Copy> Consumer<T> {
    /// Takes back the reading of the `count` entries read last.
    pub fn unread(&mut self, count: u32) {
        self.next = self.next.wrapping_sub(count);
    }

    /// Sets or clears XDP_RING_NEED_WAKEUP.
    pub fn set_needs_wakeup(&self, on: bool) {
        // Relaxed: as in needs_wakeup().
        self.ring.flags().store(if on { libc::XDP_RING_NEED_WAKEUP } else { 0 }, Ordering::Relaxed);
    }

    /// As if `index` entries had gone through already.
    #[cfg(test)]
    pub fn start_at(&mut self, index: u32) {
        self.next = index;
        self.release();
    }
}

#[cfg(any(test, feature = "test-utils"))]
impl<T: Copy> Producer<T> {
    /// As if `index` entries had gone through already.
    #[cfg(test)]
    pub fn start_at(&mut self, index: u32) {
        (self.next, self.consumed) = (index, index);
        self.submit();
    }
}
