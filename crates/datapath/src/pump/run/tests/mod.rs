//! A pump with a model kernel: its commands one by one, and its loop on a thread.

mod commands;
mod crash;
mod distrust;
mod faults;
mod memory;
mod thread;

use std::sync::Arc;

use mpassthru_testing::driver::{QueueDriver, RingLayout, Segment};
use mpassthru_testing::memory::GuestPhysAddr;

use super::{Command, CommandQueue, Event, EventQueue, PollMode, Pump, PumpView, SourceLock};
use crate::error::Error;
use crate::fixture::{
    Guest, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX,
};
use crate::pump::VringConfig;
use crate::xsk::test_kernel::TestKernel;
use crate::xsk::{BindMode, UmemLayout};

const QUEUE_SIZE: u16 = 32;
const RINGS: [RingLayout; 2] = [
    RingLayout { size: QUEUE_SIZE, desc: GuestPhysAddr(0), avail: GuestPhysAddr(0x800), used: GuestPhysAddr(0xa00) },
    RingLayout {
        size: QUEUE_SIZE,
        desc: GuestPhysAddr(0x1000),
        avail: GuestPhysAddr(0x1800),
        used: GuestPhysAddr(0x1a00),
    },
];
const BUFFERS_AT: u64 = 0x1_0000;
const BUFFER_BYTES: u64 = 2048;
const FEATURES: u64 = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF | VIRTIO_RING_F_EVENT_IDX;

/// A pump that is not on a thread, its guest, and a kernel once there is a socket.
struct Bench {
    guest: Guest,
    pump: Pump,
    commands: Arc<CommandQueue>,
    events: Arc<EventQueue>,
    /// rx and tx.
    drivers: [QueueDriver; 2],
    features: u64,
}

impl Bench {
    fn new(poll: PollMode) -> Self {
        Self::of(Guest::of_pages(64), poll)
    }

    /// With packed virtqueues.
    fn packed(poll: PollMode) -> Self {
        Self::with(Guest::of_pages(64), poll, FEATURES | VIRTIO_F_RING_PACKED)
    }

    fn of(guest: Guest, poll: PollMode) -> Self {
        Self::with(guest, poll, FEATURES)
    }

    fn with(guest: Guest, poll: PollMode, features: u64) -> Self {
        let (commands, events) = (Arc::new(CommandQueue::new().unwrap()), Arc::new(EventQueue::new().unwrap()));
        let view = Arc::new(PumpView::default());
        let pump = Pump::new(0, poll, SourceLock::open(), Arc::clone(&commands), Arc::clone(&events), view);
        let packed = features & VIRTIO_F_RING_PACKED != 0;
        let drivers = RINGS.map(|layout| QueueDriver::new(&guest.vmm, layout, true, packed).unwrap());
        Self { guest, pump, commands, events, drivers, features }
    }

    /// Gives the pump a socket whose kernel is ours, as Attach does with a real one.
    fn attach(&mut self) -> TestKernel {
        self.attach_in(BindMode::Copy)
    }

    fn attach_in(&mut self, mode: BindMode) -> TestKernel {
        let (kernel, xsk) = TestKernel::bind(&self.guest.memory, UmemLayout::for_frames(1524).unwrap(), mode);
        self.pump.flight.start(mode);
        *self.pump.view.socket.lock().unwrap() = Some(xsk.shared_umem());
        self.pump.xsk = Some(xsk);
        self.pump.memory = Some(Arc::clone(&self.guest.memory));
        kernel
    }

    fn vring(&self, tx: bool) -> VringConfig {
        self.guest.vring_config(&RINGS[usize::from(tx)], self.features)
    }

    fn start(&mut self, tx: bool) {
        let (memory, config) = (Arc::clone(&self.guest.memory), Box::new(self.vring(tx)));
        self.pump.execute(Command::Start { tx, memory, config }).unwrap();
    }

    /// Posts `count` buffers of `len` bytes, one behind the other in memory.
    fn post(&mut self, tx: bool, count: u64, len: u32) {
        for number in 0..count {
            let at = GuestPhysAddr(BUFFERS_AT + (2 * number + u64::from(tx)) * BUFFER_BYTES);
            let piece = if tx { Segment::readable(at, len) } else { Segment::writable(at, len) };
            self.drivers[usize::from(tx)].add(&[piece]).unwrap();
        }
        self.drivers[usize::from(tx)].publish();
    }

    /// Pops and frees what was used; its number.
    fn take(&mut self, tx: bool) -> usize {
        let driver = &mut self.drivers[usize::from(tx)];
        let mut count = 0;
        while let Some(used) = driver.pop_used() {
            driver.release(used.unwrap().head);
            count += 1;
        }
        count
    }

    /// Stops a queue and checks that every head is used once or given back at its base.
    fn stop(&mut self, tx: bool) -> u64 {
        let base = self.pump.execute(Command::Stop { tx }).unwrap();
        self.take(tx);
        let settled = self.drivers[usize::from(tx)].settle(base as u32).unwrap();
        assert_eq!((settled.never_returned, settled.returned_twice), (0, 0));
        assert_eq!(settled.given_back, self.drivers[usize::from(tx)].outstanding());
        base
    }
}

/// The message of a refused command.
fn refused(result: Result<u64, Error>) -> String {
    match result {
        Err(Error::Refused(message)) => message,
        other => panic!("not refused: {other:?}"),
    }
}
