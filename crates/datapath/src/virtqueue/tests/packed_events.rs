//! Notifications of a packed virtqueue: no interleaving of the two sides' steps leaves a buffer that nobody looks at.

use std::time::Duration;

use mpassthru_testing::driver::{PackedDriver, RawPackedRing, RingLayout, Segment, packed_flags};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::guest;
use crate::fd::EventFd;
use crate::fixture::{Guest, cases};
use crate::virtqueue::{Direction, PackedQueue};

const BUFFER: Segment = Segment { address: GuestPhysAddr(0x8000), len: 8, writable: true };

fn pair(guest: &Guest, size: u16, event_idx: bool) -> (PackedDriver, PackedQueue) {
    guest.packed_queue(RingLayout::packed(GuestPhysAddr(0x1000), size), event_idx)
}

fn take(queue: &mut PackedQueue) -> Option<u16> {
    let taken = queue.take(Direction::DeviceWrites, &mut 0, &mut Vec::with_capacity(64)).unwrap();
    taken.map(|taken| taken.head)
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver adds chains of this many descriptors, and publishes them; told to kick, it does.
    Post(u16, u16),
    /// The device takes up to so many.
    Take(u16),
    /// Something wakes the device: it uses some of what it took, and shows them at once.
    Use(u16),
    /// The device asks whether to call.
    Ask,
    /// The device asks for kicks and, if nothing is new, sleeps; kicked, it wakes up and asks for none.
    Sleep,
    /// The driver, awake, takes what is used.
    Pop,
    /// The driver asks for a call when this many more descriptors are used and, if they are not, sleeps.
    Wait(u16),
}

/// Both sides, each with its own eventfd.
struct Model {
    driver: PackedDriver,
    queue: PackedQueue,
    taken: Vec<u16>,
    kicked: bool,
    called: bool,
    asked: bool,
    device_sleeps: bool,
    driver_sleeps: bool,
    /// The device has room for no more chains; if there are, that is no news to it.
    is_full: bool,
}

impl Model {
    fn step(&mut self, step: Step) {
        match step {
            Step::Post(count, length) if !self.driver_sleeps => {
                for _ in 0..count {
                    let _full = self.driver.add(&vec![BUFFER; usize::from(length)]);
                }
                self.kicked |= self.driver.publish();
            }
            Step::Take(count) if !self.device_sleeps => {
                let room = usize::from(count).saturating_sub(self.taken.len());
                self.is_full = room == 0 || self.queue.available() > 0;
                for _ in 0..room {
                    let Some(id) = take(&mut self.queue) else {
                        self.is_full = false;
                        break;
                    };
                    self.taken.push(id);
                }
                self.queue.available();
            }
            Step::Use(count) => {
                let count = usize::from(count).min(self.taken.len());
                self.device_sleeps &= count == 0;
                self.is_full &= count == 0;
                self.taken.drain(..count).for_each(|id| self.queue.push_used(id, 0));
                self.queue.publish_used();
                self.asked &= count == 0;
            }
            Step::Ask => {
                self.called |= self.queue.should_call();
                self.asked = true;
            }
            Step::Sleep if self.device_sleeps => {
                if std::mem::take(&mut self.kicked) {
                    self.device_sleeps = false;
                    self.queue.disable_kicks();
                }
            }
            Step::Sleep => {
                let knows_of_more = self.queue.available() > 0 && !self.is_full;
                self.device_sleeps = !self.queue.enable_kicks() && !knows_of_more;
            }
            Step::Pop => {
                if self.driver_sleeps && !std::mem::take(&mut self.called) {
                    return;
                }
                self.driver_sleeps = false;
                self.driver.disable_notifications();
                while let Some(used) = self.driver.pop_used() {
                    self.driver.release(used.unwrap().head);
                }
            }
            Step::Wait(descriptors) if !self.driver_sleeps && self.driver.outstanding() > 0 => {
                self.driver_sleeps = self.driver.enable_notifications(descriptors);
            }
            Step::Post(..) | Step::Take(_) | Step::Wait(_) => {}
        }
    }

    /// The device sleeps on chains that it has not seen, and no kick is on its way.
    fn is_kick_lost(&mut self) -> bool {
        self.device_sleeps && !self.kicked && !self.is_full && self.queue.available() > 0
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u16..4, 1u16..3).prop_map(|(count, length)| Step::Post(count, length)),
        4 => (1u16..5).prop_map(Step::Take),
        4 => (1u16..5).prop_map(Step::Use),
        4 => Just(Step::Ask),
        4 => Just(Step::Sleep),
        3 => Just(Step::Pop),
        3 => (1u16..4).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(cases(768))]

    #[test]
    fn test_no_interleaving_loses_a_kick_or_a_call(
        event_idx: bool, size in 1u16..12, steps in prop::collection::vec(step(), 1..150),
    ) {
        let guest = guest();
        let (driver, queue) = pair(&guest, size, event_idx);
        let mut model = Model {
            driver, queue, taken: Vec::new(), kicked: false, called: false, asked: true,
            device_sleeps: false, driver_sleeps: false, is_full: false,
        };
        for step in steps {
            model.step(step);
            prop_assert!(!model.is_kick_lost(), "after {:?}", step);
        }
        // Whoever sleeps is woken by what the other does until nothing is left to do.
        for round in 0..64 {
            for step in [Step::Sleep, Step::Take(64), Step::Use(64), Step::Ask, Step::Pop] {
                model.step(step);
            }
            prop_assert!(!model.is_kick_lost());
            if model.driver.outstanding() == 0 {
                break;
            }
            prop_assert!(round < 63, "{} buffers are left, and everybody sleeps", model.driver.outstanding());
        }
    }

    #[test]
    fn test_with_event_idx_a_call_is_for_a_slot_that_was_used_since_the_last_question(
        size in 1u16..9, bursts in prop::collection::vec((0u16..9, 0u16..20), 1..40),
    ) {
        let guest = guest();
        let (mut driver, mut queue) = pair(&guest, size, true);
        let bits = |position: u64| {
            let (lap, index) = (position / u64::from(size), position % u64::from(size));
            index as u16 | if lap.is_multiple_of(2) { 0x8000 } else { 0 }
        };
        let mut used = 0u64;
        for (count, ahead) in bursts {
            // Up to two laps from here; of those that were used just now, none is in the future.
            let event = used + u64::from(ahead) % (2 * u64::from(size));
            driver.ring().set_driver_event(bits(event), packed_flags::RING_EVENT_FLAGS_DESC);
            let count = count.min(size);
            for _ in 0..count {
                driver.add(&[BUFFER]).unwrap();
            }
            driver.publish();
            while let Some(id) = take(&mut queue) {
                queue.push_used(id, 0);
            }
            queue.publish_used();
            let passed = (used..used + u64::from(count)).any(|position| position == event);
            prop_assert_eq!(queue.should_call(), passed, "{} used from {}, event {}", count, used, event);
            prop_assert!(!queue.should_call(), "one call for one burst");
            used += u64::from(count);
            while let Some(popped) = driver.pop_used() {
                driver.release(popped.unwrap().head);
            }
        }
    }
}

#[test]
fn test_flags_of_the_driver_are_honoured_and_the_reserved_value_means_enabled() {
    let guest = guest();
    for event_idx in [false, true] {
        for (flags, wanted) in [(0u16, true), (1, false), (2, !event_idx), (3, true), (0xfffd, false)] {
            let (mut driver, mut queue) = pair(&guest, 8, event_idx);
            driver.ring().set_driver_event(5, flags);
            driver.add(&[BUFFER]).unwrap();
            driver.publish();
            assert!(!queue.should_call(), "nothing was used");
            let id = take(&mut queue).unwrap();
            queue.push_used(id, 0);
            assert!(!queue.should_call(), "not published yet");
            queue.publish_used();
            assert_eq!(queue.should_call(), wanted, "flags {flags}, event idx {event_idx}");
        }
    }
}

#[test]
fn test_the_device_says_which_kicks_it_wants() {
    let guest = guest();
    let event = |ring: &RawPackedRing| ring.device_event();
    let (mut driver, mut queue) = pair(&guest, 4, true);
    let post = |driver: &mut PackedDriver, count| {
        assert!((0..count).all(|_| driver.add(&[BUFFER]).is_ok()));
        driver.publish();
    };
    queue.disable_kicks();
    assert_eq!(event(driver.ring()), (0x7fff, packed_flags::RING_EVENT_FLAGS_DISABLE));
    assert!(!queue.enable_kicks());
    assert_eq!(event(driver.ring()), (0x8000, packed_flags::RING_EVENT_FLAGS_DESC));
    post(&mut driver, 2);
    assert!(queue.enable_kicks(), "two are there");
    assert!(!queue.enable_kicks(), "which is known by now");
    take(&mut queue).unwrap();
    assert!(queue.enable_kicks(), "the second is news after the first was taken");
    take(&mut queue).unwrap();
    assert!(!queue.enable_kicks());
    assert_eq!(event(driver.ring()), (0x8002, packed_flags::RING_EVENT_FLAGS_DESC));
    let (plain, mut queue) = pair(&guest, 4, false);
    queue.enable_kicks();
    assert_eq!(event(plain.ring()), (0x7fff, packed_flags::RING_EVENT_FLAGS_ENABLE), "never all zeros");
}

const ROUNDS: u32 = 4000;
const DEADLINE: Duration = Duration::from_secs(10);

fn wait(fd: &EventFd, who: &str) {
    let mut polled = libc::pollfd { fd: fd.raw(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    let ready = unsafe { libc::poll(&raw mut polled, 1, DEADLINE.as_millis() as i32) };
    assert_eq!(ready, 1, "{who} sleeps although there is work");
    fd.clear();
}

fn run_device(mut queue: PackedQueue, kick: &EventFd, call: &EventFd) {
    let mut left = ROUNDS;
    while left > 0 {
        let mut count = 0;
        while let Some(id) = take(&mut queue) {
            queue.push_used(id, 1);
            count += 1;
        }
        left -= count;
        queue.publish_used();
        if queue.should_call() {
            call.signal();
        }
        if left > 0 && count == 0 && !queue.enable_kicks() {
            wait(kick, "the device");
            queue.disable_kicks();
        }
    }
}

fn run_driver(mut driver: PackedDriver, kick: &EventFd, call: &EventFd) {
    let (mut added, mut returned) = (0, 0);
    while returned < ROUNDS {
        while added < ROUNDS && driver.add(&[BUFFER]).is_ok() {
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

#[test]
fn test_no_race_loses_a_wake_up() {
    let guest = Guest::of_pages(16);
    for (size, event_idx) in [(4, true), (4, false), (3, true), (1, true)] {
        let (driver, queue) = pair(&guest, size, event_idx);
        let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| run_device(queue, &kick, &call));
            run_driver(driver, &kick, &call);
        });
    }
}

#[test]
fn test_chains_that_were_given_back_for_want_of_others_hear_of_the_next_one() {
    for (event_idx, comes_before) in [(false, false), (false, true), (true, false), (true, true)] {
        let guest = guest();
        let (mut driver, mut queue) = pair(&guest, 8, event_idx);
        // So that the wrap counters differ.
        for _ in 0..6 {
            driver.add(&[BUFFER]).unwrap();
        }
        driver.publish();
        (0..6).for_each(|_| take(&mut queue).map(|id| queue.push_used(id, 0)).unwrap());
        queue.publish_used();
        while let Some(used) = driver.pop_used() {
            driver.release(used.unwrap().head);
        }
        let post = |driver: &mut PackedDriver| {
            driver.add(&[BUFFER]).unwrap();
            driver.publish()
        };
        queue.disable_kicks();
        (0..3).for_each(|_| assert!(!post(&mut driver)));
        assert_eq!(queue.available(), 8, "as many as there may be");
        let taken: Vec<_> = (0..3)
            .map(|_| queue.take(Direction::DeviceWrites, &mut 0, &mut Vec::with_capacity(4)).unwrap().unwrap())
            .collect();
        assert_eq!(take(&mut queue), None);
        taken.into_iter().rev().for_each(|taken| queue.untake(taken));
        if comes_before {
            post(&mut driver);
        }
        assert_eq!(queue.enable_kicks(), comes_before);
        assert!(comes_before || post(&mut driver), "the device is to be kicked");
    }
}
