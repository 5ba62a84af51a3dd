//! The bpf_link that holds the program on the interface.
//!
//! aya's own attach falls back to the netlink interface where the kernel says EINVAL. A program attached that way
//! replaces another's without a word and stays when its owner dies; so the two commands are given here.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::last_errno;

const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
/// `enum bpf_attach_type`.
const BPF_XDP: u32 = 37;

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, before an skb is made (`XDP_FLAGS_DRV_MODE`).
    Native,
    /// In the network stack, on any device (`XDP_FLAGS_SKB_MODE`).
    Generic,
}

impl XdpMode {
    fn flags(self) -> u32 {
        match self {
            XdpMode::Generic => 1 << 1,
            XdpMode::Native => 1 << 2,
        }
    }
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads for XDP.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that `BPF_LINK_DETACH` reads.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// One program attached to one interface, until dropped.
#[derive(Debug)]
pub(crate) struct XdpLink(OwnedFd);

impl XdpLink {
    /// Attaches a loaded program.
    ///
    /// # Errors
    /// The errno of `BPF_LINK_CREATE`; EBUSY or EEXIST if an XDP program is there.
    pub(crate) fn create(program: BorrowedFd<'_>, ifindex: u32, mode: XdpMode) -> Result<Self, i32> {
        let attr = LinkCreate {
            prog_fd: program.as_raw_fd().cast_unsigned(),
            target_ifindex: ifindex,
            attach_type: BPF_XDP,
            flags: mode.flags(),
        };
        let fd = bpf(BPF_LINK_CREATE, &attr)?;
        // SAFETY: BPF_LINK_CREATE returned a new descriptor (close-on-exec) that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the program off the interface at once, even if a forked child still holds the descriptor.
    ///
    /// # Errors
    /// The errno of `BPF_LINK_DETACH`.
    pub(crate) fn detach(self) -> Result<(), i32> {
        let attr = LinkDetach { link_fd: self.0.as_raw_fd().cast_unsigned() };
        bpf(BPF_LINK_DETACH, &attr).map(|_| ())
    }
}

fn bpf<T>(command: libc::c_long, attr: &T) -> Result<i32, i32> {
    // SAFETY: `attr` is a live `#[repr(C)]` prefix of union bpf_attr, its size is passed along, and neither of the two
    // commands writes to it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    // A descriptor or 0 fits an int: the system call's result is one.
    if result < 0 { Err(last_errno()) } else { Ok(result as i32) }
}
