//! A guest that posts buffers of any shape, the device, and a kernel that fills them.
//!
//! Each head has a slot of guest memory of its own, guarded: its bytes outside the posted pieces must never change.

use std::collections::{HashMap, VecDeque};

use mpassthru_testing::driver::{IndirectTables, QueueDriver, RingLayout, Segment, Used};
use mpassthru_testing::memory::{GuestPhysAddr, RegionConfig};

use super::super::Rx;
use crate::fixture::{Guest, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF};
use crate::guest_memory::UmemAddr;
use crate::pump::slab::Slab;
use crate::pump::vring::Vring;
use crate::stats::{Counts, DropReason};
use crate::xsk::test_kernel::{Received, TestKernel};
use crate::xsk::{BindMode, LONG_FRAME_BYTES_MAX, UmemLayout, XskSocket};

pub const QUEUE_SIZE: u16 = 64;
const SLOT_BYTES: u64 = 8192;
/// Of a bench for long frames.
const LONG_SLOT_BYTES: u64 = 16384;
const SLOTS_AT: u64 = 0x1_0000;
pub const MEMORY_END: u64 = SLOTS_AT + SLOT_BYTES * QUEUE_SIZE as u64;
const TABLES: IndirectTables = IndirectTables { start: GuestPhysAddr(0x4000), entries: 16 };
const GUARD: u8 = 0xa5;
const GUEST_CSUM: u64 = 1 << 1;
/// Those of a driver that takes all that can be merged.
pub const MERGING: u64 = GUEST_CSUM | 1 << 7 | 1 << 8 | 1 << 54 | 1 << 55;

/// The pieces of a buffer: for each, its distance from the end of the one before, and its length.
pub type Shape = Vec<(u64, u32)>;

/// A frame that the guest received.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivered {
    pub frame: Vec<u8>,
    pub net_header: [u8; 10],
    pub num_buffers: u16,
}

/// Those of a driver of today, which can merge buffers or not.
pub fn features(mergeable: bool) -> u64 {
    VIRTIO_F_VERSION_1 | if mergeable { VIRTIO_NET_F_MRG_RXBUF } else { 0 }
}

pub struct Bench {
    guest: Guest,
    layout: RingLayout,
    features: u64,
    slot_bytes: u64,
    pub umem: UmemLayout,
    pub driver: QueueDriver,
    pub rx: Rx,
    pub xsk: XskSocket,
    pub kernel: TestKernel,
    pub slab: Slab,
    pub counts: Counts,
    /// What is posted: slot and pieces, by head.
    posted: HashMap<u16, (u64, Vec<Segment>)>,
    free_slots: Vec<u64>,
    next_frame: u64,
    /// Frames in the rx ring or in the guest's hands: how many bytes lie in the guest's own memory where they should.
    pub in_place: HashMap<u64, u32>,
    /// Parts of a frame whose other heads are not used yet; none between bursts.
    partial: VecDeque<Used>,
    /// Heads that came back without a frame.
    pub returned_empty: u64,
}

impl Bench {
    pub fn new(mergeable: bool, frame_max: u32) -> Self {
        Self::of(features(mergeable), frame_max)
    }

    /// With these features.
    pub fn of(features: u64, frame_max: u32) -> Self {
        Self::over(&Guest::new(&[RegionConfig::memfd(0, MEMORY_END)]), features, frame_max)
    }

    /// In this guest, whose memory from 0 to [`MEMORY_END`] is rings and slots.
    pub fn over(guest: &Guest, features: u64, frame_max: u32) -> Self {
        Self::for_frames(guest.clone(), frame_max, features, frame_max, SLOT_BYTES)
    }

    /// For frames of up to [`LONG_FRAME_BYTES_MAX`] bytes, in pieces of up to `room` bytes.
    pub fn for_long_frames(features: u64, room: u32) -> Self {
        let memory_end = SLOTS_AT + LONG_SLOT_BYTES * u64::from(QUEUE_SIZE);
        let guest = Guest::new(&[RegionConfig::memfd(0, memory_end)]);
        Self::for_frames(guest, LONG_FRAME_BYTES_MAX, features, room, LONG_SLOT_BYTES)
    }

    fn for_frames(guest: Guest, frame_max: u32, features: u64, room: u32, slot_bytes: u64) -> Self {
        let layout = RingLayout::contiguous(GuestPhysAddr(0), QUEUE_SIZE);
        let packed = features & VIRTIO_F_RING_PACKED != 0;
        let mut driver = QueueDriver::new(&guest.vmm, layout, false, packed).unwrap();
        driver.use_indirect_tables(TABLES).unwrap();
        let rx = Rx::new(Vring::new(guest.memory.clone(), guest.vring_config(&layout, features)).unwrap());
        let umem = UmemLayout::for_frames(room).unwrap();
        let (kernel, xsk) = TestKernel::bind_for(frame_max, &guest.memory, umem, BindMode::Copy);
        Self {
            guest,
            layout,
            features,
            slot_bytes,
            umem,
            driver,
            rx,
            xsk,
            kernel,
            slab: Slab::new(0, 0),
            counts: Counts::default(),
            posted: HashMap::new(),
            free_slots: (0..u64::from(QUEUE_SIZE)).map(|slot| SLOTS_AT + slot * slot_bytes).collect(),
            next_frame: 0,
            in_place: HashMap::new(),
            partial: VecDeque::new(),
            returned_empty: 0,
        }
    }

    /// Posts a buffer; false if the ring or the memory is full.
    pub fn post(&mut self, shape: &Shape, indirect: bool) -> bool {
        let Some(&slot) = self.free_slots.last() else { return false };
        let mut at = slot;
        let mut pieces = Vec::new();
        for &(gap, len) in shape {
            pieces.push(Segment::writable(GuestPhysAddr(at + gap), len));
            at += gap + u64::from(len);
        }
        assert!(at <= slot + self.slot_bytes, "a shape fits a slot");
        let added = if indirect { self.driver.add_indirect(&pieces) } else { self.driver.add(&pieces) };
        let Ok(head) = added else { return false };
        self.guest.vmm.write(GuestPhysAddr(slot), &vec![GUARD; self.slot_bytes as usize]).unwrap();
        self.free_slots.pop();
        self.posted.insert(head, (slot, pieces));
        true
    }

    /// Posts `count` buffers of one shape and shows them to the device.
    pub fn post_many(&mut self, count: usize, shape: &[(u64, u32)]) {
        for _ in 0..count {
            assert!(self.post(&shape.to_vec(), false));
        }
        self.driver.publish();
    }

    /// A numbered frame of `len` bytes arrives, `shift` bytes further on than expected.
    pub fn receive(&mut self, len: u32, shift: u64) -> Received {
        let received = self.kernel.receive(&frame(self.next_frame, len), shift);
        if let Received::At(at) = received {
            let in_guest = at.0 >= self.guest.memory.slab_bytes();
            let piece = len.min(self.umem.frame_max);
            self.in_place.insert(self.next_frame, if in_guest && shift == 0 { piece } else { 0 });
            self.next_frame += 1;
        }
        received
    }

    /// A frame of somebody else's making arrives; whether there was room.
    pub fn receive_frame(&mut self, frame: &[u8]) -> bool {
        matches!(self.kernel.receive(frame, 0), Received::At(_))
    }

    pub fn burst(&mut self) -> u32 {
        self.rx.burst(&mut self.xsk, &mut self.slab, &mut self.counts).unwrap()
    }

    /// Bursts until there is nothing left to do.
    pub fn settle_down(&mut self) {
        while self.burst() > 0 {}
    }

    /// The driver takes what was used; every frame comes with all its buffers.
    pub fn take(&mut self) -> Vec<Delivered> {
        let mut delivered = Vec::new();
        while let Some(used) = self.driver.pop_used() {
            self.partial.push_back(used.unwrap());
            if let Some(frame) = self.assemble() {
                delivered.push(frame);
            }
        }
        assert!(self.partial.is_empty(), "buffers of one frame are published together: {:?}", self.partial);
        delivered
    }

    /// Puts a frame together once all its buffers are used, and frees them.
    fn assemble(&mut self) -> Option<Delivered> {
        let first = self.partial[0];
        if first.len == 0 {
            self.partial.clear();
            self.release(first);
            self.returned_empty += 1;
            return None;
        }
        let header_len = 12;
        let start = self.content(first);
        let num_buffers = u16::from_le_bytes([start[10], start[11]]);
        let net_header: [u8; 10] = start[..10].try_into().unwrap();
        assert!(net_header == [0; 10] || self.features & GUEST_CSUM != 0, "no offload was negotiated");
        if self.partial.len() < usize::from(num_buffers) {
            return None;
        }
        let mut bytes = Vec::new();
        for (index, used) in std::mem::take(&mut self.partial).into_iter().enumerate() {
            let capacity: u32 = self.posted[&used.head].1.iter().map(|piece| piece.len).sum();
            assert!(index + 1 == usize::from(num_buffers) || used.len == capacity, "all buffers but the last are full");
            bytes.extend(self.content(used));
            self.release(used);
        }
        Some(Delivered { frame: bytes.split_off(header_len), net_header, num_buffers })
    }

    /// The bytes that the device says it wrote.
    fn content(&self, used: Used) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in &self.posted[&used.head].1 {
            let mut part = vec![0; (piece.len as usize).min(used.len as usize - bytes.len())];
            self.guest.vmm.read(piece.address, &mut part).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    fn release(&mut self, used: Used) {
        self.assert_guarded(used.head);
        let (slot, _) = self.posted.remove(&used.head).unwrap();
        self.free_slots.push(slot);
        self.driver.release(used.head);
    }

    /// Asserts that nothing outside a head's pieces was written.
    fn assert_guarded(&self, head: u16) {
        let (slot, pieces) = &self.posted[&head];
        let mut bytes = vec![0; self.slot_bytes as usize];
        self.guest.vmm.read(GuestPhysAddr(*slot), &mut bytes).unwrap();
        for piece in pieces {
            let start = (piece.address.0 - slot) as usize;
            bytes[start..start + piece.len as usize].fill(GUARD);
        }
        assert!(bytes.iter().all(|&byte| byte == GUARD), "a byte outside the posted pieces {pieces:?} changed");
    }

    /// Closes the socket, gives everything back, and checks that each head is used once or in the avail ring.
    pub fn stop(&mut self) -> Vec<Delivered> {
        // A closed socket has let go of its memory: a new one takes its place.
        let frame_max = self.xsk.frame_max;
        (self.kernel, self.xsk) = TestKernel::bind_for(frame_max, &self.guest.memory, self.umem, BindMode::Copy);
        self.rx.recall(&mut self.slab);
        let delivered = self.take();
        let settled = self.driver.settle(self.rx.vring.queue.base()).unwrap();
        assert_eq!((settled.never_returned, settled.returned_twice), (0, 0));
        assert_eq!(settled.given_back, self.driver.outstanding());
        assert_eq!(self.slab.used(), 0);
        let posted: Vec<_> = self.posted.keys().copied().collect();
        posted.into_iter().for_each(|head| self.assert_guarded(head));
        delivered
    }

    /// Stops, and starts at the base that the stop returned.
    pub fn restart(&mut self) -> Vec<Delivered> {
        let delivered = self.stop();
        let mut config = self.guest.vring_config(&self.layout, self.features);
        config.queue.base = self.rx.vring.queue.base();
        config.enabled = self.rx.vring.enabled;
        self.rx = Rx::new(Vring::new(self.guest.memory.clone(), config).unwrap());
        delivered
    }

    /// Where a byte of the first slot to be posted lies in the UMEM.
    pub fn next_slot(&self) -> UmemAddr {
        self.guest.umem(*self.free_slots.last().unwrap())
    }

    /// Where guest-physical address 0 lies in the UMEM.
    pub fn umem_start(&self) -> UmemAddr {
        self.guest.umem(0)
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.counts.dropped[reason as usize]
    }
}

/// Frame `number`: its number, then bytes that depend on number and place.
pub fn frame(number: u64, len: u32) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend((8..u64::from(len)).map(|i| (i * 7 + number * 13) as u8));
    bytes.truncate(len as usize);
    bytes
}

/// The number of a frame that [`frame`] made.
pub fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}
