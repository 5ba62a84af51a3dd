//! A range of addresses that is ours alone: reserved, mapped in parts, unmapped as a whole.

use std::os::fd::RawFd;
use std::ptr::NonNull;

use crate::error::HostError;

/// A reserved range of addresses; unmapped on drop.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<libc::c_void>,
    len_bytes: usize,
}

// SAFETY: a range of addresses has no thread affinity; what each thread may touch in it is its user's business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn reserve(len_bytes: u64) -> Result<Self, HostError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private reservation at an address of the kernel's choice touches nothing of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len_bytes as usize, libc::PROT_NONE, flags, -1, 0) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(Self { start, len_bytes: len_bytes as usize }),
            _ => Err(HostError::last(
                format!("cannot reserve {len_bytes} bytes of addresses for guest memory"),
                |_| "the address space limit (ulimit -v) may be too small",
            )),
        }
    }

    /// Reserves `most_bytes`, or what there is if that is at least `least_bytes`.
    pub fn reserve_between(least_bytes: u64, most_bytes: u64) -> Result<Self, HostError> {
        let mut len_bytes = most_bytes;
        loop {
            match Self::reserve(len_bytes) {
                Err(_) if len_bytes > least_bytes => len_bytes = least_bytes.max(len_bytes / 2),
                result => return result,
            }
        }
    }

    pub fn start(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Maps memory of ours for reading and writing; what was mapped there is gone. `Err` is the errno of mmap.
    pub fn map_anonymous(&self, at: u64, len_bytes: u64) -> Result<(), i32> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        self.map(at, len_bytes, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Maps a file for reading and writing; what was mapped there is gone. `Err` is the errno of mmap.
    pub fn map_file(&self, at: u64, len_bytes: u64, fd: RawFd, file_start: u64) -> Result<(), i32> {
        self.map(at, len_bytes, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, file_start)
    }

    /// Unmaps a part; its addresses stay reserved. `Err` is the errno of mmap.
    pub fn unmap(&self, at: u64, len_bytes: u64) -> Result<(), i32> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.map(at, len_bytes, libc::PROT_NONE, flags, -1, 0)
    }

    /// Whether a range lies in the reservation.
    pub fn holds(&self, at: u64, len_bytes: u64) -> bool {
        at >= self.start() && at + len_bytes <= self.start() + self.len_bytes as u64
    }

    fn map(&self, at: u64, len_bytes: u64, access: i32, flags: i32, fd: RawFd, offset: u64) -> Result<(), i32> {
        assert!(self.holds(at, len_bytes), "what is mapped lies in the reservation");
        let (flags, offset) = (flags | libc::MAP_FIXED, offset as libc::off_t);
        // SAFETY: MAP_FIXED replaces a part of this reservation (checked above), which is its user's to replace.
        let got = unsafe { libc::mmap(at as *mut _, len_bytes as usize, access, flags, fd, offset) };
        if got == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by us as a whole and nothing refers to it any more.
        let failed = unsafe { libc::munmap(self.start.as_ptr(), self.len_bytes) };
        assert!(failed == 0, "a range that mmap returned can be unmapped");
    }
}
