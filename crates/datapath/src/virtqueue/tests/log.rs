use std::sync::Arc;

use mpassthru_testing::driver::{PackedDriver, RingLayout, Segment};
use mpassthru_testing::memory::GuestPhysAddr;

use super::{guest, layout, raw};
use crate::fd::EventFd;
use crate::fixture::{dirty_log, marked, was_signalled, write_log};
use crate::guest_memory::DirtyLog;
use crate::virtqueue::{Direction, Logged, PackedQueue, SplitQueue, Virtqueue, WriteLog};

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

/// A packed queue of four pages of ring from page 1 on, whose wishes are logged as if they were at `LOGGED_AT`.
fn logged_packed() -> (PackedDriver, PackedQueue, Arc<DirtyLog>) {
    let guest = guest();
    let (driver, mut queue) = guest.packed_queue(RingLayout::packed(GuestPhysAddr(0x1000), SIZE), true);
    let log = dirty_log(0x1_0000);
    queue.set_log(Some(write_log(&log, LOGGED_AT)));
    (driver, queue, log)
}

/// Lets `count` buffers through, one chain of `length` each time, and publishes at the end.
fn pass(driver: &mut PackedDriver, queue: &mut PackedQueue, count: u16, length: usize) {
    let buffer = Segment::writable(GuestPhysAddr(0x8000), 1);
    for _ in 0..count {
        driver.add(&vec![buffer; length]).unwrap();
    }
    driver.publish();
    for _ in 0..count {
        let taken = queue.take(Direction::DeviceWrites, &mut 0, &mut Vec::with_capacity(4)).unwrap().unwrap();
        queue.push_used(taken.head, 0);
    }
    queue.publish_used();
    while let Some(used) = driver.pop_used() {
        driver.release(used.unwrap().head);
    }
}

#[test]
fn test_used_descriptors_of_a_packed_queue_are_marked_where_they_are() {
    let (mut driver, mut queue, log) = logged_packed();
    pass(&mut driver, &mut queue, 256, 1);
    assert_eq!(marked(&log, 16), [1], "a page has 256 descriptors");
    pass(&mut driver, &mut queue, 200, 3);
    assert_eq!(marked(&log, 16), [2, 3, 4], "from 256 up to 856");
    pass(&mut driver, &mut queue, 170, 1);
    assert_eq!(marked(&log, 16), [1, 4], "across the end");
    queue.publish_used();
    assert!(marked(&log, 16).is_empty());
}

#[test]
fn test_wishes_of_a_packed_queue_are_marked_where_the_front_end_says() {
    let (_driver, mut queue, log) = logged_packed();
    queue.disable_kicks();
    assert_eq!(marked(&log, 16), [4]);
    queue.enable_kicks();
    assert_eq!(marked(&log, 16), [4]);
}

#[test]
fn test_what_was_not_asked_for_is_not_marked() {
    let guest = guest();
    for (logged, expected) in [
        (Logged { buffers: true, ..Logged::default() }, [0].as_slice()),
        (Logged { buffers: false, used_ring: Some(crate::guest_memory::GuestPhysAddr(0x3000)) }, &[3]),
    ] {
        let config = guest.queue_config(&layout(4), false);
        let mut queue = Virtqueue::new(Arc::clone(&guest.memory), &config).unwrap();
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
