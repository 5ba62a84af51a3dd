//! Scenes for microbenchmarks: a pump under steady traffic one way, over the model kernel.
//!
//! A scene alternates between [`Scene::prepare`], in which driver and kernel do their parts, and [`Scene::round`], which
//! is the pump's loop and nothing else: that is what is counted and timed. The other direction has a running queue with
//! nothing in it, as most rounds of a real pump do.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
use mpassthru_testing::memory::GuestPhysAddr;

use super::{Command, CommandQueue, EventQueue, PollMode, Pump, PumpView, SourceLock};
use crate::fixture::{Guest, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, memfd};
use crate::guest_memory::PAGE_BYTES;
use crate::offload::checksum::Sum;
use crate::virtqueue::{InflightRecord, record_bytes};
use crate::xsk::test_kernel::{Received, TestKernel};
use crate::xsk::{BindMode, UmemLayout};

/// As Linux guests of QEMU's have them.
const QUEUE_SIZE: u16 = 256;
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF | VIRTIO_RING_F_EVENT_IDX | OFFLOADS;
/// VIRTIO_NET_F_GUEST_CSUM and _GUEST_TSO4: of guests that take frames merged.
const MERGING: u64 = 1 << 1 | 1 << 7;
/// VIRTIO_NET_F_CSUM, _HOST_TSO4 and _HOST_TSO6: that nothing is asked for has to be read from each frame.
const OFFLOADS: u64 = 1 | 1 << 11 | 1 << 12;
const HEADER_BYTES: u32 = 12;
/// A port's longest frame at MTU 1500: with Ethernet header and two VLAN tags.
const FRAME_MAX: u32 = 1522;
const BUFFER_BYTES: u64 = 2048;
const RINGS_BYTES: u64 = 4 * PAGE_BYTES;

/// Which way frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

/// Whether frames stay where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// They stay in the guest's buffers.
    Direct,
    /// They are copied through the slab.
    Bounce,
    /// rx: they are segments of one TCP stream, and become one packet.
    Merged,
}

/// A kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Which way.
    pub way: Way,
    /// Direct or not.
    pub path: Path,
    /// Length of each frame.
    pub frame_bytes: u32,
    /// Frames of each round.
    pub burst: u32,
}

/// A pump under one kind of traffic.
pub struct Scene {
    plan: Plan,
    pump: Pump,
    kernel: TestKernel,
    driver: SplitDriver,
    /// Those of a round.
    frames: Vec<Vec<u8>>,
}

/// Segments of a TCP stream over IPv4, with timestamps.
fn stream(count: u32, frame_bytes: u32) -> Vec<Vec<u8>> {
    const HEADERS_BYTES: u32 = 14 + 20 + 32;
    let payload = frame_bytes - HEADERS_BYTES;
    let segment = |number: u32| {
        let mut frame = vec![0xa5; frame_bytes as usize];
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[16..18].copy_from_slice(&(frame_bytes as u16 - 14).to_be_bytes());
        frame[18..20].copy_from_slice(&(number as u16).to_be_bytes());
        // DF, TTL 64, TCP, no checksum yet.
        frame[20..26].copy_from_slice(&[0x40, 0, 64, 6, 0, 0]);
        frame[38..42].copy_from_slice(&(number * payload).to_be_bytes());
        // 32 bytes of header, ACK; window; no checksum yet.
        frame[46..52].copy_from_slice(&[0x80, 0x10, 0, 0, 0, 0]);
        let checksum = |bytes: [&[u8]; 2]| {
            let mut sum = Sum::default();
            bytes.iter().for_each(|bytes| sum.add_bytes(bytes));
            sum.checksum()
        };
        let ip = checksum([&frame[14..34], &[]]);
        frame[24..26].copy_from_slice(&ip);
        let len = (frame_bytes as u16 - 34).to_be_bytes();
        let tcp = checksum([&frame[26..], &[0, 6, len[0], len[1]]]);
        frame[50..52].copy_from_slice(&tcp);
        frame
    };
    (0..count).map(segment).collect()
}

/// Every virtqueue has one: the front-end's or the broker's.
fn record() -> InflightRecord {
    let file = memfd("record", record_bytes(u32::from(QUEUE_SIZE), false));
    InflightRecord::map(file.as_raw_fd(), 0, u32::from(QUEUE_SIZE), false).unwrap()
}

impl Scene {
    /// Queues, buffers and socket; the pump has made its first rounds.
    pub fn new(plan: Plan) -> Self {
        let buffers = u64::from(QUEUE_SIZE);
        let guest = Guest::of_pages((2 * RINGS_BYTES + buffers * BUFFER_BYTES) / PAGE_BYTES);
        let layouts = [0, RINGS_BYTES].map(|start| RingLayout::contiguous(GuestPhysAddr(start), QUEUE_SIZE));
        let [rx, tx] = layouts.map(|layout| SplitDriver::new(&guest.vmm, layout, true).unwrap());
        let umem = UmemLayout::for_frames(FRAME_MAX).unwrap();
        let (kernel, mut xsk) = TestKernel::bind(&guest.memory, umem, BindMode::Copy);
        xsk.rules.direct = plan.path != Path::Bounce;
        // As the real one does in copy mode, at all times.
        kernel.ask_for_tx_wakeup(true);

        let (commands, events) = (Arc::new(CommandQueue::new().unwrap()), Arc::new(EventQueue::new().unwrap()));
        let mut pump =
            Pump::new(0, PollMode::Adaptive, SourceLock::open(), commands, events, Arc::new(PumpView::default()));
        pump.flight.start(BindMode::Copy);
        pump.xsk = Some(xsk);
        pump.memory = Some(Arc::clone(&guest.memory));
        for (tx, layout) in [false, true].into_iter().zip(&layouts) {
            let features = FEATURES | if plan.path == Path::Merged { MERGING } else { 0 };
            let mut config = Box::new(guest.vring_config(layout, features));
            config.record = Some(record());
            pump.execute(Command::Start { tx, memory: Arc::clone(&guest.memory), config }).unwrap();
        }
        let driver = if plan.way == Way::Rx { rx } else { tx };
        let frames = match plan.path {
            Path::Merged => stream(plan.burst, plan.frame_bytes),
            _ => vec![vec![0xa5; plan.frame_bytes as usize]; plan.burst as usize],
        };
        let mut scene = Self { plan, pump, kernel, driver, frames };
        scene.post_first();
        scene
    }

    /// Posts all rx buffers, or a round's frames. Of frames that are sent in place, another round's are with the driver
    /// while those are with the kernel.
    fn post_first(&mut self) {
        let burst = u64::from(self.plan.burst);
        match (self.plan.way, self.plan.path) {
            (Way::Rx, _) => self.post(0..u64::from(QUEUE_SIZE)),
            (Way::Tx, Path::Bounce) => self.post(0..burst),
            (Way::Tx, _) => {
                self.post(0..burst);
                self.kernel_sends();
                self.post(burst..2 * burst);
            }
        }
    }

    fn post(&mut self, numbers: Range<u64>) {
        for number in numbers {
            let at = GuestPhysAddr(2 * RINGS_BYTES + number * BUFFER_BYTES);
            let piece = match self.plan.way {
                Way::Rx => Segment::writable(at, BUFFER_BYTES as u32),
                Way::Tx => Segment::readable(at, HEADER_BYTES + self.plan.frame_bytes),
            };
            self.driver.add(&[piece]).unwrap();
        }
        self.driver.publish();
        self.round();
    }

    /// The parts of driver and kernel: what was sent is complete, what was used is posted again, frames arrive.
    pub fn prepare(&mut self) {
        self.kernel_sends();
        while let Some(used) = self.driver.pop_used() {
            self.driver.repost(used.unwrap().head);
        }
        // As a driver under load, which polls.
        self.driver.disable_notifications();
        self.driver.publish();
        if self.plan.way == Way::Rx {
            for frame in &self.frames {
                let received = self.kernel.receive(frame, 0);
                assert!(matches!(received, Received::At(_)), "a buffer is there: {received:?}");
            }
        }
    }

    fn kernel_sends(&mut self) {
        self.kernel.tx_wakeups();
        self.kernel.send(usize::MAX);
        while self.kernel.sending() > 0 {
            self.kernel.complete(0);
        }
    }

    /// One round of the pump's loop.
    #[inline]
    pub fn round(&mut self) -> bool {
        self.pump.round()
    }

    /// Frames that the pump has handed on so far, and how many of them were copied.
    pub fn frames(&self) -> (u64, u64) {
        let counts = if self.plan.way == Way::Rx { &self.pump.rx_counts } else { &self.pump.tx_counts };
        (counts.frames, counts.frames - counts.direct)
    }
}
