//! A piece of a file that another process may map too. It is accessed atomically only.

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use super::mapping::Mapping;
use super::region::{file_bytes, page_bytes};
use crate::error::HostError;

/// Which piece of which file.
#[derive(Debug, Clone, Copy)]
pub struct FileSpec {
    /// The file; borrowed for the call.
    pub fd: RawFd,
    /// Where the piece starts, in bytes; a multiple of 8 if values longer than a byte are in it.
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
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Maps a piece of a file in memory; `what` names it in errors.
    ///
    /// # Errors
    /// EINVAL if it is empty or reaches past the end of its file, where an access would end this process by SIGBUS; EFAULT
    /// if it is on a file system that could keep an accessing thread waiting; what mmap fails with, EPERM for a sealed file
    /// among it.
    pub fn map(spec: &FileSpec, what: &str) -> Result<Self, HostError> {
        let failed = |errno, advice| {
            HostError::new(
                errno,
                format!("cannot map {what} ({} bytes at {:#x})", spec.size_bytes, spec.offset),
                advice,
            )
        };
        let no_file = |errno| failed(errno, "the front-end sent a file descriptor that is no file");
        let Some(page_bytes) = page_bytes(spec.fd).map_err(no_file)? else {
            return Err(failed(libc::EFAULT, "it must be a memfd or POSIX shared memory"));
        };
        let file_bytes = file_bytes(spec.fd).map_err(no_file)?;
        let end = spec.offset.checked_add(spec.size_bytes).filter(|&end| spec.size_bytes > 0 && end <= file_bytes);
        let Some(end) = end else {
            return Err(failed(libc::EINVAL, "it is empty or reaches past the end of its file"));
        };
        let file_start = spec.offset & !(page_bytes - 1);
        let len_bytes = end.next_multiple_of(page_bytes) - file_start;
        // Pages of the file start at multiples of their size.
        let mapping = Mapping::reserve(len_bytes + page_bytes)?;
        let mapped_at = mapping.start().next_multiple_of(page_bytes);
        mapping
            .map_file(mapped_at, len_bytes, spec.fd, file_start)
            .map_err(|errno| failed(errno, "it must be a file that may be written"))?;
        let start = NonNull::new((mapped_at + (spec.offset - file_start)) as *mut u8)
            .ok_or_else(|| failed(libc::EINVAL, "it was mapped at address zero"))?;
        Ok(Self { _mapping: mapping, start, size_bytes: spec.size_bytes })
    }

    /// Length of the piece in bytes.
    #[inline]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The byte at an offset.
    #[inline]
    pub fn u8(&self, offset: u64) -> &AtomicU8 {
        assert!(offset < self.size_bytes, "an access stays inside the piece");
        // SAFETY: an offset inside the one mapping (checked above), which lives as long as &self.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset as usize)) }
    }

    /// The 16-bit field at an offset.
    #[inline]
    pub fn u16(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: inside the mapping and aligned (checked by `field`); it lives as long as &self.
        unsafe { AtomicU16::from_ptr(self.field(offset, 2).cast()) }
    }

    /// The 32-bit field at an offset.
    #[inline]
    pub fn u32(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: inside the mapping and aligned (checked by `field`); it lives as long as &self.
        unsafe { AtomicU32::from_ptr(self.field(offset, 4).cast()) }
    }

    /// The 64-bit field at an offset.
    #[inline]
    pub fn u64(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: inside the mapping and aligned (checked by `field`); it lives as long as &self.
        unsafe { AtomicU64::from_ptr(self.field(offset, 8).cast()) }
    }

    #[inline]
    fn field(&self, offset: u64, len_bytes: u64) -> *mut u8 {
        assert!(offset < self.size_bytes && len_bytes <= self.size_bytes - offset, "an access stays inside the piece");
        // SAFETY: an offset inside the one mapping (checked above).
        let at = unsafe { self.start.as_ptr().add(offset as usize) };
        assert!((at as u64).is_multiple_of(len_bytes), "a field is at its own alignment");
        at
    }

    /// Where `count` values of a type start, `offset` bytes from the start: inside the mapping and aligned, as long as `self`
    /// lives. References to them are sound if the type is made of atomics.
    pub(crate) fn values<T>(&self, offset: u64, count: usize) -> NonNull<[T]> {
        let len_bytes = count as u64 * size_of::<T>() as u64;
        assert!(offset <= self.size_bytes && len_bytes <= self.size_bytes - offset, "all values lie inside the piece");
        // SAFETY: an offset inside the one mapping (checked above).
        let start = unsafe { self.start.add(offset as usize) }.cast::<T>();
        assert!(start.is_aligned(), "a field is at its own alignment");
        NonNull::slice_from_raw_parts(start, count)
    }
}
