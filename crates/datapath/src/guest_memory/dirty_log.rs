//! The log of written guest memory that live migration copies by: a bitmap of 4 KiB pages, shared with the front-end
//! (vhost-user.rst, "Migration").
//!
//! Page `n` of guest-physical memory is bit `n % 8` of byte `n / 8`. We set bits; the front-end takes and clears them at
//! any time.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use super::mapping::Mapping;
use super::region::{file_bytes, page_bytes};
use super::{GuestMemory, GuestPhysAddr, PAGE_BYTES};
use crate::error::HostError;

/// What VHOST_USER_SET_LOG_BASE describes.
#[derive(Debug, Clone, Copy)]
pub struct LogSpec {
    /// The file; borrowed for the call.
    pub fd: RawFd,
    /// Where the bitmap starts in it, in bytes.
    pub offset: u64,
    /// Length of the bitmap in bytes.
    pub size_bytes: u64,
}

/// A mapped log. Unmapped on drop.
#[derive(Debug)]
pub struct DirtyLog {
    /// Keeps the bitmap mapped; `bits` lies inside it.
    _mapping: Mapping,
    bits: NonNull<u8>,
    size_bytes: u64,
}

// SAFETY: the mapping is plain memory without thread affinity, and it is only accessed atomically.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps a log.
    ///
    /// # Errors
    /// EINVAL if it is empty or reaches past the end of its file, where marking would end this process by SIGBUS; EFAULT
    /// if it is on a file system that could keep a marking thread waiting; what mmap fails with, EPERM for a sealed file
    /// among it.
    pub fn map(spec: &LogSpec) -> Result<Self, HostError> {
        let what = || format!("cannot map the migration log ({} bytes at {:#x})", spec.size_bytes, spec.offset);
        let refused = |errno, advice| HostError::new(errno, what(), advice);
        let no_file = |errno| refused(errno, "the front-end sent a file descriptor that is no file");
        let Some(page_bytes) = page_bytes(spec.fd).map_err(no_file)? else {
            return Err(refused(libc::EFAULT, "the front-end's log must be a memfd or POSIX shared memory"));
        };
        let file_bytes = file_bytes(spec.fd).map_err(no_file)?;
        let end = spec.offset.checked_add(spec.size_bytes).filter(|&end| spec.size_bytes > 0 && end <= file_bytes);
        let Some(end) = end else {
            return Err(refused(libc::EINVAL, "the log is empty or reaches past the end of its file"));
        };
        let file_start = spec.offset & !(page_bytes - 1);
        let len_bytes = end.next_multiple_of(page_bytes) - file_start;
        // Pages of the file start at multiples of their size.
        let mapping = Mapping::reserve(len_bytes + page_bytes)?;
        let start = mapping.start().next_multiple_of(page_bytes);
        mapping
            .map_file(start, len_bytes, spec.fd, file_start)
            .map_err(|errno| refused(errno, "the front-end's log must be a file that may be written"))?;
        let bits = NonNull::new((start + (spec.offset - file_start)) as *mut u8)
            .ok_or_else(|| refused(libc::EINVAL, "it was mapped at address zero"))?;
        Ok(Self { _mapping: mapping, bits, size_bytes: spec.size_bytes })
    }

    /// Whether there is a bit for every page of `memory`.
    pub fn covers(&self, memory: &GuestMemory) -> bool {
        memory.regions().iter().all(|region| self.has_room(region.guest_phys, region.size_bytes))
    }

    /// Whether there is a bit for every page of so many bytes from `start` on.
    pub fn has_room(&self, start: GuestPhysAddr, size_bytes: u64) -> bool {
        start.0.checked_add(size_bytes.saturating_sub(1)).is_some_and(|last| last / PAGE_BYTES / 8 < self.size_bytes)
    }

    /// Marks every page that holds one of `len_bytes` bytes from `start` on. They have been written before. Pages that
    /// the log has no room for are left out.
    pub fn mark(&self, start: GuestPhysAddr, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        let last = start.0.saturating_add(len_bytes - 1) / PAGE_BYTES;
        for page in start.0 / PAGE_BYTES..=last {
            let Some(bits) = self.byte_of(page) else { return };
            // Release: what was written to the page is visible before its bit. Pairs with the front-end's atomic
            // exchange, which takes the bit and then reads the page (QEMU's vhost_dev_sync_region). Set again even if it
            // is set: a plain look could see the bit just before it is taken, and the write after the page was read.
            bits.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    /// Marks all of guest memory: what was written to it is not known.
    pub fn mark_all(&self, memory: &GuestMemory) {
        for region in memory.regions() {
            self.mark(region.guest_phys, region.size_bytes);
        }
    }

    /// Takes a page's bit, as the front-end does.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn take(&self, page: u64) -> bool {
        let bit = 1 << (page % 8);
        // Acquire: pairs with the Release in mark().
        self.byte_of(page).is_some_and(|bits| bits.fetch_and(!bit, Ordering::Acquire) & bit != 0)
    }

    #[inline]
    fn byte_of(&self, page: u64) -> Option<&AtomicU8> {
        let byte = page / 8;
        // SAFETY: inside the bitmap (checked here), which lives as long as &self; bytes are always aligned. The
        // reference is to an atomic: the front-end may change it at any time.
        (byte < self.size_bytes).then(|| unsafe { AtomicU8::from_ptr(self.bits.as_ptr().add(byte as usize)) })
    }
}
