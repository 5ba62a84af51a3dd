//! Memory that is added while virtqueues run: copied at first, direct with the next socket.

use std::sync::Arc;

use mpassthru_testing::driver::Segment;
use mpassthru_testing::memory::{self as vmm, GuestPhysAddr, RegionConfig};

use super::{Bench, Command, PollMode};
use crate::fixture::{Guest, specs};
use crate::guest_memory::{GuestMemory, PAGE_BYTES};
use crate::pump::slab_bytes;
use crate::stats::BounceReason;

const ADDED_AT: u64 = 1 << 32;
const UNREGISTERED: usize = BounceReason::Unregistered as usize;

/// A guest with two regions of 64 pages, of which the data path has the first.
fn bench() -> Bench {
    let regions = [RegionConfig::memfd(0, 64 * PAGE_BYTES), RegionConfig::memfd(ADDED_AT, 64 * PAGE_BYTES)];
    let vmm = Arc::new(vmm::GuestMemory::new(&regions).unwrap());
    let memory = Arc::new(GuestMemory::map(&specs(&vmm)[..1], slab_bytes(1)).unwrap());
    Bench::of(Guest { vmm, memory }, PollMode::Interrupt)
}

fn add_memory(bench: &mut Bench) {
    let more = bench.guest.memory.with_regions(&specs(&bench.guest.vmm)[1..]).unwrap().unwrap();
    bench.guest.memory = Arc::new(more);
    bench.pump.execute(Command::SetMemory { memory: Arc::clone(&bench.guest.memory) }).unwrap();
}

#[test]
fn test_rx_buffers_in_added_memory_are_copied_to_until_the_next_socket() {
    let mut bench = bench();
    let mut kernel = bench.attach();
    bench.start(false);
    add_memory(&mut bench);
    for number in 0..2 {
        let at = GuestPhysAddr(ADDED_AT + 2048 * number);
        bench.drivers[0].add(&[Segment::writable(at, 1600)]).unwrap();
    }
    bench.drivers[0].publish();
    bench.pump.work();
    kernel.receive(&[1; 100], 0);
    bench.pump.work();
    assert_eq!((bench.take(false), bench.pump.rx_counts.bounced[UNREGISTERED]), (1, 1));

    bench.pump.execute(Command::Detach).unwrap();
    bench.pump.reclaim();
    let mut kernel = bench.attach();
    bench.pump.work();
    kernel.receive(&[2; 100], 0);
    bench.pump.work();
    assert_eq!((bench.take(false), bench.pump.rx_counts.direct), (1, 1));
    let mut frame = [0; 112];
    bench.guest.vmm.read(GuestPhysAddr(ADDED_AT + 2048), &mut frame).unwrap();
    assert_eq!(frame[12..], [2; 100]);
}

#[test]
fn test_tx_frames_in_added_memory_are_copied_even_by_one_piece() {
    let mut bench = bench();
    let mut kernel = bench.attach();
    bench.start(true);
    add_memory(&mut bench);
    let (old, new) = (GuestPhysAddr(0x8000), GuestPhysAddr(ADDED_AT));
    bench.drivers[1].add(&[Segment::readable(old, 72)]).unwrap();
    bench.drivers[1].add(&[Segment::readable(old.plus(2048), 72), Segment::readable(new, 60)]).unwrap();
    bench.drivers[1].publish();
    bench.pump.work();
    assert_eq!(kernel.send(8), 2);
    assert_eq!((bench.pump.tx_counts.direct, bench.pump.tx_counts.bounced[UNREGISTERED]), (1, 1));
}

#[test]
fn test_the_last_buffer_in_front_of_added_memory_goes_on_being_direct() {
    let mut bench = bench();
    let mut kernel = bench.attach();
    bench.start(false);
    add_memory(&mut bench);
    let last = GuestPhysAddr(64 * PAGE_BYTES - 1600);
    bench.drivers[0].add(&[Segment::writable(last, 1600)]).unwrap();
    bench.drivers[0].publish();
    bench.pump.work();
    kernel.receive(&[1; 1500], 0);
    bench.pump.work();
    assert_eq!((bench.take(false), bench.pump.rx_counts.direct), (1, 1));
}
