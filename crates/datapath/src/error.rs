//! The two kinds of failure of the data path, kept apart by type.
//!
//! [`QueueFault`] is the guest's doing and ends one virtqueue; [`HostError`] is the kernel's or the machine's answer.
//! A third kind, a bug of ours, is an `assert!` whose message states the invariant.

use std::io;

use crate::guest_memory::UmemAddr;

/// The driver broke the ring protocol. Stops that virtqueue and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// The queue size is zero or above 32768, or, of a split virtqueue, no power of two (VIRTIO 1.3 §2.7, §2.8).
    #[error("queue size {size} is not between 1 and 32768, or no power of two as a split virtqueue needs it")]
    BadSize {
        /// Size as the front-end gave it, in descriptors.
        size: u32,
    },
    /// The front-end wants the queue to go on where it has nothing.
    #[error("ring base {base:#x} is outside a virtqueue of {size} descriptors")]
    BadBase {
        /// Base as the front-end gave it.
        base: u32,
        /// Queue size.
        size: u32,
    },
    /// A ring is misaligned or not inside one region of guest memory.
    #[error(
        "{ring} at front-end address {address:#x} ({len_bytes} bytes) is misaligned or not inside one memory region"
    )]
    RingOutsideMemory {
        /// `descriptor table`, `avail ring` or `used ring`, or the like of a packed virtqueue.
        ring: &'static str,
        /// Where the front-end said it is.
        address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// The driver's avail index moved further than the queue is long (VIRTIO 1.3 §2.7.6).
    #[error("avail index {avail_idx} is {ahead} ahead of {next_avail}, the queue has {size} descriptors")]
    AvailIndexJump {
        /// Index as published by the driver.
        avail_idx: u16,
        /// Next index this device would take.
        next_avail: u16,
        /// Their distance.
        ahead: u16,
        /// Queue size.
        size: u16,
    },
    /// An avail ring entry names no descriptor, or a buffer id of a packed virtqueue is as large as the queue.
    #[error("head index {head} is outside the descriptor table of {size}")]
    HeadOutOfRange {
        /// Head index.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// The driver gave a buffer an id that another one has which is in flight (VIRTIO 1.3 §2.8.21.1).
    #[error("buffer id {id} is in flight already")]
    IdInFlight {
        /// The id.
        id: u16,
    },
    /// A `next` field names no descriptor of its table.
    #[error("next index {next} is outside the descriptor table of {size} (head {head})")]
    NextOutOfRange {
        /// Head of the chain.
        head: u16,
        /// The bad index.
        next: u16,
        /// Table size.
        size: u32,
    },
    /// The chain loops, or is longer than any driver may make it.
    #[error("descriptor chain of head {head} loops or has more than {limit} descriptors")]
    ChainTooLong {
        /// Head of the chain.
        head: u16,
        /// Descriptors walked before giving up.
        limit: u32,
    },
    /// An indirect table inside an indirect table, of a bad length, or outside memory (VIRTIO 1.3 §2.7.5.3).
    #[error("indirect table of head {head} is invalid: address {address:#x}, {len_bytes} bytes")]
    BadIndirectTable {
        /// Head of the chain.
        head: u16,
        /// Guest-physical address of the table.
        address: u64,
        /// Its length.
        len_bytes: u32,
    },
    /// A buffer is not in guest memory.
    #[error("buffer at guest address {address:#x} ({len_bytes} bytes, head {head}) is outside guest memory")]
    BufferOutsideMemory {
        /// Head of the chain.
        head: u16,
        /// Guest-physical address.
        address: u64,
        /// Length of the descriptor.
        len_bytes: u32,
    },
    /// A device-readable descriptor on rx, or a device-writable one on tx.
    #[error("descriptor of head {head} has the wrong direction for this queue")]
    WrongDirection {
        /// Head of the chain.
        head: u16,
    },
}

/// The kernel's answer to nothing that it was given: a received frame in a buffer that it did not have, or a completion of
/// what was not sent. Not the guest's doing, and nothing else that this socket says can be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel named {0:?}, which it did not have")]
pub(crate) struct UnknownAnswer(pub UmemAddr);

/// How a burst ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BurstError {
    /// The guest's doing.
    #[error(transparent)]
    Fault(#[from] QueueFault),
    /// The kernel's, or its driver's.
    #[error(transparent)]
    Unknown(#[from] UnknownAnswer),
}

/// A system call failed, or the host cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{attempted} ({name}): {advice}", name = errno_name(*.errno))]
pub struct HostError {
    /// The error number.
    pub errno: i32,
    /// What was attempted, on what: `cannot bind AF_XDP socket to interface 5 queue 3`.
    pub attempted: String,
    /// What to try.
    pub advice: &'static str,
}

impl HostError {
    /// Wraps the calling thread's `errno`.
    pub fn last(attempted: impl Into<String>, advice: impl FnOnce(i32) -> &'static str) -> Self {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self::new(errno, attempted, advice(errno))
    }

    /// An error of ours that fits an error number.
    pub fn new(errno: i32, attempted: impl Into<String>, advice: &'static str) -> Self {
        Self { errno, attempted: attempted.into(), advice }
    }
}

/// Anything that an engine operation can end with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest's driver.
    #[error(transparent)]
    Fault(#[from] QueueFault),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The request itself cannot be met, or not in this state.
    #[error("{0}")]
    Refused(String),
}

/// The symbol of an error number, as the manual pages spell it.
pub fn errno_name(errno: i32) -> String {
    let known = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENOSPC => "ENOSPC",
        libc::ENXIO => "ENXIO",
        libc::EMFILE => "EMFILE",
        libc::ENOTSUP => "EOPNOTSUPP",
        libc::E2BIG => "E2BIG",
        libc::ENFILE => "ENFILE",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::ENETDOWN => "ENETDOWN",
        libc::ENOBUFS => "ENOBUFS",
        libc::EPROTONOSUPPORT => "EPROTONOSUPPORT",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        _ => return format!("errno {errno}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests;
