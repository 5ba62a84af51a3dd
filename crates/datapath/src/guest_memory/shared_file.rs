//! A piece of a file that another process may map too. It is accessed atomically only.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use super::PAGE_BYTES;
use super::mapping::Mapping;
use super::region::{file_bytes, file_system};
use crate::error::HostError;

/// Which piece of which file.
#[derive(Debug, Clone, Copy)]
pub struct FileSpec {
    /// The file; borrowed for the call.
    pub fd: RawFd,
    /// Where the piece starts, a multiple of 8.
    pub offset: u64,
    /// Its length in bytes.
    pub size_bytes: u64,
}

/// A mapped piece of a file. Unmapped on drop.
#[derive(Debug)]
pub struct SharedFile {
    /// Keeps the piece mapped; `start` lies inside it.
    _mapping: Mapping,
    start: NonNull<u8>,
    size_bytes: u64,
}

// SAFETY: the mapping is plain memory without thread affinity, and it is only accessed atomically.
unsafe impl Send for SharedFile {}

impl SharedFile {
    /// Maps a piece of a memfd; `what` names it in errors.
    ///
    /// # Errors
    /// EINVAL if it is empty, misaligned or reaches past the end of its file, where an access would end this process by
    /// SIGBUS, or if the file is no memfd; what mmap fails with.
    pub fn map(spec: &FileSpec, what: &str) -> Result<Self, HostError> {
        let failed = |errno, advice| {
            HostError::new(
                errno,
                format!("cannot map {what} ({} bytes at {:#x})", spec.size_bytes, spec.offset),
                advice,
            )
        };
        let no_file = |errno| failed(errno, "the front-end sent a file descriptor that is no file");
        let (kind, _) = file_system(spec.fd).map_err(no_file)?;
        if kind != libc::TMPFS_MAGIC {
            return Err(failed(libc::EINVAL, "it must be a memfd of ordinary pages"));
        }
        let file_bytes = file_bytes(spec.fd).map_err(no_file)?;
        let end = spec.offset.checked_add(spec.size_bytes).filter(|&end| end <= file_bytes && end <= i64::MAX as u64);
        if spec.size_bytes == 0 || end.is_none() {
            return Err(failed(libc::EINVAL, "it is empty or reaches past the end of its file"));
        }
        if !spec.offset.is_multiple_of(8) {
            return Err(failed(libc::EINVAL, "it must start at a multiple of 8"));
        }
        let file_start = spec.offset & !(PAGE_BYTES - 1);
        let len_bytes = (spec.offset - file_start + spec.size_bytes).next_multiple_of(PAGE_BYTES);
        let mapping = Mapping::reserve(len_bytes)?;
        mapping
            .map_file(mapping.start(), len_bytes, spec.fd, file_start)
            .map_err(|errno| failed(errno, "it must be a memfd that may be written"))?;
        let start = NonNull::new((mapping.start() + (spec.offset - file_start)) as *mut u8)
            .ok_or_else(|| failed(libc::EINVAL, "it was mapped at address zero"))?;
        Ok(Self { _mapping: mapping, start, size_bytes: spec.size_bytes })
    }

    /// The byte at an offset.
    #[inline]
    pub fn u8(&self, offset: u64) -> &AtomicU8 {
        // SAFETY: inside the mapping (checked by `at`), which lives as long as &self.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }

    /// The 16-bit field at an offset.
    #[inline]
    pub fn u16(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: inside the mapping and aligned (checked by `at`); it lives as long as &self.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// The 64-bit field at an offset.
    #[inline]
    pub fn u64(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: inside the mapping and aligned (checked by `at`); it lives as long as &self.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    #[inline]
    fn at(&self, offset: u64, len_bytes: u64) -> *mut u8 {
        // The piece itself starts at a multiple of 8.
        assert!(
            offset.is_multiple_of(len_bytes) && offset + len_bytes <= self.size_bytes,
            "an access stays inside the piece, at its own alignment"
        );
        // SAFETY: an offset inside the one mapping (checked above).
        unsafe { self.start.as_ptr().add(offset as usize) }
    }
}
