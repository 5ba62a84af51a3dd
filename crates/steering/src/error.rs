//! The one error of this crate: a system call that the kernel refused.

use std::error::Error;
use std::io;

/// What was attempted, on what, the errno, and what to try; one line.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SteeringError {
    errno: i32,
    message: String,
}

impl SteeringError {
    /// `operation` says what was attempted and on what ("attach the XDP program to eth0"), `advice` what to try.
    pub(crate) fn new(errno: i32, operation: &str, advice: &str) -> Self {
        let name = errno_name(errno);
        Self { errno, message: format!("cannot {operation} ({name}): {advice}") }
    }

    /// The errno of the refused call, for an `OSError`.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

/// The errno that an error of aya carries somewhere in its chain; `EINVAL` where no system call was made.
pub(crate) fn errno_of(error: &(dyn Error + 'static)) -> i32 {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return errno;
        }
        cause = error.source();
    }
    libc::EINVAL
}

pub(crate) fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// The names of the errors that the calls of this crate can end with.
fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::E2BIG => "E2BIG",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::EMFILE => "EMFILE",
        libc::ENOSPC => "ENOSPC",
        libc::ERANGE => "ERANGE",
        libc::ENOTSOCK => "ENOTSOCK",
        libc::ENOPROTOOPT => "ENOPROTOOPT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ENOBUFS => "ENOBUFS",
        _ => return format!("errno {errno}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_operation_errno_and_advice() {
        let error = SteeringError::new(libc::EBUSY, "attach the XDP program to eth0", "detach program 7");
        assert_eq!(error.to_string(), "cannot attach the XDP program to eth0 (EBUSY): detach program 7");
        assert_eq!(error.errno(), libc::EBUSY);
    }

    #[test]
    fn errno_is_found_below_a_wrapping_error() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert_eq!(errno_of(&Outer(io::Error::from_raw_os_error(libc::EPERM))), libc::EPERM);
        assert_eq!(errno_of(&Outer(io::Error::other("no errno"))), libc::EINVAL);
    }
}
