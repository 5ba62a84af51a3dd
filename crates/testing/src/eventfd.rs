//! An eventfd: kicks, calls and the wake-up of our own threads.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result, check};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Makes one with count 0.
    ///
    /// # Errors
    /// [`Error::System`], usually for want of file descriptors.
    pub fn new() -> Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(fd, || "make an eventfd".to_string())?;
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one, which wakes whoever waits.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is eight readable bytes. The only failure is a counter about to overflow (EAGAIN): the reader
        // has been woken 2^64 - 2 times then.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Takes the count, back to 0.
    #[must_use]
    pub fn take(&self) -> u64 {
        let mut count = [0u8; 8];
        // SAFETY: `count` has room for eight bytes. EAGAIN leaves it 0, which is the answer then.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        u64::from_ne_bytes(count)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until one of `fds` is readable or `timeout` passes (`None`: no limit).
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<std::time::Duration>) -> Result<()> {
    const WAIT_MAX: usize = 4;
    let mut entries = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; WAIT_MAX];
    for (entry, fd) in entries[..fds.len()].iter_mut().zip(fds) {
        entry.fd = fd.as_raw_fd();
    }
    let timeout = timeout.map(|limit| libc::timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: i64::from(limit.subsec_nanos()),
    });
    let limit = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `entries` and `limit` live through the call; no signal mask is given.
    let ready = unsafe { libc::ppoll(entries.as_mut_ptr(), fds.len() as libc::nfds_t, limit, std::ptr::null()) };
    match check(ready, || "wait for an eventfd or socket".to_string()) {
        Err(Error::System { errno: libc::EINTR, .. }) => Ok(()),
        other => other.map(|_| ()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn test_signals_add_up_until_taken() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.take(), 0);
        event.signal();
        event.signal();
        wait_readable(&[event.as_fd()], None).unwrap();
        assert_eq!((event.take(), event.take()), (2, 0));
        wait_readable(&[event.as_fd()], Some(Duration::from_millis(1))).unwrap();
    }
}
