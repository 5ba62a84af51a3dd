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
    /// Takes a duplicate of a front-end's eventfd and makes it non-blocking: no front-end may hold a pump thread up.
    ///
    /// # Errors
    /// EINVAL if it is no eventfd, whose events could not be told from a hang-up; too many descriptors are open.
    pub fn duplicate(fd: RawFd) -> Result<Self, HostError> {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        if link.as_os_str() != "anon_inode:[eventfd]" {
            let what = format!("cannot use file descriptor {fd} ({}) for notifications", link.display());
            return Err(HostError::new(
                libc::EINVAL,
                what,
                "the front-end has to send eventfds for kick, call and err",
            ));
        }
        let copy = duplicate(fd)?;
        // SAFETY: changes a flag of an open file, no memory.
        let flags = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(HostError::last(format!("cannot make eventfd {fd} non-blocking"), |_| "see the kernel's log"));
        }
        Ok(Self(copy))
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

    /// Adds one. A full counter is a pending notification already, so EAGAIN needs no answer.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn blocking_eventfd(value: u64) -> OwnedFd {
        // SAFETY: eventfd only makes a new descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: writes 8 bytes of ours.
        assert_eq!(unsafe { libc::write(fd, (&raw const value).cast(), 8) }, 8);
        // SAFETY: a new descriptor that nothing else owns.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    #[test]
    fn test_a_full_or_empty_blocking_eventfd_of_the_front_end_does_not_hold_us_up() {
        let full = blocking_eventfd(u64::MAX - 1);
        let event = EventFd::duplicate(full.as_raw_fd()).unwrap();
        event.signal();
        event.clear();
        event.clear();
    }

    #[test]
    fn test_what_is_no_eventfd_is_refused_by_name() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = EventFd::duplicate(file.as_raw_fd()).unwrap_err();
        assert_eq!(error.errno, libc::EINVAL);
        assert!(error.to_string().contains("/dev/null"), "{error}");
    }
}
