//! Guest memory: how regions are laid out, and how addresses are found in them.

mod access;
mod arena;
mod dirty_log;
mod grow;
mod translate;

use std::os::fd::{AsRawFd, OwnedFd};

use super::{GuestPhysAddr, RegionSpec, UserAddr};

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
