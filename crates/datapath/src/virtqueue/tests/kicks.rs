//! Driver → device: no interleaving of the two sides' steps leaves a buffer that nobody looks at.

use mpassthru_testing::driver::{RawRing, flags};
use proptest::prelude::*;

use super::{guest, raw};
use crate::fixture::cases;
use crate::virtqueue::SplitQueue;

const SIZE: u16 = 8;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver adds a buffer and stores the index.
    Add,
    /// The driver reads what the device wishes, and kicks.
    Look,
    /// The device wakes up if it was kicked.
    Wake,
    /// The device, awake, takes and uses everything.
    Work,
    /// The device, awake and done with what it saw, enables kicks and sleeps unless something is there already.
    Sleep,
}

struct Model {
    ring: RawRing,
    queue: SplitQueue,
    event_idx: bool,
    avail_idx: u16,
    /// Avail index when the driver last looked whether to kick.
    looked_at: u16,
    kicked: bool,
    asleep: bool,
    /// The device has taken all that it saw.
    done: bool,
}

impl Model {
    fn step(&mut self, step: Step) {
        match step {
            Step::Add => {
                let room = SIZE - self.avail_idx.wrapping_sub(self.ring.used_idx());
                if room > 0 {
                    self.ring.set_avail_entry(self.avail_idx, self.avail_idx % SIZE);
                    self.avail_idx = self.avail_idx.wrapping_add(1);
                    self.ring.set_avail_idx(self.avail_idx);
                }
            }
            Step::Look => self.look(),
            Step::Wake => {
                if self.asleep && std::mem::take(&mut self.kicked) {
                    self.asleep = false;
                    self.queue.disable_kicks();
                }
            }
            Step::Work if !self.asleep => {
                for _ in 0..self.queue.available().unwrap() {
                    let head = self.queue.take_head().unwrap().head;
                    self.queue.push_used(head, 0);
                }
                self.queue.publish_used();
                self.done = true;
            }
            Step::Sleep if !self.asleep && self.done => {
                self.asleep = !self.queue.enable_kicks().unwrap();
                if !self.asleep {
                    self.done = false;
                    self.queue.disable_kicks();
                }
            }
            Step::Work | Step::Sleep => {}
        }
    }

    fn look(&mut self) {
        let (old, new) = (self.looked_at, self.avail_idx);
        self.looked_at = new;
        if old == new {
            return;
        }
        self.kicked |= if self.event_idx {
            // By definition, not by vring_need_event: is the event one of the indices that were added?
            (0..new.wrapping_sub(old)).any(|i| old.wrapping_add(i) == self.ring.avail_event())
        } else {
            self.ring.used_flags() & flags::VIRTQ_USED_F_NO_NOTIFY == 0
        };
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop::sample::select(vec![Step::Add, Step::Add, Step::Look, Step::Wake, Step::Work, Step::Sleep])
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_no_interleaving_loses_a_kick(
        event_idx: bool,
        start in prop_oneof![Just(0u16), 65520u16..=65535, any::<u16>()],
        avail_event: u16,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let guest = guest();
        let (ring, queue) = raw(&guest, SIZE, event_idx, start);
        let event_field = ring.layout().used.plus(4 + 8 * u64::from(SIZE));
        guest.vmm.write(event_field, &avail_event.to_le_bytes()).unwrap();
        let mut model =
            Model { ring, queue, event_idx, avail_idx: start, looked_at: start, kicked: false, asleep: false, done: true };
        for step in steps {
            model.step(step);
            // The driver always looks in the end, and the device is woken by a kick.
            let at_rest = model.asleep && !model.kicked && model.looked_at == model.avail_idx;
            let left = model.avail_idx.wrapping_sub(model.queue.next_avail());
            prop_assert!(!at_rest || left == 0, "asleep on {} buffers after {:?}", left, step);
        }
    }
}

#[test]
fn test_kicks_are_refused_while_working_and_asked_for_before_sleeping() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, SIZE, false, 0);
    queue.disable_kicks();
    assert_eq!(ring.used_flags(), flags::VIRTQ_USED_F_NO_NOTIFY);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(ring.used_flags(), 0);

    let (ring, mut queue) = raw(&guest, SIZE, true, 5);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(ring.avail_event(), 5, "the next buffer is the event");
    queue.disable_kicks();
    assert_eq!(ring.used_flags(), 0, "flags mean nothing with EVENT_IDX and stay 0");
    ring.set_avail_idx(7);
    assert_eq!(queue.enable_kicks(), Ok(true), "buffers came between the last look and the wish");
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(ring.avail_event(), 7);
}
