//! A device of a packed virtqueue that ends without notice, at any moment, and the one that comes after it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use mpassthru_testing::driver::{PackedDriver, RingLayout, Segment};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::guest;
use crate::fixture::{Guest, PACKED_START, cases, memfd};
use crate::virtqueue::{Direction, InflightRecord, PackedQueue, QueueConfig, Taken, record_bytes};

const SIZE: u16 = 9;
/// An odd place in the file, as it is for the second virtqueue of a front-end's area.
const OFFSET: u64 = 64;
const HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 32;
const BUFFERS: u64 = 0x8000;

/// A driver, a record, and the devices that come and go.
struct Machine {
    guest: Guest,
    layout: RingLayout,
    driver: PackedDriver,
    record: File,
    posted: u64,
}

impl Machine {
    fn new() -> Self {
        let guest = guest();
        let layout = RingLayout::packed(GuestPhysAddr(0x1000), SIZE);
        let driver = PackedDriver::new(&guest.vmm, layout, false).unwrap();
        let record = File::from(memfd("record", OFFSET + record_bytes(u32::from(SIZE), true)));
        Self { guest, layout, driver, record, posted: 0 }
    }

    /// A device that is started at `base`, and how many chains were in flight.
    fn start(&self, base: u32) -> (PackedQueue, usize) {
        let config = QueueConfig { base, packed: true, ..self.guest.queue_config(&self.layout, false) };
        let mut queue = PackedQueue::new(self.guest.memory.clone(), &config).unwrap();
        let record = InflightRecord::map(self.record.as_raw_fd(), OFFSET, u32::from(SIZE), true).unwrap();
        let InflightRecord::Packed(record) = record else { panic!("asked for") };
        let resumed = queue.resume(record);
        (queue, resumed)
    }

    /// As a front-end starts a device after a crash: it knows no better than at the first start.
    fn start_again(&self) -> (PackedQueue, usize) {
        self.start(PACKED_START)
    }

    /// Posts a chain of so many descriptors, each time of other buffers.
    fn post(&mut self, length: u16) -> bool {
        let at = |k: u16| GuestPhysAddr(BUFFERS + (self.posted * 4 + u64::from(k)) * 64 % 0x4000);
        let pieces: Vec<_> = (0..length).map(|k| Segment::writable(at(k), 64)).collect();
        self.posted += 1;
        self.driver.add(&pieces).is_ok()
    }

    fn post_many(&mut self, count: u16) {
        assert!((0..count).all(|_| self.post(1)));
        self.driver.publish();
    }

    fn release_used(&mut self) -> Vec<u16> {
        let used: Vec<_> = std::iter::from_fn(|| self.driver.pop_used()).map(|used| used.unwrap().head).collect();
        used.iter().for_each(|&id| self.driver.release(id));
        used
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; record_bytes(u32::from(SIZE), true) as usize];
        self.record.read_exact_at(&mut bytes, OFFSET).unwrap();
        bytes
    }

    fn write(&self, bytes: &[u8]) {
        self.record.write_all_at(bytes, OFFSET).unwrap();
    }
}

/// A taken chain and the buffers that it was found to have.
type Found = (Taken, Vec<crate::guest_memory::Segment>);

fn take(queue: &mut PackedQueue, count: usize) -> Vec<Found> {
    let one = |queue: &mut PackedQueue| {
        let mut segments = Vec::with_capacity(64);
        let taken = queue.take(Direction::DeviceWrites, &mut 0, &mut segments).unwrap();
        taken.map(|taken| (taken, segments))
    };
    (0..count).map_while(|_| one(queue)).collect()
}

fn ids(found: &[Found]) -> Vec<u16> {
    found.iter().map(|(taken, _)| taken.head).collect()
}

/// What tells one taking of a chain from another: all but its position.
fn contents(found: &[Found]) -> Vec<(u16, &[crate::guest_memory::Segment])> {
    found.iter().map(|(taken, segments)| (taken.head, &segments[..])).collect()
}

/// The fields of a record that change before a batch is shown, and after.
fn fields() -> [Vec<(usize, usize)>; 2] {
    let entry = |index: usize, from: usize, to: usize| {
        let at = HEADER_BYTES + ENTRY_BYTES * index;
        (at + from, at + to)
    };
    let entries = 0..usize::from(SIZE);
    let mut before: Vec<_> = entries.clone().map(|index| entry(index, 2, 4)).collect();
    before.push((12, 14));
    let mut after: Vec<_> = entries.map(|index| entry(index, 0, 1)).collect();
    after.push((14, 16));
    [before, after]
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// Used descriptors were written and never shown.
    BeforePublishing,
    /// Some fields of the record's new state were written, and the flags of the first used descriptor not.
    WhilePreparing(u32, bool),
    /// They were, and some fields of the rest.
    WhileRecording(u32),
    AfterRecording,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Post(u16, u16),
    Take(u16),
    /// Gives back chains taken last.
    Untake(u16),
    /// Uses this many of the chains taken, picked anywhere.
    Use(u16, prop::sample::Index),
    /// Uses some more, and ends at a moment of it.
    End(u16, prop::sample::Index, End),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let end = prop_oneof![
        Just(End::BeforePublishing),
        (any::<u32>(), any::<bool>()).prop_map(|(which, used)| End::WhilePreparing(which, used)),
        any::<u32>().prop_map(End::WhileRecording),
        Just(End::AfterRecording),
    ];
    prop_oneof![
        5 => (1u16..4, 1u16..4).prop_map(|(count, length)| Step::Post(count, length)),
        4 => (1u16..6).prop_map(Step::Take),
        1 => (1u16..3).prop_map(Step::Untake),
        4 => (1u16..4, index()).prop_map(|(count, which)| Step::Use(count, which)),
        2 => (0u16..4, index(), end).prop_map(|(count, which, end)| Step::End(count, which, end)),
    ]
}

fn use_some(queue: &mut PackedQueue, taken: &mut Vec<Found>, count: u16, which: prop::sample::Index) {
    for _ in 0..count.min(taken.len() as u16) {
        let (used, _) = taken.remove(which.index(taken.len()));
        queue.push_used(used.head, 8);
    }
}

/// Uses some, and leaves record and ring as they are at that moment. Returns whether the driver was shown it.
fn end(machine: &Machine, queue: &mut PackedQueue, end: End) -> bool {
    let (before, first) = (machine.read(), queue.shown());
    let flags_at = machine.layout.desc.plus(16 * u64::from(first) + 14);
    let mut hidden = [0; 2];
    machine.guest.vmm.read(flags_at, &mut hidden).unwrap();
    if matches!(end, End::BeforePublishing) {
        return false;
    }
    queue.publish_used();
    let mut now = machine.read();
    let [prepared, recorded] = fields();
    let mut undo = |fields: &[(usize, usize)], which: u32| {
        for (position, &(from, to)) in fields.iter().enumerate() {
            if which >> (position % 32) & 1 == 0 {
                now[from..to].copy_from_slice(&before[from..to]);
            }
        }
    };
    match end {
        End::WhilePreparing(which, used) => {
            undo(&prepared, which);
            undo(&recorded, 0);
            // old_used_idx and old_used_wrap, and perhaps used_idx and used_wrap.
            for at in [18, 19, 21].into_iter().chain([16, 17, 20].into_iter().filter(|_| !used)) {
                now[at] = before[at];
            }
            machine.write(&now);
            machine.guest.vmm.write(flags_at, &hidden).unwrap();
            false
        }
        End::WhileRecording(which) => {
            undo(&recorded, which);
            [18, 19, 21].into_iter().for_each(|at| now[at] = before[at]);
            machine.write(&now);
            true
        }
        End::BeforePublishing | End::AfterRecording => true,
    }
}

proptest! {
    #![proptest_config(cases(768))]

    #[test]
    fn test_no_chain_is_lost_or_used_twice_wherever_devices_end(steps in prop::collection::vec(step(), 1..120)) {
        let mut machine = Machine::new();
        let (mut queue, _) = machine.start_again();
        let mut taken: Vec<Found> = Vec::new();
        for step in steps {
            match step {
                Step::Post(count, length) => {
                    let _full = (0..count).filter(|_| machine.post(length)).count();
                    machine.driver.publish();
                }
                Step::Take(count) => taken.extend(take(&mut queue, usize::from(count))),
                Step::Untake(count) => {
                    for _ in 0..count {
                        let last = taken.iter().map(|(taken, _)| *taken).max_by_key(|taken| taken.position);
                        let Some(last) = last.filter(|last| last.position + 1 == queue.position()) else { break };
                        taken.retain(|(taken, _)| *taken != last);
                        queue.untake(last);
                    }
                }
                Step::Use(count, which) => {
                    use_some(&mut queue, &mut taken, count, which);
                    queue.publish_used();
                    machine.release_used();
                }
                Step::End(count, which, how) => {
                    let before_use = taken.clone();
                    use_some(&mut queue, &mut taken, count, which);
                    if before_use.len() == taken.len() || !end(&machine, &mut queue, how) {
                        taken = before_use;
                    }
                    drop(queue);
                    machine.release_used();
                    let resumed;
                    (queue, resumed) = machine.start_again();
                    prop_assert_eq!(resumed, taken.len());
                    // In the order in which they were taken; whatever was pending follows.
                    taken.sort_by_key(|(taken, _)| taken.position);
                    let again = take(&mut queue, taken.len());
                    prop_assert_eq!(contents(&again), contents(&taken));
                    taken = again;
                }
            }
        }
        taken.iter().for_each(|(taken, _)| queue.push_used(taken.head, 0));
        let rest = take(&mut queue, usize::MAX);
        rest.iter().for_each(|(taken, _)| queue.push_used(taken.head, 0));
        queue.publish_used();
        machine.release_used();
        prop_assert_eq!(machine.driver.outstanding(), 0);
    }

    #[test]
    fn test_any_record_at_all_is_survived(
        bytes in prop::collection::vec(any::<u8>(), record_bytes(SIZE.into(), true) as usize),
        flags in prop::collection::vec((any::<bool>(), 0u8..4, 0u8..9, 0u8..10), usize::from(SIZE)),
        used in (0u8..9, 0u8..9, 0u8..2, 0u8..2),
        is_plausible: bool,
    ) {
        let mut bytes = bytes;
        if is_plausible {
            bytes[8..12].copy_from_slice(&[1, 0, SIZE as u8, 0]);
            bytes[12..22].copy_from_slice(&[0, 0, 1, 0, used.0, 0, used.1, 0, used.2, used.3]);
            for (index, &(inflight, num, next, id)) in flags.iter().enumerate() {
                let at = 32 + 32 * index;
                bytes[at..at + 8].copy_from_slice(&[u8::from(inflight), 0, next, 0, next, 0, num, 0]);
                bytes[at + 16..at + 18].copy_from_slice(&[id, 0]);
            }
        }
        let mut machine = Machine::new();
        machine.write(&bytes);
        machine.post_many(5);
        let (mut queue, _) = machine.start_again();
        // Faults are the queue's own affair.
        let mut segments = Vec::with_capacity(64);
        let mut taken = Vec::new();
        while queue.available() > 0 {
            match queue.take(Direction::DeviceWrites, &mut 0, &mut segments) {
                Ok(Some(chain)) => taken.push(chain),
                _ => break,
            }
            segments.clear();
        }
        taken.iter().for_each(|taken| queue.push_used(taken.head, 0));
        queue.give_up_resumed();
        queue.publish_used();
        queue.end_record();
    }
}

#[test]
fn test_chains_whose_descriptors_were_overwritten_are_taken_again_and_given_back_empty_at_a_stop() {
    let mut machine = Machine::new();
    machine.post_many(6);
    let (mut queue, _) = machine.start_again();
    let first = take(&mut queue, 4);
    queue.push_used(first[2].0.head, 8);
    queue.push_used(first[1].0.head, 8);
    queue.publish_used();
    drop(queue);
    assert_eq!(machine.release_used(), [first[2].0.head, first[1].0.head]);

    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, queue.base()), (2, 0x8002_8003), "the fourth is in the ring, the first is not");
    let again = take(&mut queue, 1);
    assert_eq!(contents(&again), contents(&first[..1]));
    queue.untake(again[0].0);
    queue.give_up_resumed();
    queue.publish_used();
    assert_eq!(machine.release_used(), [first[0].0.head]);
    let settled = machine.driver.settle(queue.base()).unwrap();
    assert_eq!((settled.given_back, settled.never_returned, settled.returned_twice), (3, 0, 0));
}

#[test]
fn test_used_descriptors_that_were_never_shown_do_not_show_later() {
    let mut machine = Machine::new();
    machine.post_many(8);
    let (mut queue, _) = machine.start_again();
    let first = take(&mut queue, 6);
    queue.push_used(first[0].0.head, 8);
    queue.publish_used();
    machine.release_used();
    // Three more are written, and the process ends.
    [1, 2, 3].into_iter().for_each(|which: usize| queue.push_used(first[which].0.head, 8));
    drop(queue);
    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, machine.release_used()), (5, vec![]));
    let again = take(&mut queue, 5);
    assert_eq!(ids(&again), ids(&first[1..]));
    queue.push_used(again[4].0.head, 8);
    queue.publish_used();
    assert_eq!(machine.release_used(), [first[5].0.head], "and nothing behind it");
}

#[test]
fn test_a_guest_that_started_over_is_not_given_chains_that_it_does_not_wait_for() {
    for (used, posted) in [(2, 0), (2, 3), (2, 8), (0, 0), (0, 3), (0, 9), (9, 4), (20, 9), (18, 0)] {
        let mut machine = Machine::new();
        let (mut queue, _) = machine.start_again();
        for _ in 0..used {
            machine.post_many(1);
            let taken = take(&mut queue, 1);
            queue.push_used(taken[0].0.head, 8);
            queue.publish_used();
            machine.release_used();
        }
        machine.post_many(6);
        take(&mut queue, 5);
        drop(queue);
        machine.driver = PackedDriver::new(&machine.guest.vmm, machine.layout, false).unwrap();
        machine.post_many(posted);
        let (mut queue, resumed) = machine.start_again();
        assert_eq!((resumed, queue.base()), (0, PACKED_START), "{used} used, {posted} posted");
        let again = take(&mut queue, 9);
        assert_eq!(ids(&again), (0..posted).collect::<Vec<_>>());
    }
}

#[test]
fn test_after_an_orderly_stop_the_front_end_says_where_to_go_on() {
    let mut machine = Machine::new();
    machine.post_many(6);
    let (mut queue, _) = machine.start_again();
    let taken = take(&mut queue, 3);
    taken.iter().for_each(|(taken, _)| queue.push_used(taken.head, 8));
    queue.publish_used();
    machine.release_used();
    let base = queue.base();
    queue.end_record();
    drop(queue);
    let (queue, resumed) = machine.start(base);
    assert_eq!((resumed, queue.base()), (0, 0x8003_8003));
    drop(queue);
    // As a record that a later crash leaves, it counts again.
    assert_eq!(machine.start_again().0.base(), 0x8003_8003);
}

#[test]
fn test_chains_that_the_front_end_counts_as_gone_are_not_recorded() {
    let mut machine = Machine::new();
    machine.post_many(6);
    let (mut queue, resumed) = machine.start(0x8000_8002);
    assert_eq!((resumed, ids(&take(&mut queue, 1))), (0, vec![2]));
    drop(queue);
    assert_eq!(machine.start(0x8000_8003).1, 0);
    assert_eq!(machine.read()[8..10], [0, 0], "no record that anybody would go by");
}

#[test]
fn test_a_record_of_another_ring_is_ignored() {
    const VERSION: u64 = 8;
    const DESC_NUM: u64 = 10;
    const OLD_USED_IDX: u64 = 18;
    for (at, value) in [(VERSION, 0u16), (VERSION, 2), (DESC_NUM, SIZE + 1), (OLD_USED_IDX, SIZE), (OLD_USED_IDX, 5)] {
        let mut machine = Machine::new();
        machine.post_many(4);
        let (mut queue, _) = machine.start_again();
        let taken = take(&mut queue, 2);
        queue.push_used(taken[1].0.head, 0);
        queue.publish_used();
        machine.release_used();
        machine.record.write_all_at(&value.to_le_bytes(), OFFSET + at).unwrap();
        if at == OLD_USED_IDX {
            machine.record.write_all_at(&value.to_le_bytes(), OFFSET + at - 2).unwrap();
        }
        let (queue, resumed) = machine.start(0x8001_8001);
        assert_eq!((resumed, queue.base()), (0, 0x8001_8001), "field at {at} is {value}");
    }
}
