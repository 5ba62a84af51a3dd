//! The driver against a device that does what VIRTIO 1.3 section 2.8 says, and one that does not.

use std::collections::VecDeque;

use super::*;
use crate::memory::{GuestPhysAddr, RegionConfig};

const BUFFERS: GuestPhysAddr = GuestPhysAddr(0x8000);
const BOTH: u16 = packed_flags::VIRTQ_DESC_F_AVAIL | packed_flags::VIRTQ_DESC_F_USED;

/// Chains that were made available: id, descriptors, and the segments without those of indirect tables.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    id: u16,
    descriptors: u16,
    segments: Vec<(u64, u32)>,
}

/// A device, one slot after the other.
struct Device {
    ring: RawPackedRing,
    avail: (u16, bool),
    used: (u16, bool),
}

impl Device {
    fn step(&self, at: (u16, bool)) -> (u16, bool) {
        if at.0 + 1 == self.ring.layout().size { (0, !at.1) } else { (at.0 + 1, at.1) }
    }

    fn take(&mut self) -> Option<Chain> {
        let mut chain = Chain { id: 0, descriptors: 0, segments: Vec::new() };
        loop {
            let descriptor = self.ring.descriptor(self.avail.0);
            let lap = if self.avail.1 { packed_flags::VIRTQ_DESC_F_AVAIL } else { packed_flags::VIRTQ_DESC_F_USED };
            if descriptor.flags & BOTH != lap {
                assert!(chain.descriptors == 0, "no chain is seen before all of it is there");
                return None;
            }
            chain.segments.push((descriptor.address, descriptor.len));
            chain.descriptors += 1;
            self.avail = self.step(self.avail);
            if descriptor.flags & flags::VIRTQ_DESC_F_NEXT == 0 {
                chain.id = descriptor.id;
                return Some(chain);
            }
        }
    }

    /// Uses a chain.
    fn put(&mut self, id: u16, descriptors: u16, len: u32) {
        let flags = if self.used.1 { BOTH } else { 0 } | if len > 0 { flags::VIRTQ_DESC_F_WRITE } else { 0 };
        self.ring.set_descriptor(self.used.0, PackedDescriptor { address: 0, len, id, flags });
        for _ in 0..descriptors {
            self.used = self.step(self.used);
        }
    }

    fn base(&self) -> u32 {
        let bits = |(index, wrap): (u16, bool)| u32::from(index) | u32::from(wrap) << 15;
        bits(self.avail) | bits(self.used) << 16
    }

    fn wish(&self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.ring.memory().read(self.ring.layout().avail, &mut bytes).unwrap();
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[2], bytes[3]]))
    }

    fn set_event(&self, offset_and_wrap: u16, flags: u16) {
        let event = u32::from(offset_and_wrap) | u32::from(flags) << 16;
        self.ring.memory().write(self.ring.layout().used, &event.to_le_bytes()).unwrap();
    }
}

fn pair(size: u16, event_idx: bool) -> (PackedDriver, Device) {
    let memory = Arc::new(GuestMemory::new(&[RegionConfig::memfd(0x1000, 0x1_0000)]).unwrap());
    let layout = RingLayout::packed(GuestPhysAddr(0x1000), size);
    let driver = PackedDriver::new(&memory, layout, event_idx).unwrap();
    let ring = driver.ring().clone();
    (driver, Device { ring, avail: (0, true), used: (0, true) })
}

fn buffer(number: u16) -> Segment {
    Segment::writable(BUFFERS.plus(128 * u64::from(number)), 100)
}

#[test]
fn test_chains_come_back_in_any_order_on_rings_of_any_size() {
    for size in [1u16, 2, 3, 5, 7, 8, 13] {
        let (mut driver, mut device) = pair(size, false);
        let mut taken: VecDeque<Chain> = VecDeque::new();
        let (mut random, mut posted, mut returned) = (1u32, 0u32, 0u32);
        while returned < 2000 {
            random = random.wrapping_mul(1_103_515_245).wrapping_add(12345);
            let pick = random >> 16;
            let length = 1 + pick as u16 % 3 % size;
            let segments: Vec<_> = (0..length).map(|k| buffer((posted as u16 + k) % 64)).collect();
            if driver.add(&segments).is_ok() {
                posted += 1;
                if pick % 3 != 0 {
                    driver.publish();
                }
            }
            while let Some(chain) = device.take() {
                taken.push_back(chain);
            }
            let which = pick as usize % taken.len().max(1);
            if let Some(chain) = taken.remove(which) {
                device.put(chain.id, chain.descriptors, 100);
                let used = driver.pop_used().unwrap().unwrap();
                assert_eq!(used, Used { head: chain.id, len: 100 }, "ring of {size}");
                driver.release(used.head);
                returned += 1;
            }
            assert_eq!(driver.pop_used(), None);
            driver.publish();
        }
    }
}

#[test]
fn test_a_burst_is_seen_once_it_is_published_and_in_its_order() {
    let (mut driver, mut device) = pair(8, false);
    let first = driver.add(&[buffer(0), buffer(1)]).unwrap();
    let second = driver.add(&[buffer(2)]).unwrap();
    assert_eq!(device.take(), None);
    driver.publish();
    let at = |number: u64| (BUFFERS.0 + 128 * number, 100);
    assert_eq!(device.take(), Some(Chain { id: first, descriptors: 2, segments: vec![at(0), at(1)] }));
    assert_eq!(device.take(), Some(Chain { id: second, descriptors: 1, segments: vec![at(2)] }));
    assert_eq!(device.take(), None);
    assert_eq!(driver.add(&[buffer(0); 6]), Err(RingFull));
}

#[test]
fn test_a_returned_buffer_is_posted_again_as_it_was_wherever_the_ring_is() {
    let (mut driver, mut device) = pair(3, false);
    let id = driver.add(&[buffer(4), buffer(5)]).unwrap();
    for _ in 0..10 {
        driver.publish();
        let chain = device.take().unwrap();
        assert_eq!(chain.segments, [(BUFFERS.0 + 512, 100), (BUFFERS.0 + 640, 100)]);
        device.put(chain.id, 2, 7);
        assert_eq!(driver.pop_used(), Some(Ok(Used { head: id, len: 7 })));
        driver.repost(id);
    }
}

#[test]
fn test_an_indirect_chain_takes_one_descriptor_and_its_table_has_all_segments() {
    let (mut driver, mut device) = pair(4, false);
    driver.use_indirect_tables(IndirectTables { start: GuestPhysAddr(0x4000), entries: 8 }).unwrap();
    let segments: Vec<_> = (0..8).map(buffer).collect();
    let id = driver.add_indirect(&segments).unwrap();
    assert_eq!((driver.free_descriptors(), driver.add_indirect(&[buffer(0); 9])), (3, Err(RingFull)));
    driver.publish();
    let table = 0x4000 + 128 * u64::from(id);
    assert_eq!(device.take(), Some(Chain { id, descriptors: 1, segments: vec![(table, 128)] }));
    for (number, segment) in (0..).zip(&segments) {
        let mut entry = [0; 16];
        driver.ring().memory().read(GuestPhysAddr(table + 16 * number), &mut entry).unwrap();
        let expected = PackedDescriptor { address: segment.address.0, len: 100, id: 0, flags: 2 };
        assert_eq!(entry, expected.to_bytes());
    }
}

#[test]
fn test_broken_devices_are_found_out() {
    let broken = |id: u16, len: u32| {
        let (mut driver, mut device) = pair(4, false);
        let head = driver.add(&[buffer(0)]).unwrap();
        driver.publish();
        device.put(id.wrapping_add(head), 1, len);
        (head, driver.pop_used(), driver.pop_used())
    };
    let (head, first, _) = broken(0, 101);
    assert_eq!(first, Some(Err(Violation::UsedLengthTooLarge { head, len: 101, writable_bytes: 100 })));
    let (head, first, then) = broken(1, 1);
    assert_eq!((first, then), (Some(Err(Violation::UsedTwice { head: head + 1 })), None));
    let (head, first, then) = broken(4, 1);
    assert_eq!((first, then), (Some(Err(Violation::UsedIdOutOfRange { id: u32::from(head) + 4, size: 4 })), None));

    let (mut driver, mut device) = pair(4, false);
    let head = driver.add(&[buffer(0)]).unwrap();
    driver.publish();
    device.put(head, 1, 1);
    device.put(head, 1, 1);
    assert_eq!(driver.pop_used(), Some(Ok(Used { head, len: 1 })));
    driver.repost(head);
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedTwice { head })));
}

#[test]
fn test_kicks_follow_the_devices_wish() {
    let (mut driver, device) = pair(4, true);
    let kicks = |driver: &mut PackedDriver| {
        let id = driver.add(&[buffer(0)]);
        id.is_ok() && driver.publish()
    };
    assert!(kicks(&mut driver), "nothing was said");
    device.set_event(0, packed_flags::RING_EVENT_FLAGS_DISABLE);
    assert!(!kicks(&mut driver));
    device.set_event(0x8002, packed_flags::RING_EVENT_FLAGS_DESC);
    assert!(kicks(&mut driver), "slot 2 is the event");
    device.set_event(0x0003, packed_flags::RING_EVENT_FLAGS_DESC);
    assert!(!kicks(&mut driver), "slot 3, but of the next lap");
    assert!(!driver.publish(), "nothing new");
}

#[test]
fn test_a_wish_for_a_later_slot_wraps_with_the_ring() {
    let (mut driver, mut device) = pair(4, true);
    for number in 0..3 {
        driver.add(&[buffer(number)]).unwrap();
    }
    driver.publish();
    while let Some(chain) = device.take() {
        device.put(chain.id, 1, 1);
        driver.pop_used().unwrap().unwrap();
        driver.release(chain.id);
    }
    let ids: Vec<_> = (0..3).map(|number| driver.add(&[buffer(number)]).unwrap()).collect();
    driver.publish();
    assert!(driver.enable_notifications(2));
    assert_eq!(device.wish(), (0, packed_flags::RING_EVENT_FLAGS_DESC), "slot 0 of the lap with wrap counter 0");
    device.put(ids[0], 1, 1);
    assert!(driver.enable_notifications(2), "one of two");
    device.put(ids[1], 1, 1);
    assert!(!driver.enable_notifications(2), "two are there already");
    driver.disable_notifications();
    assert_eq!(device.wish(), (0, packed_flags::RING_EVENT_FLAGS_DISABLE));
    let (mut plain, device) = pair(4, false);
    plain.enable_notifications(1);
    assert_eq!(device.wish(), (0, packed_flags::RING_EVENT_FLAGS_ENABLE));
}

#[test]
fn test_settlement_tells_given_back_from_lost() {
    let (mut driver, mut device) = pair(8, false);
    let chains = [1u16, 2, 1, 3].map(|length| driver.add(&vec![buffer(0); usize::from(length)]).unwrap());
    driver.publish();
    for _ in 0..3 {
        device.take().unwrap();
    }
    // Two are used, the first of all in place of the second; the fourth was never taken.
    device.put(chains[1], 2, 0);
    device.put(chains[0], 1, 0);
    while let Some(used) = driver.pop_used() {
        driver.release(used.unwrap().head);
    }
    assert!(driver.settle(device.base()).is_err(), "one is taken and not used");
    device.avail = (3, true);
    let base = device.base();
    assert_eq!(driver.settle(base).unwrap(), Settlement { given_back: 2, never_returned: 0, returned_twice: 0 });
    device.put(chains[2], 1, 0);
    device.avail = (4, true);
    let later = device.base();
    assert!(driver.settle(later).is_err(), "not popped yet");
    driver.pop_used().unwrap().unwrap();
    assert_eq!(driver.settle(later).unwrap(), Settlement { given_back: 1, never_returned: 0, returned_twice: 0 });
    assert!(driver.settle(base).is_err(), "it has used more than that");
}
