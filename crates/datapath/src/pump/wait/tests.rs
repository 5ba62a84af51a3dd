use std::time::{Duration, Instant};

use super::{PollMode, SPIN_MAX, SPIN_MIN, Spin, sleep};
use crate::fd::EventFd;

#[test]
fn test_both_ends_of_the_scale_are_fixed() {
    let (mut busy, mut interrupt) = (Spin::new(PollMode::Busy), Spin::new(PollMode::Interrupt));
    for _ in 0..3 {
        assert!(busy.look_again());
        assert!(!interrupt.look_again());
        interrupt.slept();
        interrupt.worked();
    }
}

#[test]
fn test_adaptive_polling_ends_within_its_budget() {
    let mut spin = Spin::new(PollMode::Adaptive);
    let start = Instant::now();
    assert!(spin.look_again(), "at least once");
    while spin.look_again() {}
    assert!(start.elapsed() >= SPIN_MIN);
}

#[test]
fn test_the_budget_grows_while_polling_pays_and_shrinks_while_it_does_not() {
    let mut spin = Spin::new(PollMode::Adaptive);
    for _ in 0..20 {
        spin.look_again();
        spin.worked();
    }
    assert_eq!(spin.budget, SPIN_MAX);
    spin.worked();
    assert_eq!(spin.budget, SPIN_MAX, "work without idling says nothing");
    for _ in 0..20 {
        spin.look_again();
        spin.slept();
    }
    assert_eq!(spin.budget, SPIN_MIN);
    spin.worked();
    assert_eq!(spin.budget, SPIN_MIN, "work after a sleep was not found by polling");
}

#[test]
fn test_sleep_tells_which_descriptor_woke_it() {
    let (quiet, ready) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    ready.signal();
    assert_eq!(sleep([quiet.raw(), -1, ready.raw()], None), [false, false, true]);
    ready.clear();
    assert_eq!(sleep([quiet.raw(), -1, ready.raw()], Some(Duration::ZERO)), [false; 3]);
    let start = Instant::now();
    assert_eq!(sleep([-1], Some(Duration::from_millis(2))), [false]);
    assert!(start.elapsed() >= Duration::from_millis(2), "a timeout is honoured, also below a second");
}
