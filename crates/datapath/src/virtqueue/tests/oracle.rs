//! The same rings, read by rust-vmm's `virtio-queue`: two devices, written by different people, agree.

use std::fs::File;

use mpassthru_testing::driver::{Descriptor, flags};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::{FAR, Guest, REGION_BYTES, guest, layout, raw, segments};
use crate::fixture::cases;
use crate::guest_memory::{GuestPhysAddr as Phys, Segment};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction};

const SIZE: u16 = 8;
const TABLES: [u64; 2] = [0x8000, 0x8801];

/// rust-vmm's view of the same files.
fn other_view(guest: &Guest) -> GuestMemoryMmap {
    let ranges = guest.vmm.regions().iter().map(|region| {
        let file = File::from(region.file().try_clone().unwrap());
        let config = region.config();
        let start = GuestAddress(config.guest_phys_address.0);
        (start, config.size_bytes as usize, Some(FileOffset::new(file, config.mmap_offset_bytes)))
    });
    GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap()
}

fn other_queue(event_idx: bool, index: u16) -> Queue {
    let layout = layout(SIZE);
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(layout.desc.0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(layout.avail.0)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(layout.used.0)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_next_avail(index);
    queue.set_next_used(index);
    queue.set_ready(true);
    queue
}

/// Descriptors as a hostile driver writes them, leaning towards those that nearly make sense.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => prop::sample::select(vec![0x9000u64, 0x9801, FAR, FAR + 77]),
        2 => prop::sample::select(TABLES.to_vec()),
        1 => prop::sample::select(vec![REGION_BYTES - 5, 2 * REGION_BYTES - 5, FAR + REGION_BYTES - 5, u64::MAX - 3]),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 12, 1500]),
        3 => (1u32..10).prop_map(|count| 16 * count),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![6 => Just(2u16), 6 => Just(3u16), 4 => Just(4u16), 1 => any::<u16>()];
    (address, len, flags, 0u16..10).prop_map(|(address, len, flags, next)| Descriptor { address, len, flags, next })
}

/// The descriptors of a chain as rust-vmm walks it, and whether it came to the end of it.
fn other_walk(memory: &GuestMemoryMmap) -> (Vec<Descriptor>, bool) {
    let chain = other_queue(false, 0).pop_descriptor_chain(memory).unwrap();
    let pieces = chain.map(|piece| Descriptor {
        address: piece.addr().0,
        len: piece.len(),
        flags: piece.flags(),
        next: piece.next(),
    });
    let pieces: Vec<_> = pieces.collect();
    let ended = pieces.last().is_some_and(|piece| piece.flags & flags::VIRTQ_DESC_F_NEXT == 0);
    (pieces, ended)
}

/// Translates a chain that rust-vmm walked; `None` if a piece is not device-writable or not in memory.
fn translated(guest: &Guest, pieces: &[Descriptor]) -> Option<Vec<Segment>> {
    let mut found = Vec::new();
    for piece in pieces {
        if piece.flags & flags::VIRTQ_DESC_F_WRITE == 0 {
            return None;
        }
        let (mut at, mut left) = (piece.address, piece.len);
        while left > 0 {
            let segment = guest.memory.translate(Phys(at), left, &mut 0)?;
            found.push(segment);
            left -= segment.len;
            at = at.checked_add(u64::from(segment.len))?;
        }
    }
    Some(found)
}

/// Whether a descriptor that names a table breaks a rule that rust-vmm does not check: NEXT is set as well, or the
/// table is empty, longer than the queue or not inside one region.
fn is_table_that_only_we_refuse(guest: &Guest, descriptor: &Descriptor) -> bool {
    let in_one_piece = guest.memory.translate(Phys(descriptor.address), descriptor.len, &mut 0);
    let in_one_piece = in_one_piece.is_some_and(|segment| segment.len == descriptor.len);
    descriptor.flags & flags::VIRTQ_DESC_F_INDIRECT != 0
        && (descriptor.flags & flags::VIRTQ_DESC_F_NEXT != 0
            || !in_one_piece
            || !(1..=u32::from(SIZE)).contains(&(descriptor.len / 16)))
}

proptest! {
    #![proptest_config(cases(800))]

    #[test]
    fn test_chains_are_walked_as_rust_vmm_walks_them(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        tables in prop::collection::vec(prop::collection::vec(descriptor(), 10), 2),
    ) {
        let guest = guest();
        let (ring, queue) = raw(&guest, SIZE, false, 0);
        for (index, &descriptor) in (0..).zip(&table) {
            ring.set_descriptor(index, descriptor);
        }
        for (&at, entries) in TABLES.iter().zip(&tables) {
            for (index, &descriptor) in (0..).zip(entries) {
                ring.set_indirect(GuestPhysAddr(at), index, descriptor).unwrap();
            }
        }
        ring.set_avail_idx(1);
        let (pieces, ended) = other_walk(&other_view(&guest));
        let theirs = if ended { translated(&guest, &pieces) } else { None };
        let mut ours = Vec::with_capacity(CHAIN_DESCS_MAX);
        let result = queue.walk(0, Direction::DeviceWrites, &mut 0, &mut ours);
        match (result, theirs) {
            (Ok(()), theirs) => prop_assert_eq!(Some(ours), theirs),
            (Err(_), None) => {}
            (Err(fault), Some(_)) => {
                let refused = table.iter().any(|descriptor| is_table_that_only_we_refuse(&guest, descriptor));
                prop_assert!(refused, "refused for {} what rust-vmm takes", fault);
            }
        }
    }

    #[test]
    fn test_calls_and_kicks_are_asked_for_as_rust_vmm_does(
        start: u16, bursts in prop::collection::vec((0u16..6, any::<u16>(), -8i16..8), 1..20),
    ) {
        let guest = guest();
        let view = other_view(&guest);
        let (ring, mut ours) = raw(&guest, SIZE, true, start);
        let mut theirs = other_queue(true, start);
        let mut avail_idx = start;
        for (count, head, distance) in bursts {
            ring.set_used_event(theirs.next_used().wrapping_add_signed(distance));
            for index in 0..count {
                ring.set_avail_entry(avail_idx.wrapping_add(index), head % SIZE);
            }
            avail_idx = avail_idx.wrapping_add(count);
            ring.set_avail_idx(avail_idx);
            prop_assert_eq!(ours.available(), Ok(count));
            for _ in 0..count {
                let head = ours.take_head().unwrap().head;
                prop_assert_eq!(theirs.pop_descriptor_chain(&view).unwrap().head_index(), head);
                ours.push_used(head, 1);
                theirs.add_used(&view, head, 1).unwrap();
            }
            ours.publish_used();
            prop_assert_eq!(ring.used_idx(), theirs.next_used());
            prop_assert_eq!(ours.should_call(), theirs.needs_notification(&view).unwrap());
            prop_assert_eq!(ours.enable_kicks(), Ok(theirs.enable_notification(&view).unwrap()));
            prop_assert_eq!(ring.avail_event(), theirs.next_avail());
        }
    }
}

#[test]
fn test_the_oracle_is_awake() {
    let guest = guest();
    let (ring, _) = raw(&guest, SIZE, false, 0);
    ring.set_descriptor(0, super::writable(0x9000, 10, Some(5)));
    ring.set_descriptor(5, super::indirect(TABLES[1], 32));
    ring.set_indirect(GuestPhysAddr(TABLES[1]), 0, super::writable(FAR, 1, Some(1))).unwrap();
    ring.set_indirect(GuestPhysAddr(TABLES[1]), 1, super::writable(FAR + 8, 2, None)).unwrap();
    ring.set_avail_idx(1);
    let (pieces, ended) = other_walk(&other_view(&guest));
    assert!(ended);
    assert_eq!(translated(&guest, &pieces), Some(segments(&guest, [(0x9000, 10), (FAR, 1), (FAR + 8, 2)])));
}
