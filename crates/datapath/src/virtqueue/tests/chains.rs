use mpassthru_testing::driver::{Descriptor, flags};

use super::{FAR, Guest, REGION_BYTES, guest, indirect, raw, segments, walk, writable};
use crate::error::QueueFault;
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction, SplitQueue};

const TABLE: u64 = 0x8000;

/// A device on a ring of 16 whose descriptor table and indirect table hold these.
fn with(guest: &Guest, table: &[Descriptor], indirect_at: u64, indirect: &[Descriptor]) -> SplitQueue {
    let (ring, queue) = raw(guest, 16, false, 0);
    for (index, &descriptor) in (0..).zip(table) {
        ring.set_descriptor(index, descriptor);
    }
    for (index, &descriptor) in (0..).zip(indirect) {
        ring.set_indirect(super::GuestPhysAddr(indirect_at), index, descriptor).unwrap();
    }
    queue
}

#[test]
fn test_chains_of_every_shape_are_walked_in_order() {
    let guest = guest();
    let pieces = [writable(0x9000, 100, Some(1)), writable(FAR, 5, None)];
    let expected = segments(&guest, [(0x9000, 100), (FAR, 5)]);

    let mut single = with(&guest, &[writable(0x9000, 100, None)], TABLE, &[]);
    assert_eq!(walk(&mut single, 0).unwrap(), segments(&guest, [(0x9000, 100)]));

    let mut chained = with(&guest, &pieces, TABLE, &[]);
    assert_eq!(walk(&mut chained, 0).unwrap(), expected);

    // Tables need no alignment, and the write flag of the descriptor that names one means nothing.
    for at in [TABLE, TABLE + 1, TABLE + 8, TABLE + 13] {
        let mut by_table = with(&guest, &[indirect(at, 32)], at, &pieces);
        assert_eq!(walk(&mut by_table, 0).unwrap(), expected);
        let flagged =
            Descriptor { flags: flags::VIRTQ_DESC_F_INDIRECT | flags::VIRTQ_DESC_F_WRITE, ..indirect(at, 32) };
        assert_eq!(walk(&mut with(&guest, &[flagged], at, &pieces), 0).unwrap(), expected);
    }

    let mixed = [writable(0xa000, 7, Some(3)), pieces[0], pieces[0], indirect(TABLE, 32)];
    let mut mixed = with(&guest, &mixed, TABLE, &pieces);
    assert_eq!(walk(&mut mixed, 0).unwrap(), segments(&guest, [(0xa000, 7), (0x9000, 100), (FAR, 5)]));
}

#[test]
fn test_a_chain_counts_the_descriptors_that_it_holds_in_the_ring_and_ends_whatever_it_has_become() {
    let guest = guest();
    let pieces = [writable(0x9000, 100, Some(1)), writable(FAR, 5, Some(2)), indirect(TABLE, 32)];
    let queue = with(&guest, &pieces, TABLE, &pieces);
    assert_eq!([0, 1, 2].map(|head| queue.descs_of(head)), [3, 2, 1]);
    for next in [0, 16, u16::MAX] {
        let descs = with(&guest, &[writable(0x9000, 1, Some(next))], TABLE, &[]).descs_of(0);
        assert_eq!(descs, if next == 0 { CHAIN_DESCS_MAX as u16 } else { 1 });
    }
}

#[test]
fn test_empty_pieces_are_left_out() {
    let guest = guest();
    // An empty piece has no address to be wrong.
    let table = [writable(u64::MAX, 0, Some(1)), writable(0x9000, 3, Some(2)), writable(0x9003, 0, None)];
    let mut queue = with(&guest, &table, TABLE, &[]);
    assert_eq!(walk(&mut queue, 0).unwrap(), segments(&guest, [(0x9000, 3)]));
    assert_eq!(walk(&mut queue, 2).unwrap(), []);
}

#[test]
fn test_a_piece_across_neighbouring_regions_becomes_two() {
    let guest = guest();
    let mut queue = with(&guest, &[writable(REGION_BYTES - 3, 10, None)], TABLE, &[]);
    assert_eq!(walk(&mut queue, 0).unwrap(), segments(&guest, [(REGION_BYTES - 3, 3), (REGION_BYTES, 7)]));
}

#[test]
fn test_a_piece_that_leaves_memory_is_refused() {
    let guest = guest();
    for (address, len) in [
        (2 * REGION_BYTES - 3, 4),
        (2 * REGION_BYTES, 1),
        (FAR - 1, 1),
        (FAR + REGION_BYTES - 1, 2),
        (0x9000, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 4095, u32::MAX),
    ] {
        let mut queue = with(&guest, &[writable(address, len, None)], TABLE, &[]);
        let fault = QueueFault::BufferOutsideMemory { head: 0, address, len_bytes: len };
        assert_eq!(walk(&mut queue, 0), Err(fault));
    }
}

#[test]
fn test_broken_indirect_tables_are_refused() {
    let guest = guest();
    let good = [writable(0x9000, 1, None)];
    let refused = |table: Descriptor, entries: &[Descriptor]| {
        let mut queue = with(&guest, &[table], TABLE, entries);
        matches!(walk(&mut queue, 0), Err(QueueFault::BadIndirectTable { head: 0, .. }))
    };
    assert!(!refused(indirect(TABLE, 16 * 16), &good), "as long as the queue");
    assert!(refused(indirect(TABLE, 16 * 17), &good), "longer than the queue");
    assert!(refused(indirect(TABLE, 0), &good), "empty");
    assert!(refused(indirect(TABLE, 24), &good), "half a descriptor");
    assert!(refused(indirect(REGION_BYTES - 16, 32), &good), "across two regions");
    assert!(refused(indirect(2 * REGION_BYTES - 16, 32), &good), "past the end of memory");
    assert!(refused(indirect(u64::MAX - 15, 16), &good), "past the end of the address space");
    assert!(refused(indirect(TABLE, 16), &[indirect(TABLE, 16)]), "a table in a table");
    let chained = Descriptor { flags: flags::VIRTQ_DESC_F_INDIRECT | flags::VIRTQ_DESC_F_NEXT, ..indirect(TABLE, 16) };
    assert!(refused(chained, &good), "INDIRECT and NEXT");
}

#[test]
fn test_next_must_stay_in_its_own_table() {
    let guest = guest();
    let mut queue = with(&guest, &[writable(0x9000, 1, Some(16))], TABLE, &[]);
    assert_eq!(walk(&mut queue, 0), Err(QueueFault::NextOutOfRange { head: 0, next: 16, size: 16 }));
    // Index 2 is in the queue's table, but not in the indirect one.
    let mut queue = with(&guest, &[indirect(TABLE, 32)], TABLE, &[writable(0x9000, 1, Some(2))]);
    assert_eq!(walk(&mut queue, 0), Err(QueueFault::NextOutOfRange { head: 0, next: 2, size: 2 }));
}

#[test]
fn test_loops_end() {
    let guest = guest();
    let too_long = Err(QueueFault::ChainTooLong { head: 0, limit: CHAIN_DESCS_MAX as u32 });
    for len in [0, 1] {
        let itself = [writable(0x9000, len, Some(0))];
        assert_eq!(walk(&mut with(&guest, &itself, TABLE, &[]), 0), too_long);
        assert_eq!(walk(&mut with(&guest, &[indirect(TABLE, 16)], TABLE, &itself), 0), too_long);
        let each_other = [writable(0x9000, len, Some(1)), writable(0x9000, len, Some(0))];
        assert_eq!(walk(&mut with(&guest, &each_other, TABLE, &[]), 0), too_long);
    }
}

#[test]
fn test_chains_up_to_the_limit_are_walked_and_nothing_is_allocated() {
    let guest = guest();
    let (ring, queue) = raw(&guest, 2048, false, 0);
    let long = |count: u16, address, len| {
        for index in 0..count {
            ring.set_descriptor(index, writable(address, len, (index + 1 < count).then_some(index + 1)));
        }
    };
    let mut pieces = Vec::with_capacity(CHAIN_DESCS_MAX);
    long(CHAIN_DESCS_MAX as u16, FAR, 1);
    assert_eq!(queue.walk(0, Direction::DeviceWrites, &mut 0, &mut pieces), Ok(()));
    assert_eq!((pieces.len(), pieces.capacity()), (CHAIN_DESCS_MAX, CHAIN_DESCS_MAX));

    let too_long = Err(QueueFault::ChainTooLong { head: 0, limit: CHAIN_DESCS_MAX as u32 });
    pieces.clear();
    long(CHAIN_DESCS_MAX as u16 + 1, FAR, 1);
    assert_eq!(queue.walk(0, Direction::DeviceWrites, &mut 0, &mut pieces), too_long);

    // Every piece becomes two: more than there is room for.
    pieces.clear();
    long(600, REGION_BYTES - 1, 2);
    assert_eq!(queue.walk(0, Direction::DeviceWrites, &mut 0, &mut pieces), too_long);
    assert_eq!(pieces.capacity(), CHAIN_DESCS_MAX);
}

#[test]
fn test_every_piece_must_go_the_queues_way() {
    let guest = guest();
    let readable = Descriptor { flags: 0, ..writable(0x9000, 1, None) };
    let table = [writable(0x9000, 1, Some(1)), readable];
    assert_eq!(walk(&mut with(&guest, &table, TABLE, &[]), 0), Err(QueueFault::WrongDirection { head: 0 }));
    let queue = with(&guest, &table, TABLE, &[]);
    let mut pieces = Vec::with_capacity(CHAIN_DESCS_MAX);
    assert_eq!(queue.walk(1, Direction::DeviceReads, &mut 0, &mut pieces), Ok(()));
    assert_eq!(queue.walk(0, Direction::DeviceReads, &mut 0, &mut pieces), Err(QueueFault::WrongDirection { head: 0 }));
}
