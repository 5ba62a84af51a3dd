//! A device that ends without notice, at any moment, and the one that comes after it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use mpassthru_testing::driver::{Segment, SplitDriver};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::{guest, layout};
use crate::fixture::{Guest, cases, memfd};
use crate::virtqueue::{InflightRecord, QueueConfig, SplitQueue, Taken, record_bytes};

const SIZE: u16 = 8;
/// An odd place in the file, as it is for the second virtqueue of a front-end's area.
const OFFSET: u64 = 64;

/// A driver, a record, and the devices that come and go.
struct Machine {
    guest: Guest,
    driver: SplitDriver,
    record: File,
}

impl Machine {
    fn new() -> Self {
        let guest = guest();
        let driver = SplitDriver::new(&guest.vmm, layout(SIZE), false).unwrap();
        let record = File::from(memfd("record", OFFSET + record_bytes(u32::from(SIZE), false)));
        Self { guest, driver, record }
    }

    /// A device that starts at `base`, and how many heads were in flight.
    fn start(&self, base: u16) -> (SplitQueue, usize) {
        let config = QueueConfig { base: base.into(), ..self.guest.queue_config(&layout(SIZE), false) };
        let mut queue = SplitQueue::new(self.guest.memory.clone(), &config).unwrap();
        let record = InflightRecord::map(self.record.as_raw_fd(), OFFSET, u32::from(SIZE), false).unwrap();
        let InflightRecord::Split(record) = record else { panic!("asked for") };
        let resumed = queue.resume(record);
        (queue, resumed)
    }

    /// As a front-end starts a device after a crash: at the used index.
    fn start_again(&self) -> (SplitQueue, usize) {
        self.start(self.driver.ring().used_idx())
    }

    fn post(&mut self, count: u16) {
        for _ in 0..count {
            self.driver.add(&[Segment::writable(GuestPhysAddr(0x8000), 64)]).unwrap();
        }
        self.driver.publish();
    }

    fn release_used(&mut self) -> Vec<u16> {
        let used: Vec<_> = std::iter::from_fn(|| self.driver.pop_used()).map(|used| used.unwrap().head).collect();
        used.iter().for_each(|&head| self.driver.release(head));
        used
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; record_bytes(u32::from(SIZE), false) as usize];
        self.record.read_exact_at(&mut bytes, OFFSET).unwrap();
        bytes
    }

    fn write(&self, bytes: &[u8]) {
        self.record.write_all_at(bytes, OFFSET).unwrap();
    }

    fn poke(&self, at: u64, value: u16) {
        self.record.write_all_at(&value.to_le_bytes(), OFFSET + at).unwrap();
    }
}

fn take(queue: &mut SplitQueue, count: usize) -> Vec<Taken> {
    assert!(usize::from(queue.available().unwrap()) >= count);
    (0..count).map(|_| queue.take_head().unwrap()).collect()
}

fn heads(taken: &[Taken]) -> Vec<u16> {
    taken.iter().map(|taken| taken.head).collect()
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// Heads were written to the used ring and never shown.
    BeforePublishing,
    /// The used index was stored, and this many bytes of the record's new state.
    WhileRecording(prop::sample::Index),
    AfterRecording,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Post(u16),
    Take(u16),
    /// Gives back the heads taken last.
    Untake(u16),
    /// Uses this many of the heads taken, picked anywhere.
    Use(u16, prop::sample::Index),
    /// Uses some more, and ends at a moment of it. The next device is told the used index, or 0.
    End(u16, prop::sample::Index, End, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let end =
        prop_oneof![Just(End::BeforePublishing), index().prop_map(End::WhileRecording), Just(End::AfterRecording),];
    prop_oneof![
        4 => (1u16..6).prop_map(Step::Post),
        4 => (1u16..6).prop_map(Step::Take),
        1 => (1u16..3).prop_map(Step::Untake),
        4 => (1u16..4, index()).prop_map(|(count, which)| Step::Use(count, which)),
        2 => (0u16..4, index(), end, any::<bool>()).prop_map(|(count, which, end, zero)| Step::End(count, which, end, zero)),
    ]
}

/// Uses `count` of the heads taken.
fn use_some(queue: &mut SplitQueue, taken: &mut Vec<Taken>, count: u16, which: prop::sample::Index) {
    for _ in 0..count.min(taken.len() as u16) {
        let used = taken.remove(which.index(taken.len()));
        queue.push_used(used.head, 8);
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_no_head_is_lost_or_used_twice_wherever_devices_end(steps in prop::collection::vec(step(), 1..120)) {
        let mut machine = Machine::new();
        let (mut queue, _) = machine.start(0);
        let mut taken: Vec<Taken> = Vec::new();
        for step in steps {
            match step {
                Step::Post(count) => machine.post(count.min(machine.driver.free_descriptors())),
                Step::Take(count) => {
                    let count = count.min(queue.available().unwrap());
                    taken.extend(take(&mut queue, usize::from(count)));
                }
                Step::Untake(count) => {
                    for _ in 0..count {
                        let last = taken.iter().max_by_key(|taken| taken.position).copied();
                        let Some(last) = last.filter(|last| last.position + 1 == queue.position()) else { break };
                        taken.retain(|&taken| taken != last);
                        queue.untake(last);
                    }
                }
                Step::Use(count, which) => {
                    use_some(&mut queue, &mut taken, count, which);
                    queue.publish_used();
                    machine.release_used();
                }
                Step::End(count, which, end, zero) => {
                    let before_use = taken.clone();
                    use_some(&mut queue, &mut taken, count, which);
                    match end {
                        End::BeforePublishing => taken = before_use,
                        End::WhileRecording(moment) => {
                            let before = machine.read();
                            queue.publish_used();
                            // The used index of the record is stored last: it is among its first 16 bytes.
                            let after = machine.read();
                            let done = 16 + moment.index(before.len() - 16);
                            machine.write(&[&before[..16], &after[16..done], &before[done..]].concat());
                        }
                        End::AfterRecording => queue.publish_used(),
                    }
                    drop(queue);
                    machine.release_used();
                    let resumed;
                    (queue, resumed) = if zero { machine.start(0) } else { machine.start_again() };
                    prop_assert_eq!(resumed, taken.len());
                    // In the order in which they were taken; whatever was pending follows.
                    taken.sort_by_key(|taken| taken.position);
                    let again = take(&mut queue, taken.len());
                    prop_assert_eq!(heads(&again), heads(&taken));
                    taken = again;
                }
            }
        }
        taken.iter().for_each(|taken| queue.push_used(taken.head, 0));
        let rest = queue.available().unwrap();
        let rest = take(&mut queue, usize::from(rest));
        rest.iter().for_each(|taken| queue.push_used(taken.head, 0));
        queue.publish_used();
        machine.release_used();
        prop_assert_eq!(machine.driver.outstanding(), 0);
    }

    #[test]
    fn test_any_record_at_all_is_survived_and_pending_heads_stay_pending(
        bytes in prop::collection::vec(any::<u8>(), record_bytes(SIZE.into(), false) as usize),
        flags in prop::collection::vec(any::<bool>(), usize::from(SIZE)),
        is_plausible: bool,
    ) {
        let mut bytes = bytes;
        if is_plausible {
            bytes[8..12].copy_from_slice(&[1, 0, SIZE as u8, 0]);
            bytes[14..16].copy_from_slice(&[0, 0]);
            flags.iter().enumerate().for_each(|(head, &flag)| bytes[16 + 16 * head] = u8::from(flag));
        }
        let mut machine = Machine::new();
        machine.write(&bytes);
        machine.post(5);
        let (mut queue, resumed) = machine.start_again();
        let count = usize::from(queue.available().unwrap());
        prop_assert_eq!(count, 5, "{} of them in flight", resumed);
        let mut taken: VecDeque<_> = heads(&take(&mut queue, count)).into();
        taken.make_contiguous().sort_unstable();
        let distinct = taken.iter().zip(taken.iter().skip(1)).all(|(one, next)| one != next);
        prop_assert!(distinct && taken.iter().all(|&head| head < SIZE), "{:?}", taken);
    }
}

#[test]
fn test_heads_that_were_taken_in_the_order_of_the_ring_stay_in_it() {
    let mut machine = Machine::new();
    machine.post(6);
    let (mut queue, _) = machine.start(0);
    let first = take(&mut queue, 4);
    drop(queue);
    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, queue.next_avail()), (4, 0));
    assert_eq!(heads(&take(&mut queue, 4)), heads(&first));
}

#[test]
fn test_heads_stay_in_the_ring_though_its_index_has_just_wrapped() {
    let mut machine = Machine::new();
    let (mut queue, _) = machine.start(0);
    while machine.driver.ring().used_idx() < 65530 {
        machine.post(6);
        for taken in take(&mut queue, 6) {
            queue.push_used(taken.head, 8);
        }
        queue.publish_used();
        machine.release_used();
    }
    machine.post(6);
    let first = take(&mut queue, 6);
    drop(queue);

    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, queue.next_avail()), (6, 65532));
    let again = take(&mut queue, 6);
    assert_eq!((heads(&again), queue.next_avail()), (heads(&first), 2));
    again.into_iter().rev().for_each(|taken| queue.untake(taken));
    assert_eq!(queue.next_avail(), 65532);
    assert_eq!(heads(&take(&mut queue, 6)), heads(&first));
}

#[test]
fn test_heads_before_a_used_one_are_taken_again_and_given_back_empty_at_a_stop() {
    let mut machine = Machine::new();
    machine.post(6);
    let (mut queue, _) = machine.start(0);
    let first = take(&mut queue, 4);
    queue.push_used(first[2].head, 8);
    queue.publish_used();
    drop(queue);
    assert_eq!(machine.release_used(), [first[2].head]);

    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, queue.next_avail()), (3, 3), "the fourth is in the ring, the first two are not");
    let again = take(&mut queue, 1);
    assert_eq!(again[0].head, first[0].head);
    queue.untake(again[0]);
    queue.give_up_resumed();
    queue.publish_used();
    assert_eq!(machine.release_used(), [first[0].head, first[1].head]);
    assert_eq!(machine.driver.settle(queue.next_avail()).unwrap().given_back, machine.driver.outstanding());
}

#[test]
fn test_a_record_of_another_ring_is_ignored() {
    const VERSION: u64 = 8;
    const DESC_NUM: u64 = 10;
    const USED_IDX: u64 = 14;
    for (at, value) in [(VERSION, 0), (VERSION, 2), (DESC_NUM, SIZE / 2), (USED_IDX, 1), (USED_IDX, 60_000)] {
        let mut machine = Machine::new();
        machine.post(4);
        let (mut queue, _) = machine.start(0);
        take(&mut queue, 2);
        machine.poke(at, value);
        let (queue, resumed) = machine.start_again();
        assert_eq!((resumed, queue.next_avail()), (0, 0), "field at {at} is {value}");
    }
}

#[test]
fn test_a_guest_that_started_over_is_not_given_heads_that_it_does_not_wait_for() {
    let mut machine = Machine::new();
    machine.post(6);
    let (mut queue, _) = machine.start(0);
    take(&mut queue, 5);
    drop(queue);
    machine.driver = SplitDriver::new(&machine.guest.vmm, layout(SIZE), false).unwrap();
    machine.post(3);
    let (mut queue, resumed) = machine.start_again();
    assert_eq!((resumed, queue.available()), (0, Ok(3)));
    assert_eq!(heads(&take(&mut queue, 3)), [0, 1, 2]);
}

#[test]
fn test_heads_that_the_front_end_counts_as_gone_are_not_recorded() {
    let mut machine = Machine::new();
    machine.post(6);
    let (mut queue, _) = machine.start(2);
    take(&mut queue, 1);
    drop(queue);
    let (queue, resumed) = machine.start(3);
    assert_eq!((resumed, queue.next_avail()), (0, 3));
}

#[test]
fn test_a_base_that_cannot_be_is_the_used_index() {
    let mut machine = Machine::new();
    machine.post(6);
    let (mut queue, _) = machine.start(0);
    take(&mut queue, 4).iter().for_each(|taken| queue.push_used(taken.head, 0));
    queue.publish_used();
    machine.poke(8, 0);
    for (base, goes_on_at) in [(0, 4), (3, 4), (4, 4), (6, 6), (7, 4), (60_000, 4)] {
        assert_eq!(machine.start(base).0.next_avail(), goes_on_at, "base {base}");
    }
}

#[test]
fn test_a_file_that_cannot_hold_a_record_is_refused() {
    let short = memfd("short", record_bytes(8, false) - 1);
    let disk = File::open(std::env::current_exe().unwrap()).unwrap();
    for (fd, offset) in [(short.as_raw_fd(), 0), (disk.as_raw_fd(), 0), (memfd("odd", 4096).as_raw_fd(), 4)] {
        let error = InflightRecord::map(fd, offset, 8, false).unwrap_err();
        assert!(error.to_string().contains("cannot map the record of what is in flight"), "{error}");
    }
}
