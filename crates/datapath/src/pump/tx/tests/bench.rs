//! A guest that sends chains of any shape, the device, and a kernel that sends and completes in any order.
//!
//! What a chain refers to is overwritten as soon as its head is used: a head that is used too early shows as a frame
//! with the wrong bytes, for the kernel reads them as late as it may.

use std::collections::HashMap;
use std::sync::Arc;

use mpassthru_testing::driver::{IndirectTables, QueueDriver, RingLayout, Segment};
use mpassthru_testing::memory::GuestPhysAddr;

use super::super::{Tx, TxInFlight};
use crate::fixture::{Guest, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use crate::guest_memory::{GuestMemory, UmemAddr};
use crate::pump::SourceLock;
use crate::pump::vring::Vring;
use crate::stats::{BounceReason, Counts, DropReason};
use crate::xsk::test_kernel::TestKernel;
use crate::xsk::{BindMode, UmemLayout, XskSocket};

pub const QUEUE_SIZE: u16 = 128;
pub const FRAME_MAX: u32 = 1524;
const TABLES: IndirectTables = IndirectTables { start: GuestPhysAddr(0x4000), entries: 32 };
const SLOT_BYTES: u64 = 4096;
/// Of a bench for long frames.
pub const LONG_SLOT_BYTES: u64 = 16384;
/// Memory that many frames refer to at once, and that never changes.
const SHARED_AT: u64 = 0x2_0000;
const SHARED_BYTES: u64 = 8192;
const SLOTS_AT: u64 = SHARED_AT + SHARED_BYTES;

/// A piece of a frame.
#[derive(Debug, Clone, Copy)]
pub enum Piece {
    /// In memory of the frame's own: distance from the piece before, and length.
    Own(u64, u32),
    /// In shared memory: offset and length.
    Shared(u64, u32),
}

/// A chain: whether the header has a piece of its own, and the frame.
#[derive(Debug, Clone)]
pub struct Chain {
    pub split_header: bool,
    pub indirect: bool,
    pub pieces: Vec<Piece>,
}

impl Chain {
    pub fn of(pieces: &[Piece]) -> Self {
        Self { split_header: true, indirect: true, pieces: pieces.to_vec() }
    }
}

pub struct Bench {
    guest: Guest,
    layout: RingLayout,
    features: u64,
    mode: BindMode,
    lock: SourceLock,
    slot_bytes: u64,
    pub driver: QueueDriver,
    pub tx: Tx,
    pub flight: TxInFlight,
    pub xsk: XskSocket,
    pub kernel: TestKernel,
    pub counts: Counts,
    /// Slot and pieces of what is posted, by head.
    posted: HashMap<u16, (u64, Vec<Segment>)>,
    free_slots: Vec<u64>,
    next_frame: u64,
    /// Frames that were posted and have not been seen on the wire, by content.
    pub unsent: HashMap<Vec<u8>, u32>,
    /// Frames may be sent again: a head was given back of which a part had left.
    pub may_repeat: bool,
    /// Frames seen on the wire, and their bytes.
    pub sent: (u64, u64),
    pub used: u64,
}

impl Bench {
    pub fn new(mode: BindMode) -> Self {
        Self::for_frames(FRAME_MAX, mode, SLOT_BYTES)
    }

    /// With packed virtqueues, if it is to have them.
    pub fn packed(mut self, packed: bool) -> Self {
        self.features |= if packed { VIRTIO_F_RING_PACKED } else { 0 };
        self.driver = QueueDriver::new(&self.guest.vmm, self.layout, false, packed).unwrap();
        self.driver.use_indirect_tables(TABLES).unwrap();
        let config = self.guest.vring_config(&self.layout, self.features);
        self.tx = Tx::new(Vring::new(self.guest.memory.clone(), config).unwrap(), self.lock.clone());
        self
    }

    /// With the guest's source address locked to these.
    pub fn locked(mut self, sources: &[[u8; 6]]) -> Self {
        self.lock = SourceLock::to(sources);
        let config = self.guest.vring_config(&self.layout, self.features);
        self.tx = Tx::new(Vring::new(self.guest.memory.clone(), config).unwrap(), self.lock.clone());
        self
    }

    /// For frames of up to `frame_max` bytes, each with its memory in a slot.
    pub fn for_frames(frame_max: u32, mode: BindMode, slot_bytes: u64) -> Self {
        Self::with_features(VIRTIO_F_VERSION_1, frame_max, mode, slot_bytes)
    }

    /// The same, with a driver that has negotiated `features`.
    pub fn with_features(features: u64, frame_max: u32, mode: BindMode, slot_bytes: u64) -> Self {
        let guest = Guest::of_pages((SLOTS_AT + slot_bytes * u64::from(QUEUE_SIZE)) / 4096);
        let shared: Vec<u8> = (0..SHARED_BYTES).map(|i| (i * i / 7 + i) as u8).collect();
        guest.vmm.write(GuestPhysAddr(SHARED_AT), &shared).unwrap();
        let layout = RingLayout::contiguous(GuestPhysAddr(0), QUEUE_SIZE);
        let mut driver = QueueDriver::new(&guest.vmm, layout, false, false).unwrap();
        driver.use_indirect_tables(TABLES).unwrap();
        let config = guest.vring_config(&layout, features);
        let tx = Tx::new(Vring::new(guest.memory.clone(), config).unwrap(), SourceLock::open());
        let umem = UmemLayout::for_frames(FRAME_MAX).unwrap();
        let (kernel, xsk) = TestKernel::bind_for(frame_max, &guest.memory, umem, mode);
        let mut flight = TxInFlight::new(0);
        flight.start(mode);
        Self {
            guest,
            layout,
            features,
            mode,
            lock: SourceLock::open(),
            slot_bytes,
            driver,
            tx,
            flight,
            xsk,
            kernel,
            counts: Counts::default(),
            posted: HashMap::new(),
            free_slots: (0..u64::from(QUEUE_SIZE)).map(|slot| SLOTS_AT + slot * slot_bytes).collect(),
            next_frame: 0,
            unsent: HashMap::new(),
            may_repeat: false,
            sent: (0, 0),
            used: 0,
        }
    }

    /// Posts a chain; false if the ring is full.
    pub fn post(&mut self, chain: &Chain) -> bool {
        let Some(&slot) = self.free_slots.last() else { return false };
        let mut at = slot;
        let mut own = |gap: u64, len: u32| {
            let piece = Segment::readable(GuestPhysAddr(at + gap), len);
            at += gap + u64::from(len);
            piece
        };
        let mut pieces = vec![own(3, 12)];
        pieces.extend(chain.pieces.iter().map(|&piece| match piece {
            Piece::Own(gap, len) => own(gap, len),
            Piece::Shared(offset, len) => Segment::readable(GuestPhysAddr(SHARED_AT + offset), len),
        }));
        assert!(at <= slot + self.slot_bytes, "a chain fits a slot");
        if !chain.split_header && pieces.len() > 1 && pieces[1].address == pieces[0].address.plus(12) {
            let header = pieces.remove(0);
            pieces[0] = Segment::readable(header.address, header.len + pieces[0].len);
        }
        let added = if chain.indirect { self.driver.add_indirect(&pieces) } else { self.driver.add(&pieces) };
        let Ok(head) = added else { return false };
        self.guest.vmm.write(GuestPhysAddr(slot), &content(self.next_frame, self.slot_bytes)).unwrap();
        let frame = self.read(&pieces).split_off(12);
        *self.unsent.entry(frame).or_default() += 1;
        self.free_slots.pop();
        self.posted.insert(head, (slot, pieces));
        self.next_frame += 1;
        true
    }

    /// Posts a header and a frame, cut into pieces of these lengths in turn, of which `segments` are to come; false if the
    /// ring is full.
    pub fn post_frame(&mut self, header: [u8; 10], frame: &[u8], cuts: &[usize], segments: &[Vec<u8>]) -> bool {
        let Some(&slot) = self.free_slots.last() else { return false };
        let bytes = [&header[..], &[0, 0], frame].concat();
        let (mut rest, mut at, mut pieces) = (&bytes[..], slot + 1, Vec::new());
        for &cut in cuts.iter().cycle() {
            // The last piece that a table has room for takes all that is left.
            let is_last = pieces.len() + 1 == usize::from(TABLES.entries);
            let (piece, behind) = rest.split_at(if is_last { rest.len() } else { cut.min(rest.len()) });
            pieces.push(Segment::readable(GuestPhysAddr(at), piece.len() as u32));
            self.guest.vmm.write(GuestPhysAddr(at), piece).unwrap();
            at += piece.len() as u64 + 1;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        assert!(at <= slot + self.slot_bytes, "a frame fits a slot");
        let Ok(head) = self.driver.add_indirect(&pieces) else { return false };
        for segment in segments {
            *self.unsent.entry(segment.clone()).or_default() += 1;
        }
        self.free_slots.pop();
        self.posted.insert(head, (slot, pieces));
        self.driver.publish();
        true
    }

    /// The guest changes the first bytes of all frames that it has posted, behind the virtio-net header.
    pub fn rewrite(&self, bytes: &[u8]) {
        for (_, pieces) in self.posted.values() {
            let mut at =
                pieces.iter().flat_map(|piece| (0..u64::from(piece.len)).map(|i| piece.address.plus(i))).skip(12);
            for byte in bytes {
                self.guest.vmm.write(at.next().unwrap(), &[*byte]).unwrap();
            }
        }
    }

    /// The memory of the frame that is posted next.
    pub fn next_slot(&self) -> (Arc<GuestMemory>, UmemAddr) {
        (self.guest.memory.clone(), self.guest.umem(*self.free_slots.last().unwrap()))
    }

    fn read(&self, pieces: &[Segment]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in pieces {
            let mut part = vec![0; piece.len as usize];
            self.guest.vmm.read(piece.address, &mut part).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    /// Posts chains and shows them to the device.
    pub fn post_all(&mut self, chains: &[Chain]) {
        for chain in chains {
            assert!(self.post(chain));
        }
        self.driver.publish();
    }

    pub fn burst(&mut self) -> u32 {
        self.tx.burst(&mut self.xsk, &mut self.flight, &mut self.counts).unwrap()
    }

    /// The kernel completes a packet, which must be a frame that was posted.
    pub fn complete(&mut self, index: usize) {
        let frame = self.kernel.complete(index);
        self.sent.0 += 1;
        self.sent.1 += frame.len() as u64;
        let left = self.unsent.get_mut(&frame).filter(|left| **left > 0 || self.may_repeat);
        let left = left.unwrap_or_else(|| panic!("a frame was sent that the guest did not post: {frame:02x?}"));
        *left = left.saturating_sub(1);
    }

    /// The driver takes what was used and overwrites its memory.
    pub fn take(&mut self) {
        while let Some(used) = self.driver.pop_used() {
            let used = used.unwrap();
            assert_eq!(used.len, 0, "the device writes nothing on tx");
            let (slot, pieces) = self.posted.remove(&used.head).unwrap();
            for piece in pieces.iter().filter(|piece| piece.address.0 >= SLOTS_AT) {
                self.guest.vmm.write(piece.address, &vec![0xee; piece.len as usize]).unwrap();
            }
            self.free_slots.push(slot);
            self.driver.release(used.head);
            self.used += 1;
        }
        self.assert_memory_is_held();
    }

    /// Asserts that every byte the kernel may still read belongs to a head that is not used: its own frame's, or that
    /// of a frame with the very same piece.
    fn assert_memory_is_held(&mut self) {
        let slab_bytes = self.guest.memory.slab_bytes();
        let offset = self.guest.umem(0).0;
        for (addr, len) in self.kernel.pieces_to_read().into_iter().filter(|&(addr, _)| addr >= slab_bytes) {
            let start = addr - offset;
            let holds = |piece: &Segment| {
                piece.address.0 <= start && start + u64::from(len) <= piece.address.0 + u64::from(piece.len)
            };
            let held = self.posted.values().flat_map(|(_, pieces)| pieces).any(holds);
            assert!(held, "{len} bytes at {start:#x} are still to be sent, and no head holds them");
        }
    }

    /// Kernel and device work until there is nothing left to do.
    pub fn settle_down(&mut self) {
        loop {
            let taken = self.kernel.send(usize::MAX);
            while self.kernel.sending() > 0 {
                self.complete(0);
            }
            let moved = self.burst();
            self.take();
            if taken == 0 && moved == 0 {
                break;
            }
        }
        assert!(self.flight.is_empty());
    }

    /// The socket is closed with frames in it; the queue stops and starts again.
    pub fn restart(&mut self) {
        let (kernel, xsk) = TestKernel::bind_for(self.xsk.frame_max, &self.guest.memory, self.xsk.layout, self.mode);
        (self.kernel, self.xsk) = (kernel, xsk);
        self.may_repeat |= self.tx.holds();
        self.tx.withdraw(&mut self.flight);
        self.flight.abandon(|head| self.tx.vring.queue.push_used(head, 0));
        self.tx.vring.flush();
        self.flight.start(self.mode);
        // What was in the kernel's hands may have left or not: here it has.
        self.sent.0 = self.counts.frames;
        self.take();
        let settled = self.driver.settle(self.tx.vring.queue.base()).unwrap();
        assert_eq!((settled.never_returned, settled.returned_twice), (0, 0));
        assert_eq!(settled.given_back, self.driver.outstanding());
        let mut config = self.guest.vring_config(&self.layout, self.features);
        config.queue.base = self.tx.vring.queue.base();
        config.enabled = self.tx.vring.enabled;
        self.tx = Tx::new(Vring::new(self.guest.memory.clone(), config).unwrap(), self.lock.clone());
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.counts.dropped[reason as usize]
    }

    pub fn bounced(&self, reason: BounceReason) -> u64 {
        self.counts.bounced[reason as usize]
    }

    pub fn dropped_frames(&self) -> u64 {
        self.counts.dropped.iter().sum()
    }

    pub fn bounced_frames(&self) -> u64 {
        self.counts.bounced.iter().sum()
    }
}

/// The memory of frame `number`.
fn content(number: u64, slot_bytes: u64) -> Vec<u8> {
    (0..slot_bytes).map(|i| (i * 11 + number * 37 + i / 256) as u8).collect()
}
