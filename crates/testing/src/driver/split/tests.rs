use super::*;
use crate::memory::RegionConfig;
use crate::model_device::ModelDevice;

const BUFFERS: GuestPhysAddr = GuestPhysAddr(0x8000);

fn pair(size: u16, event_idx: bool) -> (SplitDriver, ModelDevice) {
    let memory = Arc::new(GuestMemory::new(&[RegionConfig::memfd(0, 1 << 20)]).unwrap());
    let layout = RingLayout::contiguous(GuestPhysAddr(0), size);
    let driver = SplitDriver::new(&memory, layout, event_idx).unwrap();
    (driver, ModelDevice::new(&memory, layout, event_idx))
}

fn buffer(number: u16) -> Segment {
    Segment::writable(BUFFERS.plus(2048 * u64::from(number)), 100)
}

#[test]
fn test_indices_wrap_at_65536_without_loss() {
    let (mut driver, mut device) = pair(4, true);
    let mut returned = 0u32;
    for round in 0..70_000u32 {
        let head = driver.add(&[buffer((round % 4) as u16)]).unwrap();
        driver.publish();
        let chain = device.pop_avail().unwrap();
        assert_eq!(chain.head, head);
        device.push_used(chain.head, 7);
        assert_eq!(driver.pop_used(), Some(Ok(Used { head, len: 7 })));
        driver.release(head);
        returned += 1;
    }
    assert_eq!((returned, driver.free_descriptors(), driver.outstanding()), (70_000, 4, 0));
}

#[test]
fn test_chain_reaches_the_device_in_order_and_its_descriptors_come_back() {
    let (mut driver, mut device) = pair(8, false);
    let segments = [buffer(0), buffer(3), Segment::readable(BUFFERS, 9)];
    let head = driver.add(&segments).unwrap();
    assert_eq!(driver.free_descriptors(), 5);
    driver.publish();
    let chain = device.pop_avail().unwrap();
    assert_eq!(chain.segments, segments);
    device.push_used(chain.head, 200);
    assert_eq!(driver.pop_used(), Some(Ok(Used { head, len: 200 })));
    driver.release(head);
    assert_eq!(driver.free_descriptors(), 8);
    assert_eq!(driver.add(&[buffer(0); 9]), Err(RingFull));
}

#[test]
fn test_indirect_chain_takes_one_descriptor() {
    let (mut driver, mut device) = pair(4, false);
    driver.use_indirect_tables(IndirectTables { start: GuestPhysAddr(0x4000), entries: 8 }).unwrap();
    let segments: Vec<_> = (0..8).map(buffer).collect();
    driver.add_indirect(&segments).unwrap();
    assert_eq!(driver.free_descriptors(), 3);
    driver.publish();
    assert_eq!(device.pop_avail().unwrap().segments, segments);
    assert_eq!(driver.add_indirect(&[buffer(0); 9]), Err(RingFull));
}

#[test]
fn test_broken_devices_are_found_out() {
    let (mut driver, mut device) = pair(4, false);
    let head = driver.add(&[buffer(0)]).unwrap();
    driver.publish();
    device.push_used(head, 101);
    device.push_used(head, 1);
    device.push_used(4, 1);
    device.push_used_id(0x1_0000, 1);
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedLengthTooLarge { head, len: 101, writable_bytes: 100 })));
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedTwice { head })));
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedIdOutOfRange { id: 4, size: 4 })));
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedIdOutOfRange { id: 0x1_0000, size: 4 })));
    device.set_used_idx(9);
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedIndexJump { used_idx: 9, next_used: 4, size: 4 })));
    assert_eq!(driver.pop_used(), None);
}

#[test]
fn test_head_used_again_is_found_out_before_and_after_it_was_posted_again() {
    let (mut driver, mut device) = pair(4, false);
    let head = driver.add(&[buffer(0)]).unwrap();
    driver.publish();
    device.push_used(head, 1);
    device.push_used(head, 1);
    assert_eq!(driver.pop_used(), Some(Ok(Used { head, len: 1 })));
    driver.repost(head);
    assert_eq!(driver.pop_used(), Some(Err(Violation::UsedTwice { head })));
    // Once published, the entry could be for the new posting; the account does not balance in the end.
    driver.publish();
    device.push_used(head, 1);
    assert_eq!(driver.pop_used(), Some(Ok(Used { head, len: 1 })));
    assert_eq!(driver.settle(1).unwrap().returned_twice, 1);
}

#[test]
fn test_kicks_and_notifications_follow_event_idx() {
    let (mut driver, mut device) = pair(8, true);
    device.set_avail_event(1);
    driver.add(&[buffer(0)]).unwrap();
    assert!(!driver.publish(), "index 0 is before the event");
    driver.add(&[buffer(1)]).unwrap();
    assert!(driver.publish(), "index 1 is the event");
    driver.add(&[buffer(2)]).unwrap();
    assert!(!driver.publish(), "index 2 is after the event");
    assert!(!driver.publish(), "nothing new");
    assert!(driver.enable_notifications(2), "nothing used yet");
    assert!(!device.push_used(0, 0), "one of two");
    assert!(device.push_used(1, 0), "the second is due");
    assert!(!driver.enable_notifications(2), "two are there already");
    driver.disable_notifications();
    driver.pop_used();
    assert!(!device.push_used(2, 0), "switched off");
}

#[test]
fn test_kicks_and_notifications_follow_flags_without_event_idx() {
    let (mut driver, mut device) = pair(8, false);
    device.set_used_flags(flags::VIRTQ_USED_F_NO_NOTIFY);
    driver.add(&[buffer(0)]).unwrap();
    assert!(!driver.publish());
    device.set_used_flags(0);
    driver.add(&[buffer(1)]).unwrap();
    assert!(driver.publish());
    driver.disable_notifications();
    assert!(!device.push_used(0, 0));
    driver.pop_used();
    assert!(driver.enable_notifications(1));
    assert!(device.push_used(1, 0));
}

#[test]
fn test_disabled_notifications_stay_off_for_a_whole_wrap() {
    let (mut driver, mut device) = pair(4, true);
    for _ in 0..35_000u32 {
        let heads: Vec<_> = (0..4).map(|number| driver.add(&[buffer(number)]).unwrap()).collect();
        driver.publish();
        driver.disable_notifications();
        for head in heads {
            assert!(!device.push_used(head, 0));
        }
        while let Some(used) = driver.pop_used() {
            driver.release(used.unwrap().head);
        }
    }
}

#[test]
fn test_settlement_tells_given_back_from_lost() {
    let (mut driver, mut device) = pair(8, false);
    let heads: Vec<_> = (0..4).map(|number| driver.add(&[buffer(number)]).unwrap()).collect();
    driver.publish();
    device.push_used(heads[1], 0);
    driver.pop_used();
    let settle = |base| driver.settle(base).unwrap();
    assert_eq!(settle(2), Settlement { given_back: 2, never_returned: 1, returned_twice: 0 });
    assert_eq!(settle(0), Settlement { given_back: 4, never_returned: 0, returned_twice: 1 });
    assert!(driver.settle(5).is_err());
    assert!(driver.settle(4u16.wrapping_sub(9)).is_err());
}
