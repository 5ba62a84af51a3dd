//! What a broken driver of a packed virtqueue can and cannot do, and a second opinion on every ring there can be.

use mpassthru_testing::driver::{PackedDescriptor, RawPackedRing, RingLayout, flags, packed_flags};
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::{FAR, Guest, REGION_BYTES, guest, segments};
use crate::error::QueueFault;
use crate::fixture::{PACKED_START, cases};
use crate::guest_memory::{GuestPhysAddr as Phys, Segment};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction, PackedQueue, QueueConfig, Taken};

const AVAIL: u16 = packed_flags::VIRTQ_DESC_F_AVAIL;
const USED: u16 = packed_flags::VIRTQ_DESC_F_USED;
const NEXT: u16 = flags::VIRTQ_DESC_F_NEXT;
const WRITE: u16 = flags::VIRTQ_DESC_F_WRITE;
const INDIRECT: u16 = flags::VIRTQ_DESC_F_INDIRECT;
const TABLE: u64 = 0x8000;

/// A ring without rules, and the device on it.
fn raw(guest: &Guest, size: u16, base: u32) -> (RawPackedRing, PackedQueue) {
    let layout = RingLayout::packed(GuestPhysAddr(0x1000), size);
    let config = QueueConfig { base, packed: true, ..guest.queue_config(&layout, false) };
    (RawPackedRing::new(&guest.vmm, layout).unwrap(), PackedQueue::new(guest.memory.clone(), &config).unwrap())
}

/// An available descriptor of a fresh ring.
fn desc(address: u64, len: u32, id: u16, flags: u16) -> PackedDescriptor {
    PackedDescriptor { address, len, id, flags: flags | AVAIL }
}

fn take(queue: &mut PackedQueue) -> Result<Option<(Taken, Vec<Segment>)>, QueueFault> {
    let mut found = Vec::with_capacity(CHAIN_DESCS_MAX);
    Ok(queue.take(Direction::DeviceWrites, &mut 0, &mut found)?.map(|taken| (taken, found)))
}

/// What becomes of the first chain of a fresh ring of `size` that holds these.
fn first(size: u16, ring: &[PackedDescriptor], table: &[PackedDescriptor]) -> Result<Vec<Segment>, QueueFault> {
    let guest = guest();
    let (raw, mut queue) = raw(&guest, size, PACKED_START);
    (0..).zip(ring).for_each(|(slot, &descriptor)| raw.set_descriptor(slot, descriptor));
    (0..).zip(table).for_each(|(at, &entry)| raw.set_indirect(GuestPhysAddr(TABLE), at, entry).unwrap());
    assert!(queue.available() > 0);
    let before = (queue.base(), queue.position());
    let result = take(&mut queue);
    if result.is_err() {
        assert_eq!((queue.base(), queue.position()), before, "a broken chain is not taken");
    }
    result.map(|taken| taken.expect("it is available").1)
}

#[test]
fn test_a_chain_that_never_ends_is_a_fault() {
    let ring = [desc(0x9000, 1, 0, WRITE | NEXT); 5];
    assert_eq!(first(5, &ring, &[]), Err(QueueFault::ChainTooLong { head: 0, limit: 5 }));
    let long = vec![desc(0x9000, 1, 0, WRITE | NEXT); CHAIN_DESCS_MAX + 1];
    let limit = CHAIN_DESCS_MAX as u32;
    assert_eq!(first(2048, &long, &[]), Err(QueueFault::ChainTooLong { head: 0, limit }));
}

#[test]
fn test_a_chain_may_not_run_into_descriptors_that_are_in_flight() {
    let guest = guest();
    let (raw, mut queue) = raw(&guest, 4, PACKED_START);
    raw.set_descriptor(0, desc(0x9000, 1, 3, WRITE));
    assert_eq!(take(&mut queue).unwrap().unwrap().0.head, 3);
    (1..4).for_each(|slot| raw.set_descriptor(slot, desc(0x9000, 1, 1, WRITE | NEXT)));
    assert_eq!(take(&mut queue), Err(QueueFault::ChainTooLong { head: 1, limit: 3 }));
    raw.set_descriptor(3, desc(0x9000, 1, 1, WRITE));
    assert_eq!(take(&mut queue).unwrap().unwrap().0.head, 1);
    // The driver says that slot 0 is available once more, though nothing was used.
    raw.set_descriptor(0, PackedDescriptor { flags: WRITE | USED, ..desc(0x9000, 1, 2, 0) });
    assert_eq!((queue.available(), take(&mut queue)), (0, Ok(None)));
}

#[test]
fn test_buffer_ids_are_below_the_queue_size_and_stand_for_one_buffer_each() {
    assert_eq!(first(4, &[desc(0x9000, 1, 4, WRITE)], &[]), Err(QueueFault::HeadOutOfRange { head: 4, size: 4 }));
    assert_eq!(
        first(4, &[desc(0x9000, 1, u16::MAX, WRITE)], &[]),
        Err(QueueFault::HeadOutOfRange { head: u16::MAX, size: 4 })
    );
    // Only that of the last descriptor counts.
    assert!(first(4, &[desc(0x9000, 1, 99, WRITE | NEXT), desc(0x9000, 1, 3, WRITE)], &[]).is_ok());

    let guest = guest();
    let (raw, mut queue) = raw(&guest, 4, PACKED_START);
    (0..2).for_each(|slot| raw.set_descriptor(slot, desc(0x9000, 1, 2, WRITE)));
    let taken = take(&mut queue).unwrap().unwrap().0;
    assert_eq!(take(&mut queue), Err(QueueFault::IdInFlight { id: 2 }));
    queue.push_used(taken.head, 0);
    assert!(take(&mut queue).unwrap().is_some(), "it is free again");
}

#[test]
fn test_broken_indirect_tables_are_faults() {
    let good = [desc(0x9000, 7, 0, WRITE)];
    let refused = |ring: &[PackedDescriptor], table: &[PackedDescriptor]| {
        matches!(first(16, ring, table), Err(QueueFault::BadIndirectTable { head: 0, .. }))
    };
    let table = |at, len| desc(at, len, 1, INDIRECT);
    assert!(!refused(&[table(TABLE, 16)], &good));
    assert!(!refused(&[table(TABLE, 16 * 16)], &vec![good[0]; 16]), "as long as the queue");
    assert!(refused(&[table(TABLE, 16 * 17)], &vec![good[0]; 17]), "longer than the queue");
    assert!(refused(&[table(TABLE, 0)], &good), "empty");
    assert!(refused(&[table(TABLE, 24)], &good), "half a descriptor");
    assert!(refused(&[table(REGION_BYTES - 16, 32)], &good), "across two regions");
    assert!(refused(&[table(u64::MAX - 15, 16)], &good), "past the end of the address space");
    let chained = PackedDescriptor { flags: AVAIL | INDIRECT | NEXT, ..table(TABLE, 16) };
    assert!(refused(&[chained, good[0]], &good), "INDIRECT and NEXT");
    assert!(refused(&[desc(0x9000, 1, 0, WRITE | NEXT), table(TABLE, 16)], &good), "in a list");
}

#[test]
fn test_all_entries_of_an_indirect_table_count_and_write_is_their_only_flag() {
    let guest = guest();
    let entries = [(0x9000, 100, WRITE | NEXT), (0xa000, 3, WRITE), (FAR, 5, WRITE | INDIRECT | USED)];
    let table = entries.map(|(at, len, flags)| PackedDescriptor { address: at, len, id: 77, flags });
    let own = desc(TABLE, 48, 2, INDIRECT | WRITE);
    assert_eq!(first(16, &[own], &table).unwrap(), segments(&guest, entries.map(|(at, len, _)| (at, len))));
    let own = desc(TABLE, 48, 2, INDIRECT);
    let readable = table.map(|entry| PackedDescriptor { flags: 0, ..entry });
    assert_eq!(first(16, &[own], &readable), Err(QueueFault::WrongDirection { head: 0 }));
}

#[test]
fn test_a_table_longer_than_any_chain_is_not_walked() {
    let empty = PackedDescriptor { address: 0, len: 0, id: 0, flags: WRITE };
    let limit = CHAIN_DESCS_MAX as u32;
    let own = desc(TABLE, 16 * (limit + 1), 0, INDIRECT);
    assert_eq!(first(2048, &[own], &[empty]), Err(QueueFault::ChainTooLong { head: 0, limit }));
}

#[test]
fn test_buffers_outside_memory_and_of_the_wrong_direction_are_faults() {
    let outside = |address, len| Err(QueueFault::BufferOutsideMemory { head: 0, address, len_bytes: len });
    for (address, len) in [(2 * REGION_BYTES - 3, 4), (FAR - 1, 1), (u64::MAX, 1), (0x9000, u32::MAX)] {
        assert_eq!(first(4, &[desc(address, len, 0, WRITE)], &[]), outside(address, len));
    }
    assert_eq!(first(4, &[desc(0x9000, 1, 0, 0)], &[]), Err(QueueFault::WrongDirection { head: 0 }));
    let mixed = [desc(0x9000, 1, 0, WRITE | NEXT), desc(0x9000, 1, 0, 0)];
    assert_eq!(first(4, &mixed, &[]), Err(QueueFault::WrongDirection { head: 0 }));
}

/// Descriptors as a hostile driver writes them, leaning towards those that nearly make sense.
fn descriptor() -> impl Strategy<Value = PackedDescriptor> {
    let address = prop_oneof![
        4 => prop::sample::select(vec![0x9000u64, 0x9801, FAR, FAR + 77]),
        2 => Just(TABLE),
        1 => prop::sample::select(vec![REGION_BYTES - 5, 2 * REGION_BYTES - 5, FAR + REGION_BYTES - 5, u64::MAX - 3]),
    ];
    let len = prop_oneof![4 => prop::sample::select(vec![0u32, 1, 12, 1500]), 3 => (1u32..10).prop_map(|n| 16 * n)];
    let bits = prop_oneof![6 => Just(WRITE), 6 => Just(WRITE | NEXT), 3 => Just(INDIRECT), 1 => any::<u16>()];
    let lap = prop_oneof![5 => Just(AVAIL), 4 => Just(USED), 1 => Just(0), 1 => Just(AVAIL | USED)];
    (address, len, bits, lap, 0u16..9).prop_map(|(address, len, bits, lap, id)| {
        let flags = bits & !(AVAIL | USED) | lap;
        PackedDescriptor { address, len, id, flags }
    })
}

/// The device as the specification describes it, without regard to speed, over a copy of ring and table.
struct Model {
    ring: Vec<PackedDescriptor>,
    table: Vec<PackedDescriptor>,
    /// Counts slots, so that laps are its division by the size.
    avail: usize,
    ids: Vec<u16>,
    in_flight: usize,
}

/// A chain as the model finds it: its buffer id and its buffers; or a broken one.
type Chain = Result<(u16, Vec<(u64, u32)>), ()>;

impl Model {
    /// The next chain, if there is one.
    fn take(&mut self) -> Option<Chain> {
        let size = self.ring.len();
        let mut buffers = Vec::new();
        for count in 0..size - self.in_flight {
            let at = self.avail + count;
            let descriptor = self.ring[at % size];
            let lap = if (at / size).is_multiple_of(2) { AVAIL } else { USED };
            if count == 0 && descriptor.flags & (AVAIL | USED) != lap {
                return None;
            }
            if descriptor.flags & INDIRECT != 0 {
                let entries = descriptor.len as usize / 16;
                let fits =
                    descriptor.len.is_multiple_of(16) && (1..=size).contains(&entries) && descriptor.address == TABLE;
                if !fits || count > 0 || descriptor.flags & NEXT != 0 {
                    return Some(Err(()));
                }
                for entry in &self.table[..entries] {
                    buffers.push((entry.address, entry.len, entry.flags & WRITE != 0));
                }
            } else {
                buffers.push((descriptor.address, descriptor.len, descriptor.flags & WRITE != 0));
            }
            if descriptor.flags & NEXT == 0 {
                let id = descriptor.id;
                if usize::from(id) >= size || self.ids.contains(&id) || buffers.iter().any(|buffer| !buffer.2) {
                    return Some(Err(()));
                }
                self.avail += count + 1;
                self.in_flight += count + 1;
                self.ids.push(id);
                return Some(Ok((id, buffers.into_iter().map(|(at, len, _)| (at, len)).collect())));
            }
        }
        (self.in_flight < size).then_some(Err(()))
    }
}

/// Where buffers lie; `None` if one is outside memory.
fn located(guest: &Guest, buffers: &[(u64, u32)]) -> Option<Vec<Segment>> {
    let mut found = Vec::new();
    for &(address, len) in buffers {
        let (mut at, mut left) = (address, len);
        while left > 0 {
            let segment = guest.memory.translate(Phys(at), left, &mut 0)?;
            found.push(segment);
            left -= segment.len;
            at = at.checked_add(u64::from(segment.len))?;
        }
    }
    Some(found)
}

proptest! {
    #![proptest_config(cases(1500))]

    #[test]
    fn test_rings_are_read_as_a_model_of_the_specification_reads_them(
        ring in prop::collection::vec(descriptor(), 1..9),
        table in prop::collection::vec(descriptor(), 9),
        start in 0usize..16,
    ) {
        let guest = guest();
        let size = ring.len();
        let start = start % (2 * size);
        let bits = (start % size) as u32 | if start < size { 0x8000 } else { 0 };
        let (raw, mut queue) = raw(&guest, size as u16, bits | bits << 16);
        (0..).zip(&ring).for_each(|(slot, &descriptor)| raw.set_descriptor(slot, descriptor));
        (0..).zip(&table).for_each(|(at, &entry)| raw.set_indirect(GuestPhysAddr(TABLE), at, entry).unwrap());
        let mut model = Model { ring, table, avail: start, ids: Vec::new(), in_flight: 0 };
        loop {
            let is_there = queue.available() > 0;
            match (take(&mut queue), model.take()) {
                (Ok(Some((taken, found))), Some(Ok((id, buffers)))) => {
                    prop_assert_eq!((taken.head, Some(found)), (id, located(&guest, &buffers)));
                    prop_assert!(is_there);
                }
                (Ok(None), None) => {
                    prop_assert!(!is_there);
                    break;
                }
                (Err(_), Some(Err(()))) => break,
                (Err(QueueFault::BufferOutsideMemory { .. }), Some(Ok((_, buffers)))) => {
                    prop_assert_eq!(located(&guest, &buffers), None);
                    break;
                }
                (ours, theirs) => prop_assert!(false, "{:?} where the model has {:?}", ours, theirs),
            }
        }
    }
}

#[test]
fn test_the_model_is_awake() {
    let next = desc(FAR, 1, 9, WRITE | NEXT);
    let ring = vec![next, desc(FAR, 2, 1, WRITE), desc(TABLE, 16, 0, INDIRECT), desc(FAR, 3, 2, WRITE | NEXT)];
    let table = vec![desc(FAR, 4, 0, WRITE); 9];
    let mut model = Model { ring, table, avail: 0, ids: Vec::new(), in_flight: 0 };
    assert_eq!(model.take(), Some(Ok((1, vec![(FAR, 1), (FAR, 2)]))));
    assert_eq!(model.take(), Some(Ok((0, vec![(FAR, 4)]))));
    assert_eq!(model.take(), Some(Err(())), "a chain that runs into the first");
}
