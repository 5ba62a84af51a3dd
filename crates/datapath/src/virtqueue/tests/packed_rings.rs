//! A packed virtqueue of any size against a driver that keeps account of every buffer.

use std::sync::Arc;

use mpassthru_testing::driver::{PackedDriver, RingLayout, Segment};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::{guest, segments};
use crate::error::QueueFault;
use crate::fixture::{Guest, PACKED_START, cases};
use crate::virtqueue::packed::{Cursor, start_cursors};
use crate::virtqueue::{Direction, PackedQueue, QueueConfig, Taken};

const BUFFERS: u64 = 0x8000;

fn layout(size: u16) -> RingLayout {
    RingLayout::packed(GuestPhysAddr(0x1000), size)
}

fn take(queue: &mut PackedQueue) -> Option<Taken> {
    queue.take(Direction::DeviceWrites, &mut 0, &mut Vec::with_capacity(64)).unwrap()
}

/// Uses with length 4 all that is there. Returns the number of chains.
fn use_all(queue: &mut PackedQueue) -> usize {
    let mut count = 0;
    while let Some(taken) = take(queue) {
        queue.push_used(taken.head, 4);
        count += 1;
    }
    queue.publish_used();
    count
}

#[test]
fn test_every_queue_size_goes_round() {
    let guest = Guest::of_pages(512);
    for size in [1u16, 2, 3, 7, 100, 256, 1023, 32767, 32768] {
        let (mut driver, mut queue) = guest.packed_queue(RingLayout::packed(GuestPhysAddr(0), size), false);
        for round in 0..5u64 {
            let buffer = Segment::writable(GuestPhysAddr(0x10_0000 + round % 7), 4);
            let posted: Vec<_> = (0..size).map(|_| driver.add(&[buffer]).unwrap()).collect();
            assert_eq!(queue.available(), 0);
            driver.publish();
            assert_eq!((queue.available(), queue.size()), (size, size));
            assert_eq!(use_all(&mut queue), usize::from(size));
            for id in posted {
                assert_eq!(driver.pop_used().unwrap().unwrap().head, id);
                driver.release(id);
            }
            assert_eq!((driver.pop_used(), queue.available()), (None, 0));
            let wrap = if round % 2 == 0 { 0 } else { PACKED_START };
            assert_eq!(queue.base(), wrap, "both places are at the start of a lap");
        }
    }
}

#[test]
fn test_a_ring_of_one_slot_lets_one_buffer_through_at_a_time() {
    let guest = guest();
    let (mut driver, mut queue) = guest.packed_queue(layout(1), true);
    for round in 0..5 {
        let id = driver.add(&[Segment::writable(GuestPhysAddr(BUFFERS), 4)]).unwrap();
        assert!(driver.add(&[Segment::writable(GuestPhysAddr(BUFFERS), 4)]).is_err());
        assert!(driver.publish() || round > 0, "nobody said that kicks are not wanted");
        let taken = take(&mut queue).unwrap();
        assert_eq!((taken.head, take(&mut queue)), (id, None), "its own slot is no second buffer");
        queue.push_used(id, 0);
        assert_eq!(take(&mut queue), None);
        queue.publish_used();
        driver.pop_used().unwrap().unwrap();
        driver.release(id);
    }
}

#[test]
fn test_chains_and_indirect_tables_are_walked_in_order_across_the_end_of_the_ring() {
    let guest = guest();
    let (mut driver, mut queue) = guest.packed_queue(layout(5), false);
    let tables = mpassthru_testing::driver::IndirectTables { start: GuestPhysAddr(0x4000), entries: 4 };
    driver.use_indirect_tables(tables).unwrap();
    let pieces = [(BUFFERS, 100), (super::FAR, 5), (BUFFERS + 200, 7)];
    let expected = segments(&guest, pieces);
    let pieces = pieces.map(|(at, len)| Segment::writable(GuestPhysAddr(at), len));
    for round in 0..12 {
        let indirect = round % 3 == 1;
        let id = if indirect { driver.add_indirect(&pieces) } else { driver.add(&pieces) }.unwrap();
        driver.publish();
        let mut found = Vec::with_capacity(64);
        let taken = queue.take(Direction::DeviceWrites, &mut 0, &mut found).unwrap().unwrap();
        assert_eq!((taken.head, &found), (id, &expected), "round {round}");
        queue.push_used(id, 9);
        queue.publish_used();
        assert_eq!(driver.pop_used().unwrap().unwrap().len, 9);
        driver.release(id);
    }
}

#[test]
fn test_a_burst_of_used_buffers_is_seen_at_once() {
    let guest = guest();
    let (mut driver, mut queue) = guest.packed_queue(layout(6), false);
    let ids = [1, 2, 1].map(|n| driver.add(&vec![Segment::writable(GuestPhysAddr(BUFFERS), 4); n]).unwrap());
    driver.publish();
    assert_eq!(ids.map(|_| take(&mut queue).unwrap().head), ids);
    for id in [ids[1], ids[2], ids[0]] {
        queue.push_used(id, 3);
        assert_eq!(driver.pop_used(), None, "nothing is published yet");
    }
    queue.publish_used();
    let used: Vec<_> = std::iter::from_fn(|| driver.pop_used()).map(|used| used.unwrap().head).collect();
    assert_eq!(used, [ids[1], ids[2], ids[0]]);
    queue.publish_used();
    assert_eq!(driver.pop_used(), None);
}

#[test]
fn test_a_queue_is_taken_up_at_its_base() {
    let start = |base| start_cursors(base, 10);
    let at = |index, wrap| Cursor { index, wrap };
    assert_eq!(start(PACKED_START), Some((at(0, true), at(0, true), 0)));
    assert_eq!(start(0x8007_0007), Some((at(7, false), at(7, true), 10)), "a whole ring is in flight");
    assert_eq!(start(0x0003_0007), Some((at(7, false), at(3, false), 4)));
    assert_eq!(start(0x8009_0001), Some((at(1, false), at(9, true), 2)));
    assert_eq!(start(0x0009_0001), Some((at(1, false), at(1, false), 0)), "used ahead of avail cannot be");
    assert_eq!(start(0x000a_0001), Some((at(1, false), at(1, false), 0)), "nor outside the ring");
    // DPDK's virtio-user sets nothing but the wrap counter of the avail index.
    assert_eq!(start(0x8000), Some((at(0, true), at(0, true), 0)));
    assert_eq!(start(0x800a), None);

    let guest = guest();
    let config = QueueConfig { packed: true, ..guest.queue_config(&layout(10), false) };
    let new = |base| PackedQueue::new(Arc::clone(&guest.memory), &QueueConfig { base, ..config });
    assert_eq!(new(0x8004_8004).unwrap().base(), 0x8004_8004);
    assert_eq!(new(10).err(), Some(QueueFault::BadBase { base: 10, size: 10 }));
    let size = |size| PackedQueue::new(Arc::clone(&guest.memory), &QueueConfig { size, ..config }).err();
    for bad in [0, 32769, 65536, u32::MAX] {
        assert_eq!(size(bad), Some(QueueFault::BadSize { size: bad }));
    }
}

#[test]
fn test_rings_outside_memory_or_misaligned_are_refused() {
    let guest = guest();
    let config = QueueConfig { packed: true, base: PACKED_START, ..guest.queue_config(&layout(10), false) };
    type Field = fn(&mut QueueConfig) -> &mut crate::guest_memory::UserAddr;
    let parts: [(&str, Field, u64, u64); 3] = [
        ("descriptor ring", |config| &mut config.desc, 16, 160),
        ("driver event suppression structure", |config| &mut config.avail, 4, 4),
        ("device event suppression structure", |config| &mut config.used, 4, 4),
    ];
    let region = guest.vmm.regions()[0].config().size_bytes;
    let start = guest.vmm.regions()[0].user_address();
    for (name, field, align, bytes) in parts {
        let moved = |to: u64| {
            let mut config = config;
            field(&mut config).0 = to;
            PackedQueue::new(Arc::clone(&guest.memory), &config).err()
        };
        let refused =
            |to| moved(to) == Some(QueueFault::RingOutsideMemory { ring: name, address: to, len_bytes: bytes });
        assert_eq!(moved(start), None);
        assert_eq!(moved(start + region - bytes), None, "{name}: up to the end of a region");
        assert!(refused(start + region - bytes + align), "{name}: past the end of a region");
        assert!(refused(start + align / 2), "{name}: misaligned");
        assert!(refused(0) && refused(u64::MAX - align + 1), "{name}: nowhere");
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver adds chains of these lengths, and publishes or not.
    Post([u16; 2], bool),
    Take(u16),
    /// Gives back chains taken last.
    Untake(u16),
    /// Uses one of the chains taken.
    Use(prop::sample::Index),
    Publish,
    Release,
    /// Another device takes over where this one stopped.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => ([1u16..5, 0u16..4], any::<bool>()).prop_map(|(lengths, publish)| Step::Post(lengths, publish)),
        5 => (1u16..4).prop_map(Step::Take),
        2 => (1u16..3).prop_map(Step::Untake),
        6 => any::<prop::sample::Index>().prop_map(Step::Use),
        3 => Just(Step::Publish),
        3 => Just(Step::Release),
        1 => Just(Step::Restart),
    ]
}

fn release(driver: &mut PackedDriver) {
    while let Some(used) = driver.pop_used() {
        driver.release(used.unwrap().head);
    }
}

/// Uses all but the chains taken last, publishes, and goes back over those.
fn stop(queue: &mut PackedQueue, taken: &mut Vec<Taken>) {
    taken.sort_by_key(|taken| taken.position);
    while let Some(last) = taken.pop_if(|last| last.position + 1 == queue.position()) {
        queue.untake(last);
    }
    taken.drain(..).for_each(|taken| queue.push_used(taken.head, 0));
    queue.publish_used();
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_every_chain_is_used_once_or_given_back_on_rings_of_any_size_and_in_any_order(
        size in 1u16..14, steps in prop::collection::vec(step(), 1..120),
    ) {
        let guest = guest();
        let (mut driver, mut queue) = guest.packed_queue(layout(size), false);
        let mut taken: Vec<Taken> = Vec::new();
        for step in steps.into_iter().chain([Step::Restart]) {
            match step {
                Step::Post(lengths, publish) => {
                    for length in lengths.into_iter().filter(|&length| length > 0) {
                        let _full = driver.add(&vec![Segment::writable(GuestPhysAddr(BUFFERS), 8); length.into()]);
                    }
                    if publish {
                        driver.publish();
                    }
                }
                Step::Take(count) => taken.extend((0..count).map_while(|_| take(&mut queue))),
                Step::Untake(count) => {
                    for _ in 0..count {
                        let last = taken.iter().max_by_key(|taken| taken.position).copied();
                        let Some(last) = last.filter(|last| last.position + 1 == queue.position()) else { break };
                        taken.retain(|&taken| taken != last);
                        queue.untake(last);
                    }
                }
                Step::Use(which) if !taken.is_empty() => {
                    queue.push_used(taken.remove(which.index(taken.len())).head, 8);
                }
                Step::Use(_) => {}
                Step::Publish => queue.publish_used(),
                Step::Release => release(&mut driver),
                Step::Restart => {
                    driver.publish();
                    stop(&mut queue, &mut taken);
                    release(&mut driver);
                    let settled = driver.settle(queue.base()).unwrap();
                    prop_assert_eq!((settled.never_returned, settled.returned_twice), (0, 0));
                    let base = queue.base();
                    let config = QueueConfig { base, packed: true, ..guest.queue_config(&layout(size), false) };
                    queue = PackedQueue::new(Arc::clone(&guest.memory), &config).unwrap();
                }
            }
        }
        driver.publish();
        use_all(&mut queue);
        release(&mut driver);
        prop_assert_eq!(driver.outstanding(), 0);
    }
}
