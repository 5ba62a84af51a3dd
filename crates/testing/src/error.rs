//! What can go wrong in the testing tools: the kernel refused something, or the configuration makes no sense.

use std::fmt;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the testing tools; `Display` is one line that says what was attempted, on what, and what to try.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} ({}): {}", errno_name(*errno), advice(*errno))]
    System {
        /// What was attempted, and on what.
        action: String,
        /// The errno of the failed call.
        errno: i32,
    },
    /// What was asked for cannot work.
    #[error("{0}")]
    Config(String),
}

impl Error {
    /// The current thread's errno, as an error of `action`.
    pub(crate) fn last_os(action: impl fmt::Display) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        Self::os(action, errno)
    }

    /// `errno` as an error of `action`.
    pub(crate) fn os(action: impl fmt::Display, errno: i32) -> Self {
        Self::System { action: action.to_string(), errno }
    }

    pub(crate) fn config(message: impl fmt::Display) -> Self {
        Self::Config(message.to_string())
    }
}

/// Turns the -1 of a system call into an [`Error`] that names `action`.
pub(crate) fn check<T: PartialEq + From<i8>>(result: T, action: impl FnOnce() -> String) -> Result<T> {
    if result == T::from(-1) { Err(Error::last_os(action())) } else { Ok(result) }
}

fn errno_name(errno: i32) -> String {
    let name = match errno {
        libc::EACCES => "EACCES",
        libc::EBUSY => "EBUSY",
        libc::EINVAL => "EINVAL",
        libc::EMFILE => "EMFILE",
        libc::ENODEV => "ENODEV",
        libc::ENOMEM => "ENOMEM",
        libc::ENOTSUP => "EOPNOTSUPP",
        libc::ENXIO => "ENXIO",
        libc::EPERM => "EPERM",
        _ => return std::io::Error::from_raw_os_error(errno).to_string(),
    };
    name.to_string()
}

fn advice(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => "run as root, or with CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF and CAP_PERFMON",
        libc::ENODEV | libc::ENXIO => "is the interface in this network namespace?",
        libc::EBUSY => "is another XDP program there?",
        libc::ENOMEM => "is there memory enough, and are hugepages reserved if they are asked for?",
        libc::EMFILE => "raise the limit of open files",
        libc::EINVAL => "does the interface exist, in this network namespace, and can the kernel do this?",
        libc::ENOTSUP => "the kernel or the driver cannot do this",
        _ => "see the kernel's log",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_message_names_action_errno_and_advice() {
        let message = Error::os("attach XDP to ifindex 4", libc::EPERM).to_string();
        assert!(message.starts_with("cannot attach XDP to ifindex 4 (EPERM): run as root"), "{message}");
    }
}
