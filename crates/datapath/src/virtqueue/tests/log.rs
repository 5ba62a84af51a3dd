use std::sync::Arc;

use super::{guest, raw};
use crate::fd::EventFd;
use crate::fixture::{dirty_log, marked, was_signalled, write_log};
use crate::guest_memory::DirtyLog;
use crate::virtqueue::{Logged, SplitQueue, WriteLog};

const SIZE: u16 = 1024;
/// Where the used ring is logged: five bytes in front of a page's end.
const LOGGED_AT: u64 = 0x4ffb;

/// A queue of three pages of used ring whose next used entry is `index`, and the log of its writes.
fn logged(event_idx: bool, index: u16) -> (SplitQueue, Arc<DirtyLog>) {
    let (_, mut queue) = raw(&guest(), SIZE, event_idx, index);
    let log = dirty_log(0x1_0000);
    queue.set_log(Some(write_log(&log, LOGGED_AT)));
    (queue, log)
}

#[test]
fn test_used_entries_and_index_are_marked_once_they_are_published() {
    let (mut queue, log) = logged(false, 600);
    queue.push_used(1, 0);
    assert!(marked(&log, 16).is_empty(), "nothing is visible yet");
    queue.publish_used();
    // Entry 600 is 4804 bytes into the ring, the index 2.
    assert_eq!(marked(&log, 16), [4, 6]);
    queue.publish_used();
    assert!(marked(&log, 16).is_empty());
}

#[test]
fn test_used_entries_that_wrap_around_are_all_marked() {
    let (mut queue, log) = logged(false, 1023);
    (0..130).for_each(|head| queue.push_used(head, 0));
    queue.publish_used();
    assert_eq!(marked(&log, 16), [4, 5, 6], "the last entry, the index, and more than a hundred from the first on");
}

#[test]
fn test_more_used_entries_than_the_ring_holds_mark_all_of_it() {
    let (mut queue, log) = logged(false, 7);
    (0..SIZE + 5).for_each(|_| queue.push_used(0, 0));
    queue.publish_used();
    assert_eq!(marked(&log, 16), [4, 5, 6]);
}

#[test]
fn test_wishes_for_kicks_are_marked() {
    let (mut queue, log) = logged(false, 0);
    queue.disable_kicks();
    assert_eq!(marked(&log, 16), [4], "flags");
    queue.enable_kicks().unwrap();
    assert_eq!(marked(&log, 16), [4]);
    let (mut queue, log) = logged(true, 0);
    queue.disable_kicks();
    assert!(marked(&log, 16).is_empty(), "nothing is written");
    queue.enable_kicks().unwrap();
    assert_eq!(marked(&log, 16), [6, 7], "avail_event, 8196 bytes into the ring, lies across two pages");
}

#[test]
fn test_what_was_not_asked_for_is_not_marked() {
    let guest = guest();
    for (logged, expected) in [
        (Logged { buffers: true, ..Logged::default() }, [0].as_slice()),
        (Logged { buffers: false, used_ring: Some(crate::guest_memory::GuestPhysAddr(0x3000)) }, &[3]),
    ] {
        let (_, mut queue) = raw(&guest, 4, false, 0);
        let log = dirty_log(0x1_0000);
        queue.set_log(Some(WriteLog { log: Arc::clone(&log), logged, notify: None }));
        queue.log_buffer(guest.umem(0x10), 4);
        queue.push_used(0, 0);
        queue.publish_used();
        assert_eq!(marked(&log, 16), expected);
    }
}

#[test]
fn test_logging_goes_to_another_log_and_ends() {
    let (mut queue, old) = logged(false, 0);
    let new = dirty_log(0x1_0000);
    for (log, to_old, to_new) in [(Some(write_log(&new, 0x2000)), vec![], vec![2]), (None, vec![], vec![])] {
        queue.set_log(log);
        queue.push_used(0, 0);
        queue.publish_used();
        assert_eq!((marked(&old, 16), marked(&new, 16)), (to_old, to_new));
    }
}

#[test]
fn test_the_front_end_is_told_of_marks() {
    let (_, mut queue) = raw(&guest(), 4, false, 0);
    let notify = Arc::new(EventFd::new().unwrap());
    queue.set_log(Some(WriteLog { notify: Some(Arc::clone(&notify)), ..write_log(&dirty_log(0x1_0000), 0) }));
    assert!(!was_signalled(&notify));
    queue.push_used(0, 0);
    queue.publish_used();
    assert!(was_signalled(&notify));
}
