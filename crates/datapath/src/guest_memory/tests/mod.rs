//! Guest memory: how regions are laid out, and how addresses are found in them.

mod access;
mod arena;
mod translate;

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{GuestPhysAddr, RegionSpec, UserAddr};

/// A sparse memfd that can be found by its name in /proc/self/maps.
fn memfd(name: &str, size_bytes: u64) -> OwnedFd {
    let name = CString::new(name).unwrap();
    // SAFETY: the name is NUL-terminated and lives through the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: resizes a file of ours.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), size_bytes as libc::off_t) }, 0);
    fd
}

/// A region of `file`; front-end addresses are guest-physical ones plus 2^40, modulo 2^64.
fn region(file: &OwnedFd, guest_phys: u64, size_bytes: u64, mmap_offset: u64) -> RegionSpec {
    RegionSpec {
        guest_phys: GuestPhysAddr(guest_phys),
        size_bytes,
        user: UserAddr(guest_phys.wrapping_add(1 << 40)),
        mmap_offset,
        fd: file.as_raw_fd(),
    }
}
