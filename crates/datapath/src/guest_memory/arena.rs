//! The range of addresses that one guest's memory lives in: reserved as a whole, mapped from its start on.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::mapping::Mapping;
use super::region::Extent;
use super::{TAIL_SLAB_BYTES, UmemAddr};
use crate::error::HostError;

/// The range of one guest's memory.
#[derive(Debug)]
pub(super) struct Arena {
    mapping: Mapping,
    /// Where the tail slab of the newest memory is, or 0 if there is none yet.
    tail: AtomicU64,
}

impl Arena {
    /// `least_bytes` are needed now, `most_bytes` if memory is to grow as far as the kernel lets it: a process with a
    /// limit (`ulimit -v`) has room for less.
    pub fn reserve(least_bytes: u64, most_bytes: u64) -> Result<Self, HostError> {
        Ok(Self { mapping: Mapping::reserve_between(least_bytes, most_bytes)?, tail: AtomicU64::new(0) })
    }

    pub fn start(&self) -> u64 {
        self.mapping.start()
    }

    /// Whether there is room for memory that ends at `end`, `base` being the address of `UmemAddr(0)`.
    pub fn has_room(&self, base: NonNull<u8>, end: UmemAddr) -> bool {
        self.mapping.holds(address(base, end), TAIL_SLAB_BYTES)
    }

    /// Lets `map` map what lies between `from`, where the tail slab is, and `to`, where it goes; `base` is the address of
    /// `UmemAddr(0)`. After a failure everything is as before.
    ///
    /// The old tail slab may be replaced while a UMEM has it: the kernel keeps its pages, and nobody reads them.
    pub fn grow(
        &self,
        base: NonNull<u8>,
        from: UmemAddr,
        to: UmemAddr,
        map: impl FnOnce() -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        // Relaxed, both: an arena grows by the one owner of its newest memory; this checks that.
        let newest = self.tail.load(Ordering::Relaxed);
        assert!(newest == 0 || newest == from.0, "only the newest memory of an arena grows");
        if let Err(error) = map().and_then(|()| self.map_slab(address(base, to), TAIL_SLAB_BYTES)) {
            self.forget(address(base, from), to.0 - from.0 + TAIL_SLAB_BYTES)?;
            self.map_slab(address(base, from), TAIL_SLAB_BYTES)?;
            return Err(error);
        }
        self.tail.store(to.0, Ordering::Relaxed);
        Ok(())
    }

    /// Maps memory of ours.
    pub fn map_slab(&self, at: u64, len_bytes: u64) -> Result<(), HostError> {
        if len_bytes == 0 {
            return Ok(());
        }
        self.mapping.map_anonymous(at, len_bytes).map_err(|errno| {
            HostError::new(errno, format!("cannot map a slab of {len_bytes} bytes"), "free some memory")
        })
    }

    /// Maps a region's extent.
    pub fn map_extent(&self, at: u64, extent: &Extent) -> Result<(), HostError> {
        let spec = &extent.spec;
        self.mapping.map_file(at, extent.len_bytes, spec.fd, extent.file_start).map_err(|errno| {
            HostError::new(
                errno,
                format!("cannot map guest memory region at {:#x} ({} bytes)", spec.guest_phys.0, spec.size_bytes),
                match errno {
                    libc::ENOMEM => "not enough free huge pages, or too many mappings (vm.max_map_count)",
                    libc::EACCES => "the front-end sent a read-only file descriptor",
                    _ => "the front-end's memory must be a memfd, hugetlbfs or POSIX shared memory",
                },
            )
        })
    }

    fn forget(&self, at: u64, len_bytes: u64) -> Result<(), HostError> {
        let failed = |errno| HostError::new(errno, "cannot unmap a region of guest memory", "free some memory");
        self.mapping.unmap(at, len_bytes).map_err(failed)
    }
}

/// Host address of a UMEM address.
pub(super) fn address(base: NonNull<u8>, at: UmemAddr) -> u64 {
    base.as_ptr() as u64 + at.0
}
