//! Owned file descriptors.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::error::HostError;

/// A new descriptor for the same file; the old one stays its owner's.
///
/// # Errors
/// The process has too many, or `fd` is none.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, HostError> {
    // SAFETY: fcntl only makes a new descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(HostError::last(format!("cannot duplicate file descriptor {fd}"), |_| "raise ulimit -n"));
    }
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// An eventfd: the front-end's, or our own.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes a duplicate of `fd`.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn duplicate(fd: RawFd) -> Result<Self, HostError> {
        duplicate(fd).map(Self)
    }

    /// A new eventfd, non-blocking.
    ///
    /// # Errors
    /// No descriptor can be made.
    pub fn new() -> Result<Self, HostError> {
        // SAFETY: eventfd only makes a new descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(HostError::last("cannot make an eventfd", |_| "raise ulimit -n"));
        }
        // SAFETY: a new descriptor that nothing else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The descriptor.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Adds one. A full counter is a pending notification already, so EAGAIN needs no answer; a front-end that passed
    /// something else than an eventfd loses its own notifications.
    #[inline]
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes of ours.
        let _written = unsafe { libc::write(self.raw(), (&raw const one).cast(), 8) };
    }

    /// Sets it to zero. Called only when poll said that it is readable, so it does not block.
    #[inline]
    pub fn clear(&self) {
        let mut count = 0u64;
        // SAFETY: reads at most 8 bytes into ours.
        let _read = unsafe { libc::read(self.raw(), (&raw mut count).cast(), 8) };
    }
}
