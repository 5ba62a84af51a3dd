//! The device side of a split virtqueue against a well-behaved driver, a hostile one, and rust-vmm's device.

mod calls;
mod chains;
mod hostile;
mod inflight;
mod kicks;
mod log;
mod oracle;
mod packed_chains;
mod packed_events;
mod packed_inflight;
mod packed_rings;
mod rings;
mod threads;

use mpassthru_testing::driver::{Descriptor, RawRing, RingLayout, flags};
use mpassthru_testing::memory::{GuestPhysAddr, RegionConfig};

use super::{Direction, SplitQueue};
use crate::error::QueueFault;
use crate::fixture::Guest;
use crate::guest_memory::Segment;

/// Two neighbouring regions of 64 KiB from address 0 on, and one far away.
const REGION_BYTES: u64 = 0x1_0000;
const FAR: u64 = 0x10_0000;
const MEMORY_END: u64 = FAR + REGION_BYTES;

fn guest() -> Guest {
    Guest::new(&[
        RegionConfig::memfd(0, REGION_BYTES),
        RegionConfig::memfd(REGION_BYTES, REGION_BYTES),
        RegionConfig::memfd(FAR, REGION_BYTES),
    ])
}

/// The rings of a small queue. Not at address 0, which rust-vmm takes for "not set".
fn layout(size: u16) -> RingLayout {
    RingLayout::contiguous(GuestPhysAddr(0x1000), size)
}

/// A ring without rules, and the device on it. Avail and used indices start at `index`.
fn raw(guest: &Guest, size: u16, event_idx: bool, index: u16) -> (RawRing, SplitQueue) {
    let ring = RawRing::new(&guest.vmm, layout(size)).unwrap();
    ring.set_avail_idx(index);
    guest.vmm.write(ring.layout().used.plus(2), &index.to_le_bytes()).unwrap();
    let config = guest.queue_config(ring.layout(), event_idx);
    let queue = SplitQueue::new(guest.memory.clone(), &super::QueueConfig { base: index.into(), ..config }).unwrap();
    (ring, queue)
}

/// A device-writable descriptor; `next` continues the chain.
fn writable(address: u64, len: u32, next: Option<u16>) -> Descriptor {
    let more = if next.is_some() { flags::VIRTQ_DESC_F_NEXT } else { 0 };
    Descriptor { address, len, flags: flags::VIRTQ_DESC_F_WRITE | more, next: next.unwrap_or(0) }
}

fn indirect(address: u64, len: u32) -> Descriptor {
    Descriptor { address, len, flags: flags::VIRTQ_DESC_F_INDIRECT, next: 0 }
}

/// Walks the rx chain that starts at descriptor `head`.
fn walk(queue: &mut SplitQueue, head: u16) -> Result<Vec<Segment>, QueueFault> {
    let mut segments = Vec::with_capacity(super::CHAIN_DESCS_MAX);
    queue.walk(head, Direction::DeviceWrites, &mut 0, &mut segments).map(|()| segments)
}

/// Where guest-physical ranges lie, in one piece each.
fn segments<const N: usize>(guest: &Guest, ranges: [(u64, u32); N]) -> Vec<Segment> {
    ranges.map(|(address, len)| Segment { addr: guest.umem(address), len }).to_vec()
}
