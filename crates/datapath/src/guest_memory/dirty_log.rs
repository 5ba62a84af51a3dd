//! The log of written guest memory that live migration copies by: a bitmap of 4 KiB pages, shared with the front-end
//! (vhost-user.rst, "Migration").
//!
//! Page `n` of guest-physical memory is bit `n % 8` of byte `n / 8`. We set bits; the front-end takes and clears them at
//! any time.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{FileSpec, GuestMemory, GuestPhysAddr, PAGE_BYTES, SharedFile};
use crate::error::HostError;

/// A mapped log.
#[derive(Debug)]
pub struct DirtyLog {
    bits: SharedFile,
}

impl DirtyLog {
    /// Maps a log: what VHOST_USER_SET_LOG_BASE describes.
    ///
    /// # Errors
    /// As [`SharedFile::map`].
    pub fn map(spec: &FileSpec) -> Result<Self, HostError> {
        Ok(Self { bits: SharedFile::map(spec, "the migration log")? })
    }

    /// Whether there is a bit for every page of `memory`.
    pub fn covers(&self, memory: &GuestMemory) -> bool {
        memory.regions().iter().all(|region| self.has_room(region.guest_phys, region.size_bytes))
    }

    /// Whether there is a bit for every page of so many bytes from `start` on.
    pub fn has_room(&self, start: GuestPhysAddr, size_bytes: u64) -> bool {
        start
            .0
            .checked_add(size_bytes.saturating_sub(1))
            .is_some_and(|last| last / PAGE_BYTES / 8 < self.bits.size_bytes())
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
        (byte < self.bits.size_bytes()).then(|| self.bits.u8(byte))
    }
}
