use super::{Error, HostError, QueueFault, errno_name};

#[test]
fn test_a_host_error_says_what_was_attempted_the_errno_and_what_to_try() {
    let error = HostError::new(libc::EBUSY, "cannot bind AF_XDP socket to interface 5 queue 3", "take another queue");
    let line = "cannot bind AF_XDP socket to interface 5 queue 3 (EBUSY): take another queue";
    assert_eq!(error.to_string(), line);
    assert_eq!(Error::from(error).to_string(), line, "wrapped, it says the same");
}

#[test]
fn test_the_threads_errno_is_kept_and_chooses_the_advice() {
    // SAFETY: closes nothing: -1 is no descriptor.
    assert_eq!(unsafe { libc::close(-1) }, -1);
    let error = HostError::last("cannot close", |errno| if errno == libc::EBADF { "right" } else { "wrong" });
    assert_eq!((error.errno, error.advice), (libc::EBADF, "right"));
}

#[test]
fn test_an_error_number_without_a_name_is_a_number() {
    assert_eq!(errno_name(libc::EOPNOTSUPP), "EOPNOTSUPP");
    assert_eq!(errno_name(4095), "errno 4095");
}

#[test]
fn test_every_message_is_one_line() {
    let faults = [
        QueueFault::BadSize { size: 3 },
        QueueFault::RingOutsideMemory { ring: "used ring", address: 1, len_bytes: 2 },
    ];
    for fault in faults {
        let message = Error::from(fault).to_string();
        assert!(!message.contains('\n') && !message.contains("  "), "{message}");
    }
}
