use mpassthru_testing::driver::{QueueDriver, RingLayout, Segment, Settlement};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::{Taken, VIRTIO_NET_F_HASH_REPORT, Vring};
use crate::fixture::{
    Guest, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, cases,
    was_signalled,
};
use crate::virtqueue::Direction;

fn vring(size: u16, features: u64) -> (QueueDriver, Vring) {
    let guest = Guest::of_pages(64);
    let layout = RingLayout::contiguous(GuestPhysAddr(0), size);
    let event_idx = features & VIRTIO_RING_F_EVENT_IDX != 0;
    let packed = features & VIRTIO_F_RING_PACKED != 0;
    let driver = QueueDriver::new(&guest.vmm, layout, event_idx, packed).unwrap();
    let vring = Vring::new(guest.memory.clone(), guest.vring_config(&layout, features)).unwrap();
    (driver, vring)
}

fn post(driver: &mut QueueDriver, count: u16) {
    for _ in 0..count {
        driver.add(&[Segment::writable(GuestPhysAddr(0x1_0000), 64)]).unwrap();
    }
    driver.publish();
}

/// Posts chains of one to three descriptors, as far as there is room.
fn post_chains(driver: &mut QueueDriver, count: u16) {
    for length in (1..4).cycle().take(usize::from(count)) {
        let _full = driver.add(&vec![Segment::writable(GuestPhysAddr(0x1_0000), 64); length]);
    }
    driver.publish();
}

/// Takes what there is, `count` heads at most.
fn take_some(vring: &mut Vring, count: u16) -> Vec<Taken> {
    let mut chain = Vec::with_capacity(64);
    let count = count.min(vring.queue.available().unwrap());
    (0..count).map_while(|_| vring.queue.take(Direction::DeviceWrites, &mut chain).unwrap()).collect()
}

/// Takes `count` heads.
fn take(vring: &mut Vring, count: u16) -> Vec<Taken> {
    assert!(vring.queue.available().unwrap() >= count);
    let mut chain = Vec::with_capacity(64);
    (0..count).map(|_| vring.queue.take(Direction::DeviceWrites, &mut chain).unwrap().unwrap()).collect()
}

/// Lets the driver take every used head back. Returns how many, and how many of them came back with length 0.
fn release_used(driver: &mut QueueDriver) -> (u16, u16) {
    let (mut all, mut empty) = (0, 0);
    while let Some(used) = driver.pop_used() {
        let used = used.unwrap();
        driver.release(used.head);
        all += 1;
        empty += u16::from(used.len == 0);
    }
    (all, empty)
}

fn settle(driver: &QueueDriver, vring: &Vring) -> Settlement {
    driver.settle(vring.queue.base()).unwrap()
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Post(u16),
    Take(u16),
    /// Uses this many of the heads taken, picked anywhere.
    Use(u16, prop::sample::Index),
    Release,
    /// The device gives everything back, as at a stop, and goes on from there.
    GiveBack,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u16..6).prop_map(Step::Post),
        4 => (1u16..6).prop_map(Step::Take),
        4 => (1u16..4, any::<prop::sample::Index>()).prop_map(|(count, which)| Step::Use(count, which)),
        3 => Just(Step::Release),
        1 => Just(Step::GiveBack),
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_every_head_is_used_once_or_given_back_whatever_the_order(
        packed: bool, odd: bool, steps in prop::collection::vec(step(), 1..80),
    ) {
        let features = VIRTIO_F_VERSION_1 | if packed { VIRTIO_F_RING_PACKED } else { 0 };
        let (mut driver, mut vring) = vring(if packed && odd { 11 } else { 16 }, features);
        let mut taken: Vec<Taken> = Vec::new();
        for step in steps.into_iter().chain([Step::GiveBack]) {
            match step {
                Step::Post(count) => post_chains(&mut driver, count),
                Step::Take(count) => taken.extend(take_some(&mut vring, count)),
                Step::Use(count, which) => {
                    for _ in 0..count.min(taken.len() as u16) {
                        let used = taken.swap_remove(which.index(taken.len()));
                        vring.queue.push_used(used.head, 8);
                    }
                    vring.flush();
                }
                Step::Release => {
                    release_used(&mut driver);
                }
                Step::GiveBack => {
                    vring.give_back(&mut taken);
                    taken.clear();
                    release_used(&mut driver);
                    let settled = settle(&driver, &vring);
                    prop_assert_eq!((settled.never_returned, settled.returned_twice), (0, 0));
                    prop_assert_eq!(settled.given_back, driver.outstanding());
                }
            }
        }
    }
}

#[test]
fn test_heads_taken_last_stay_in_the_avail_ring_and_those_before_a_used_one_return_empty() {
    let (mut driver, mut vring) = vring(8, VIRTIO_F_VERSION_1);
    post(&mut driver, 6);
    let mut taken = take(&mut vring, 5);
    let used = taken.remove(2);
    vring.queue.push_used(used.head, 8);
    vring.give_back(&mut taken);
    assert_eq!(vring.queue.base(), 3, "two of five rewound");
    assert_eq!(release_used(&mut driver), (3, 2), "one used, two in front of it returned empty");
    assert_eq!(settle(&driver, &vring), Settlement { given_back: 3, never_returned: 0, returned_twice: 0 });
}

#[test]
fn test_a_head_that_waited_for_a_whole_turn_of_the_index_is_not_taken_for_a_fresh_one() {
    let (mut driver, mut vring) = vring(8, VIRTIO_F_VERSION_1);
    post(&mut driver, 1);
    let mut taken = take(&mut vring, 1);
    for _ in 0..65536 - 1 {
        post(&mut driver, 1);
        let taken = take(&mut vring, 1)[0];
        vring.queue.push_used(taken.head, 8);
        vring.flush();
        release_used(&mut driver);
    }
    // Its position is now 65536 behind that of the next head, the same in 16 bits.
    post(&mut driver, 1);
    taken.extend(take(&mut vring, 1));
    assert_eq!(taken[0].position as u16, taken[1].position as u16);
    vring.give_back(&mut taken);
    release_used(&mut driver);
    assert_eq!(settle(&driver, &vring), Settlement { given_back: 1, never_returned: 0, returned_twice: 0 });
}

#[test]
fn test_the_header_has_the_length_that_the_features_make() {
    let header_len = |features| vring(2, features).1.header_len;
    assert_eq!(header_len(0), 10);
    assert_eq!(header_len(VIRTIO_NET_F_MRG_RXBUF), 12);
    assert_eq!(header_len(VIRTIO_F_VERSION_1), 12);
    assert_eq!(header_len(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF), 12);
    assert_eq!(header_len(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_HASH_REPORT), 20);
}

#[test]
fn test_a_flush_calls_once_if_the_driver_wants_it() {
    let (mut driver, mut vring) = vring(4, VIRTIO_F_VERSION_1);
    let call = |vring: &Vring| was_signalled(vring.call.as_ref().unwrap());
    post(&mut driver, 2);
    let heads = take(&mut vring, 2);
    vring.flush();
    assert!(!call(&vring), "nothing was used");
    vring.queue.push_used(heads[0].head, 1);
    vring.flush();
    assert!(call(&vring));
    vring.flush();
    assert!(!call(&vring), "nothing was used since");
    driver.disable_notifications();
    vring.queue.push_used(heads[1].head, 1);
    vring.flush();
    assert!(!call(&vring), "the driver wants none");
    assert_eq!(release_used(&mut driver).0, 2);
}

#[test]
fn test_a_fault_stops_the_queue_and_tells_the_front_end() {
    let (mut driver, mut vring) = vring(4, VIRTIO_F_VERSION_1);
    assert!(vring.runs());
    vring.fault();
    assert!(!vring.runs());
    assert!(was_signalled(vring.err.as_ref().unwrap()));
    post(&mut driver, 1);
    assert_eq!(vring.arm(), Ok(false), "a stopped queue has nothing to do");
}
