use std::sync::Arc;

use super::{MEMORY_END, REGION_BYTES, guest, layout, raw, walk, writable};
use crate::error::QueueFault;
use crate::guest_memory::UserAddr;
use crate::virtqueue::{QueueConfig, SplitQueue};

#[test]
fn test_sizes_that_are_no_power_of_two_up_to_32768_are_refused() {
    let guest = guest();
    let config = guest.queue_config(&layout(256), false);
    for size in [0, 3, 255, 32769, 65535, 65536, 1 << 31, u32::MAX] {
        let refused = SplitQueue::new(Arc::clone(&guest.memory), &QueueConfig { size, ..config });
        assert_eq!(refused.err(), Some(QueueFault::BadSize { size }));
    }
}

/// What becomes of a queue of 256 whose rings are moved by `change`.
fn moved(change: impl FnOnce(&mut QueueConfig)) -> Option<QueueFault> {
    let guest = guest();
    let mut config = guest.queue_config(&layout(256), false);
    change(&mut config);
    SplitQueue::new(Arc::clone(&guest.memory), &config).err()
}

#[test]
fn test_rings_outside_memory_or_misaligned_are_refused() {
    type Field = fn(&mut QueueConfig) -> &mut UserAddr;
    let rings: [(&str, Field, u64, u64); 3] = [
        ("descriptor table", |config| &mut config.desc, 16, 16 * 256),
        ("avail ring", |config| &mut config.avail, 2, 2 * 256 + 6),
        ("used ring", |config| &mut config.used, 4, 8 * 256 + 6),
    ];
    let region = guest().vmm.regions()[0].config().size_bytes;
    for (name, field, align, bytes) in rings {
        let outside = |fault: Option<QueueFault>| match fault {
            Some(QueueFault::RingOutsideMemory { ring, len_bytes, .. }) => (ring, len_bytes) == (name, bytes),
            _ => false,
        };
        assert_eq!(moved(|config| field(config).0 += align), None, "{name}: elsewhere");
        assert!(outside(moved(|config| field(config).0 += align / 2)), "{name}: misaligned");
        assert!(outside(moved(|config| field(config).0 = u64::MAX - align + 1)), "{name}: end of the address space");
        assert!(outside(moved(|config| field(config).0 = 0)), "{name}: null");
        // The descriptor table is at guest-physical 0x1000: its region starts that much earlier.
        let edge = |config: &QueueConfig, room: u64| config.desc.0 - 0x1000 + region - room;
        let room = bytes.next_multiple_of(align);
        assert_eq!(moved(|config| field(config).0 = edge(config, room)), None, "{name}: at the end of its region");
        assert!(outside(moved(|config| field(config).0 = edge(config, room - align))), "{name}: past its region");
    }
}

#[test]
fn test_an_avail_index_more_than_a_ring_ahead_is_a_fault() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 8, false, 65532);
    ring.set_avail_idx(65532u16.wrapping_add(8));
    assert_eq!(queue.available(), Ok(8));
    let jump = |avail_idx, ahead| QueueFault::AvailIndexJump { avail_idx, next_avail: 65532, ahead, size: 8 };
    ring.set_avail_idx(65532u16.wrapping_add(9));
    assert_eq!(queue.available(), Err(jump(5, 9)));
    assert_eq!(queue.enable_kicks(), Err(jump(5, 9)));
    ring.set_avail_idx(65531);
    assert_eq!(queue.available(), Err(jump(65531, 65535)));
}

#[test]
fn test_a_head_outside_the_table_is_a_fault_and_is_not_taken() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 8, false, 0);
    ring.set_avail_entry(0, 7);
    ring.set_avail_entry(1, 8);
    ring.set_avail_idx(2);
    assert_eq!(queue.available(), Ok(2));
    assert_eq!(queue.take_head().map(|taken| taken.head), Ok(7));
    assert_eq!(queue.take_head(), Err(QueueFault::HeadOutOfRange { head: 8, size: 8 }));
    assert_eq!(queue.next_avail(), 1);
}

#[test]
fn test_never_shared_memory_looks_like_it_until_the_first_buffer() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 8, false, 0);
    assert!(queue.looks_unshared());
    ring.set_descriptor(7, writable(0, 1, None));
    assert!(!queue.looks_unshared(), "a descriptor");
    ring.clear().unwrap();
    assert!(queue.looks_unshared());
    ring.set_avail_idx(1);
    assert!(!queue.looks_unshared(), "an index; descriptor 0 of length 0 at address 0 may be meant");
    assert_eq!(queue.available(), Ok(1));
}

#[test]
fn test_faults_print_what_is_wrong() {
    let guest = guest();
    let (ring, mut queue) = raw(&guest, 8, false, 0);
    ring.set_descriptor(5, writable(MEMORY_END, 100, None));
    let fault = walk(&mut queue, 5).unwrap_err();
    assert_eq!(fault.to_string(), "buffer at guest address 0x110000 (100 bytes, head 5) is outside guest memory");
    ring.set_descriptor(5, writable(REGION_BYTES, 100, Some(9)));
    let fault = walk(&mut queue, 5).unwrap_err();
    assert_eq!(fault.to_string(), "next index 9 is outside the descriptor table of 8 (head 5)");
}
