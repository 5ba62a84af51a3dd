use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use mpassthru_testing::memory::RegionConfig;

use crate::fixture::{Guest, dirty_log, marked, memfd};
use crate::guest_memory::{DirtyLog, FileSpec, GuestPhysAddr};

fn mark(log: &DirtyLog, start: u64, len_bytes: u64) -> Vec<u64> {
    log.mark(GuestPhysAddr(start), len_bytes);
    marked(log, 64)
}

fn errno(fd: RawFd, offset: u64, size_bytes: u64) -> i32 {
    DirtyLog::map(&FileSpec { fd, offset, size_bytes }).unwrap_err().errno
}

#[test]
fn test_every_page_of_a_range_is_marked_and_no_other() {
    let log = dirty_log(64 * 4096);
    assert_eq!(mark(&log, 0, 1), [0]);
    assert_eq!(mark(&log, 4095, 1), [0]);
    assert_eq!(mark(&log, 4095, 2), [0, 1]);
    assert_eq!(mark(&log, 7 * 4096, 3 * 4096), [7, 8, 9]);
    assert_eq!(mark(&log, 63 * 4096 + 4095, 1), [63]);
    assert!(mark(&log, 12345, 0).is_empty());
}

#[test]
fn test_bits_are_where_the_front_end_looks_for_them() {
    let file = memfd("log", 4096);
    let log = DirtyLog::map(&FileSpec { fd: file.as_raw_fd(), offset: 1001, size_bytes: 3 }).unwrap();
    log.mark(GuestPhysAddr(11 * 4096), 1);
    log.mark(GuestPhysAddr(8 * 4096), 1);
    let mut bytes = [0u8; 5];
    // SAFETY: the buffer is valid for its length.
    let read = unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 1000) };
    assert_eq!((read, bytes), (5, [0, 0, 0b1001, 0, 0]));
}

#[test]
fn test_pages_that_the_log_has_no_room_for_are_left_out() {
    let file = memfd("log", 4096);
    let log = DirtyLog::map(&FileSpec { fd: file.as_raw_fd(), offset: 0, size_bytes: 2 }).unwrap();
    assert_eq!(mark(&log, 15 * 4096, 100 * 4096), [15]);
    assert!(mark(&log, 16 * 4096, 1).is_empty());
    assert!(mark(&log, u64::MAX - 1, 100).is_empty());
}

#[test]
fn test_a_log_covers_memory_whose_last_page_it_has_a_bit_for() {
    let guest = Guest::new(&[RegionConfig::memfd(0, 4096), RegionConfig::memfd(8 * 4096, 8 * 4096)]);
    assert!(dirty_log(16 * 4096).covers(&guest.memory));
    assert!(!dirty_log(8 * 4096).covers(&guest.memory));
    dirty_log(16 * 4096).mark_all(&guest.memory);
    let log = dirty_log(16 * 4096);
    log.mark_all(&guest.memory);
    assert_eq!(marked(&log, 16), [0, 8, 9, 10, 11, 12, 13, 14, 15]);
}

#[test]
fn test_logs_that_cannot_be_marked_without_harm_are_refused() {
    let file = memfd("log", 4096);
    let fd = file.as_raw_fd();
    for (offset, size_bytes) in [(0, 0), (0, 4097), (4096, 1), (4000, 97), (u64::MAX, 2), (0, u64::MAX)] {
        assert_eq!(errno(fd, offset, size_bytes), libc::EINVAL, "{size_bytes} bytes at {offset}");
    }
    let program = File::open("/proc/self/exe").unwrap();
    assert_eq!(errno(program.as_raw_fd(), 0, 8), libc::EFAULT, "a page fault in a file system may take for ever");
    let (pipe, _other_end) = std::io::pipe().unwrap();
    assert_eq!(errno(pipe.as_raw_fd(), 0, 8), libc::EFAULT, "no file");
    assert_eq!(errno(-1, 0, 8), libc::EBADF);
    let read_only = File::open(format!("/proc/self/fd/{fd}")).unwrap();
    assert_eq!(errno(read_only.as_raw_fd(), 0, 8), libc::EACCES);
}

#[test]
fn test_a_log_that_is_sealed_against_writing_is_refused() {
    // SAFETY: the name is NUL-terminated and lives through the call.
    let fd = unsafe { libc::memfd_create(c"log".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    // SAFETY: a descriptor of ours; it is left to the end of the process.
    unsafe {
        assert_eq!(libc::ftruncate(fd, 4096), 0);
        assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK), 0);
    }
    assert!(DirtyLog::map(&FileSpec { fd, offset: 0, size_bytes: 8 }).is_ok(), "as QEMU seals it");
    // SAFETY: as above; no mapping of it is left.
    unsafe { assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE), 0) };
    assert_eq!(errno(fd, 0, 8), libc::EPERM);
}
