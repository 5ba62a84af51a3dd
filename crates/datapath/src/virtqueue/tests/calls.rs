//! Device → driver: no interleaving of the two sides' steps leaves a used buffer that nobody looks at.

use mpassthru_testing::driver::{RawRing, flags};
use proptest::prelude::*;

use super::{guest, raw};
use crate::fixture::cases;
use crate::virtqueue::SplitQueue;

const SIZE: u16 = 8;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The device uses this many buffers and stores the index once.
    Use(u16),
    /// The device asks whether to call.
    Ask,
    /// The driver, awake, takes what is used.
    Take,
    /// The driver, awake, says that it wants a call when this many more are used.
    Wish(u16),
    /// The driver, having wished, looks again and sleeps if less is there.
    Sleep,
    /// The driver wakes up if it was called.
    Wake,
}

struct Model {
    ring: RawRing,
    queue: SplitQueue,
    event_idx: bool,
    used_idx: u16,
    asked_at: u16,
    taken: u16,
    /// The number of buffers that the driver said it waits for.
    wish: Option<u16>,
    called: bool,
    asleep: bool,
}

impl Model {
    fn new(ring: RawRing, queue: SplitQueue, event_idx: bool, start: u16) -> Self {
        let indices = (start, start, start);
        let (used_idx, asked_at, taken) = indices;
        Self { ring, queue, event_idx, used_idx, asked_at, taken, wish: None, called: false, asleep: false }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Use(count) => {
                let room = SIZE - self.used_idx.wrapping_sub(self.taken);
                for _ in 0..count.min(room) {
                    self.queue.push_used(self.used_idx % SIZE, 0);
                    self.used_idx = self.used_idx.wrapping_add(1);
                }
                self.queue.publish_used();
            }
            Step::Ask => {
                self.called |= self.queue.should_call();
                self.asked_at = self.used_idx;
            }
            Step::Take if !self.asleep => {
                self.taken = self.ring.used_idx();
                self.wish = None;
                if !self.event_idx {
                    self.ring.set_avail_flags(flags::VIRTQ_AVAIL_F_NO_INTERRUPT);
                }
            }
            Step::Wish(count) if !self.asleep => {
                let count = if self.event_idx { count } else { 1 };
                if self.event_idx {
                    self.ring.set_used_event(self.taken.wrapping_add(count - 1));
                } else {
                    self.ring.set_avail_flags(0);
                }
                self.wish = Some(count);
            }
            Step::Sleep if !self.asleep => {
                self.asleep = self.wish.is_some_and(|count| self.ring.used_idx().wrapping_sub(self.taken) < count);
            }
            Step::Wake if self.asleep && self.called => {
                (self.called, self.asleep) = (false, false);
            }
            Step::Take | Step::Wish(_) | Step::Sleep | Step::Wake => {}
        }
    }

    /// Asleep although what the driver waits for is there, and no call is on its way or still to be decided.
    fn is_lost(&self) -> bool {
        let waiting = self.used_idx.wrapping_sub(self.taken);
        self.asleep && !self.called && self.asked_at == self.used_idx && self.wish.is_some_and(|count| waiting >= count)
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u16..5).prop_map(Step::Use),
        Just(Step::Ask),
        Just(Step::Take),
        (1u16..6).prop_map(Step::Wish),
        Just(Step::Sleep),
        Just(Step::Wake),
    ]
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_no_interleaving_loses_a_call(
        event_idx: bool,
        start in prop_oneof![Just(0u16), 65520u16..=65535, any::<u16>()],
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let guest = guest();
        let (ring, queue) = raw(&guest, SIZE, event_idx, start);
        let mut model = Model::new(ring, queue, event_idx, start);
        for step in steps {
            model.step(step);
            prop_assert!(!model.is_lost(), "asleep on what it waits for after {:?}", step);
        }
    }

    #[test]
    fn test_with_event_idx_a_call_is_for_an_index_that_was_used_since_the_last_question(
        start: u16, bursts in prop::collection::vec((0u16..8, -10i16..10), 1..30),
    ) {
        let guest = guest();
        let (ring, mut queue) = raw(&guest, SIZE, true, start);
        let mut used_idx = start;
        for (count, distance) in bursts {
            let event = used_idx.wrapping_add_signed(distance);
            ring.set_used_event(event);
            for _ in 0..count {
                queue.push_used(0, 0);
            }
            queue.publish_used();
            let passed = (0..count).any(|i| used_idx.wrapping_add(i) == event);
            prop_assert_eq!(queue.should_call(), passed);
            prop_assert!(!queue.should_call(), "one call for one burst");
            used_idx = used_idx.wrapping_add(count);
        }
    }
}

#[test]
fn test_no_interrupt_is_honoured_without_event_idx_and_means_nothing_with_it() {
    let guest = guest();
    for event_idx in [false, true] {
        let (ring, mut queue) = raw(&guest, SIZE, event_idx, 0);
        ring.set_used_event(0);
        ring.set_avail_flags(flags::VIRTQ_AVAIL_F_NO_INTERRUPT);
        queue.push_used(0, 0);
        assert!(!queue.should_call(), "not published yet");
        queue.publish_used();
        assert_eq!(queue.should_call(), event_idx);
        ring.set_avail_flags(0);
        assert!(!queue.should_call(), "nothing was used since");
    }
}
