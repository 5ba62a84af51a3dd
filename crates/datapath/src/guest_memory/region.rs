//! One region of guest memory: what the front-end says of it, and where it lies in the UMEM.

use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use super::{GuestPhysAddr, PAGE_BYTES, UmemAddr, UserAddr};
use crate::error::HostError;

/// A region as VHOST_USER_SET_MEM_TABLE describes it.
#[derive(Debug, Clone, Copy)]
pub struct RegionSpec {
    /// Start on the guest's bus.
    pub guest_phys: GuestPhysAddr,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Start in the front-end's address space.
    pub user: UserAddr,
    /// Start in the file.
    pub mmap_offset: u64,
    /// The file; borrowed for the call.
    pub fd: RawFd,
}

/// A mapped region. Addresses are checked against it and nothing else.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// Start on the guest's bus.
    pub guest_phys: GuestPhysAddr,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Start in the front-end's address space.
    pub user: UserAddr,
    /// Start in the UMEM.
    pub umem: UmemAddr,
    /// Page size of the backing file: 4096, or that of its huge pages.
    pub page_bytes: u64,
}

/// What mmap needs: the region's file extent, rounded out to whole pages of the backing file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub spec: RegionSpec,
    pub page_bytes: u64,
    pub file_start: u64,
    pub len_bytes: u64,
}

impl Extent {
    /// Asks the file for its page size and checks that it holds the whole region.
    ///
    /// A region that reaches past the end of its file would end this process by SIGBUS at first touch.
    pub fn of(spec: &RegionSpec) -> Result<Self, HostError> {
        let what = || format!("cannot map guest memory region at {:#x} ({} bytes)", spec.guest_phys.0, spec.size_bytes);
        let no_file = |errno| HostError::new(errno, what(), "the front-end sent a file descriptor that is no file");
        let Some(page_bytes) = page_bytes(spec.fd).map_err(no_file)? else {
            // The kernel refuses to pin such pages (mm/gup.c: writable_file_mapping_allowed), after it pinned others.
            let advice = "memory on a disk file cannot be pinned: use memfd, hugetlbfs or POSIX shared memory";
            return Err(HostError::new(libc::EFAULT, what(), advice));
        };
        let file_bytes = file_bytes(spec.fd).map_err(no_file)?;
        let end = spec
            .mmap_offset
            .checked_add(spec.size_bytes)
            .filter(|&end| spec.size_bytes > 0 && end <= file_bytes && end <= i64::MAX as u64)
            .ok_or_else(|| {
                HostError::new(libc::EINVAL, what(), "the region reaches past the end of the file that backs it")
            })?;
        let file_start = spec.mmap_offset & !(page_bytes - 1);
        let len_bytes = end.next_multiple_of(page_bytes) - file_start;
        Ok(Self { spec: *spec, page_bytes, file_start, len_bytes })
    }

    /// The region, once its extent is mapped at `umem`.
    pub fn mapped_at(&self, umem: UmemAddr) -> Region {
        Region {
            guest_phys: self.spec.guest_phys,
            size_bytes: self.spec.size_bytes,
            user: self.spec.user,
            umem: umem.plus(self.spec.mmap_offset - self.file_start),
            page_bytes: self.page_bytes,
        }
    }
}

/// Size of the pages of a file in memory: tmpfs (memfd, POSIX shared memory) or hugetlbfs; `None` on any other file
/// system.
pub(super) fn page_bytes(fd: RawFd) -> Result<Option<u64>, i32> {
    let (file_system, block_bytes) = file_system(fd)?;
    Ok(match file_system {
        libc::TMPFS_MAGIC => Some(PAGE_BYTES),
        libc::HUGETLBFS_MAGIC => Some(block_bytes),
        _ => None,
    })
}

/// Type of the file system that a file is on, and its block size: that of its pages on hugetlbfs.
pub(super) fn file_system(fd: RawFd) -> Result<(libc::__fsword_t, u64), i32> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `stat` is valid for writes of its type; the kernel checks `fd`.
    if unsafe { libc::fstatfs(fd, stat.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
    }
    // SAFETY: fstatfs succeeded, so it filled the structure in.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.f_type, stat.f_bsize.unsigned_abs()))
}

pub(super) fn file_bytes(fd: RawFd) -> Result<u64, i32> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` is valid for writes of its type; the kernel checks `fd`.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
    }
    // SAFETY: fstat succeeded, so it filled the structure in.
    Ok(unsafe { stat.assume_init() }.st_size.unsigned_abs())
}
