//! Both sides at once, each asleep whenever it may be: a lost wake-up shows as a sleep that does not end.

use std::time::Duration;

use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
use mpassthru_testing::memory::GuestPhysAddr;

use crate::fd::EventFd;
use crate::fixture::Guest;
use crate::virtqueue::SplitQueue;

const ROUNDS: u32 = 4000;
const DEADLINE: Duration = Duration::from_secs(10);

fn wait(fd: &EventFd, who: &str) {
    let mut polled = libc::pollfd { fd: fd.raw(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    let ready = unsafe { libc::poll(&raw mut polled, 1, DEADLINE.as_millis() as i32) };
    assert_eq!(ready, 1, "{who} sleeps although there is work");
    fd.clear();
}

fn run_device(mut queue: SplitQueue, kick: &EventFd, call: &EventFd) {
    let mut left = ROUNDS;
    while left > 0 {
        let count = queue.available().unwrap();
        for _ in 0..count {
            let head = queue.take_head().unwrap().head;
            queue.push_used(head, 1);
        }
        left -= u32::from(count);
        queue.publish_used();
        if queue.should_call() {
            call.signal();
        }
        if left > 0 && count == 0 && !queue.enable_kicks().unwrap() {
            wait(kick, "the device");
            queue.disable_kicks();
        }
    }
}

fn run_driver(mut driver: SplitDriver, kick: &EventFd, call: &EventFd) {
    let buffer = Segment::writable(GuestPhysAddr(0x8000), 1);
    let (mut added, mut returned) = (0, 0);
    while returned < ROUNDS {
        while added < ROUNDS && driver.add(&[buffer]).is_ok() {
            added += 1;
        }
        if driver.publish() {
            kick.signal();
        }
        while let Some(used) = driver.pop_used() {
            driver.release(used.unwrap().head);
            returned += 1;
        }
        let is_full = driver.free_descriptors() == 0 || added == ROUNDS;
        if returned < ROUNDS && is_full && driver.enable_notifications(1) {
            wait(call, "the driver");
            driver.disable_notifications();
        }
    }
    assert_eq!(driver.outstanding(), 0);
}

fn race(event_idx: bool) {
    let guest = Guest::of_pages(16);
    let (driver, queue) = guest.queue(RingLayout::contiguous(GuestPhysAddr(0), 4), event_idx);
    let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| run_device(queue, &kick, &call));
        run_driver(driver, &kick, &call);
    });
}

#[test]
fn test_no_race_loses_a_wake_up_with_event_idx() {
    race(true);
}

#[test]
fn test_no_race_loses_a_wake_up_with_flags() {
    race(false);
}
