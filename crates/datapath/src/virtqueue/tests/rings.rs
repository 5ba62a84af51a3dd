use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::{guest, raw};
use crate::fixture::{Guest, cases};
use crate::virtqueue::SplitQueue;

/// Takes everything that is there and uses it with length 4. Returns the number of heads.
fn use_all(queue: &mut SplitQueue) -> u16 {
    let count = queue.available().unwrap();
    for _ in 0..count {
        let head = queue.take_head().unwrap().head;
        queue.push_used(head, 4);
    }
    queue.publish_used();
    count
}

/// Sends `rounds` full rings through; the driver checks that each head comes back once and in order.
fn go_round(driver: &mut SplitDriver, queue: &mut SplitQueue, size: u16, rounds: u32) {
    for round in 0..rounds {
        let buffer = Segment::writable(GuestPhysAddr(0x10_0000 + u64::from(round % 7)), 4);
        let posted: Vec<_> = (0..size).map(|_| driver.add(&[buffer]).unwrap()).collect();
        driver.publish();
        assert_eq!(use_all(queue), size);
        for head in posted {
            assert_eq!(driver.pop_used().unwrap().unwrap().head, head);
            driver.release(head);
        }
        assert_eq!(driver.pop_used(), None);
    }
}

#[test]
fn test_every_queue_size_goes_round() {
    let guest = Guest::of_pages(512);
    for size in (0..16).map(|bits| 1u16 << bits) {
        let (mut driver, mut queue) = guest.queue(RingLayout::contiguous(GuestPhysAddr(0), size), false);
        go_round(&mut driver, &mut queue, size, 3);
        assert_eq!((queue.size(), queue.next_avail()), (size, size.wrapping_mul(3)));
    }
}

#[test]
fn test_indices_wrap_at_65536_on_the_smallest_and_on_the_largest_queue() {
    let guest = Guest::of_pages(512);
    for size in [1u16, 2, 256, 32768] {
        let (mut driver, mut queue) = guest.queue(RingLayout::contiguous(GuestPhysAddr(0), size), true);
        let rounds = 65536 / u32::from(size) + 1;
        go_round(&mut driver, &mut queue, size, rounds);
        assert_eq!(queue.next_avail(), size);
    }
}

#[test]
fn test_a_queue_is_taken_up_at_its_base_and_at_the_used_index_in_memory() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 4, false, 65534);
    for (index, head) in [(65534, 3), (65535, 1), (0, 2)] {
        ring.set_avail_entry(index, head);
    }
    ring.set_avail_idx(1);
    assert_eq!(queue.available(), Ok(3));
    assert_eq!([(); 3].map(|()| queue.take_head().unwrap().head), [3, 1, 2]);
    [3, 1, 2].iter().for_each(|&head| queue.push_used(head, 0));
    queue.publish_used();
    assert_eq!([65534, 65535, 0].map(|index| ring.used_entry(index).id), [3, 1, 2]);
    assert_eq!((ring.used_idx(), queue.next_avail()), (1, 1));
}

#[test]
fn test_used_entries_are_invisible_until_published() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 4, false, 0);
    queue.push_used(2, 77);
    queue.push_used(1, 78);
    assert_eq!(ring.used_idx(), 0);
    queue.publish_used();
    assert_eq!(ring.used_idx(), 2);
    assert_eq!([0, 1].map(|i| (ring.used_entry(i).id, ring.used_entry(i).len)), [(2, 77), (1, 78)]);
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn test_untaken_heads_are_taken_again_in_the_same_order(
        start: u16, heads in prop::collection::vec(0u16..16, 1..16), back in 0usize..16,
    ) {
        let guest = guest();
        let (ring, mut queue) = raw(&guest, 16, false, start);
        for (index, &head) in heads.iter().enumerate() {
            ring.set_avail_entry(start.wrapping_add(index as u16), head);
        }
        let count = heads.len() as u16;
        ring.set_avail_idx(start.wrapping_add(count));
        prop_assert_eq!(queue.available(), Ok(count));
        let first: Vec<_> = heads.iter().map(|_| queue.take_head().unwrap()).collect();
        let back = back.min(heads.len());
        first[heads.len() - back..].iter().rev().for_each(|&taken| queue.untake(taken));
        prop_assert_eq!(queue.available(), Ok(back as u16));
        prop_assert_eq!(queue.next_avail(), start.wrapping_add(count - back as u16));
        let again: Vec<_> = (0..back).map(|_| queue.take_head().unwrap()).collect();
        prop_assert_eq!(first.iter().map(|taken| taken.head).collect::<Vec<_>>(), heads);
        prop_assert_eq!(&again[..], &first[first.len() - back..]);
    }
}
