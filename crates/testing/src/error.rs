//! What can go wrong in the testing tools: the kernel refused something, or the configuration makes no sense.

use std::fmt;

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the testing tools; `Display` is one line that says what was attempted, on what, and what to try.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action}: {}{}", std::io::Error::from_raw_os_error(*errno), advice(*errno))]
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

fn advice(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => "; run as root, or with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF",
        libc::ENODEV => "; is the interface in this network namespace?",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_message_names_action_errno_and_advice() {
        let message = Error::os("attach XDP to ifindex 4", libc::EPERM).to_string();
        assert!(message.starts_with("cannot attach XDP to ifindex 4: "), "{message}");
        assert!(message.contains("os error 1") && message.contains("CAP_NET_ADMIN"), "{message}");
    }
}
