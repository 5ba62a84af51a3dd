//! Structure-aware fuzzing of descriptor rings: bytes become a case, a case is a driver, a wire and a control plane that
//! do as they please with a real pump over the model kernel.
//!
//! After every step: every head the device takes has a chain that an independent walk finds sound; a used entry names a
//! head that the device has, once, with no more bytes than it holds; a fault has a broken ring behind it; no byte of
//! guest memory has changed but in buffers that the device has, also when the NIC writes all that its rules let it; what
//! the kernel may read lies in buffers that the device has; a wanted call was made; where the source is locked, no frame
//! that leaves has another. At the end everything is stopped:
//! each head is used or given back by the base, nothing is left in flight, and the other end of a migration has all that
//! was written. A case without an end is found by whoever runs it.
//!
//! Where the driver makes its own memory ambiguous (rx buffers over rings, one head twice), the model cannot tell what
//! is whose any more; from there on only the code's own assertions, those of the model kernel and the clean end count.

mod migration;
mod model;
mod offload;
mod steps;
mod world;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arbitrary::{Result, Unstructured};

use self::model::{Ring, Side};
use self::world::{PLANS, World};
use super::{Command, CommandQueue, Event, EventQueue, PollMode, Pump, PumpView, SourceLock};
use crate::fixture::was_signalled;
use crate::guest_memory::GuestMemory;
use crate::pump::vring::Vring;
use crate::stats::DropReason;

/// More steps than this teach nothing new.
const STEPS_MAX: usize = 128;

thread_local! {
    static WORLDS: RefCell<[Option<World>; PLANS.len()]> = const { RefCell::new([const { None }; PLANS.len()]) };
}

/// Runs the case that `bytes` stand for. Panics if anything promised does not hold.
pub fn ring_case(bytes: &[u8]) {
    run(bytes, false);
}

/// As [`ring_case`], while a second thread writes to the rings all the time. Only safety and a clean end are promised
/// then, and no two runs are the same.
pub fn racing_ring_case(bytes: &[u8]) {
    run(bytes, true);
}

fn run(bytes: &[u8], racing: bool) {
    let mut bytes = Unstructured::new(bytes);
    // The large plan is for one case in sixteen.
    let choice = bytes.arbitrary::<u8>().unwrap_or(0);
    let plan = [0, 1, 2, 3, 0, 2, 4, 3, 0, 2, 4, 0, 0, 4, 0, 3][usize::from(choice % 16)];
    // A panic leaves no world behind.
    let world = WORLDS.with_borrow_mut(|worlds| worlds[plan].take()).unwrap_or_else(|| World::new(PLANS[plan]));
    let lock = if choice >> 6 == 1 { SourceLock::to(&[offload::SOURCE]) } else { SourceLock::open() };
    let mut case = Case::new(world, bytes, lock, racing);
    // Never or at once: nothing is to depend on how long a case takes.
    case.pump.unsent_patience = if choice >> 5 & 1 == 1 { Duration::ZERO } else { Duration::MAX };
    let stop = AtomicBool::new(!racing);
    let memory = Arc::clone(case.world.memory());
    let world = std::thread::scope(|scope| {
        if racing {
            let (world, stop) = (&case.world, &stop);
            let (start, end) = (world.umem(0), world.plan.buffers_at());
            scope.spawn(move || scribble(&memory, start.0, end, stop));
        }
        // Bytes that run out end the case like any other.
        let _ended_early: Result<()> = case.play();
        case.stop_all();
        // Relaxed: nothing but the end of a loop hangs on it.
        stop.store(true, Ordering::Relaxed);
        case.into_world()
    });
    WORLDS.with_borrow_mut(|worlds| worlds[plan] = Some(world));
}

/// Writes small numbers, which pass for indices, lengths and flags, all over the rings.
fn scribble(memory: &GuestMemory, start: u64, len_bytes: u64, stop: &AtomicBool) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    while !stop.load(Ordering::Relaxed) {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let at = start + (random >> 32) % (len_bytes / 2) * 2;
        memory.store_u16(crate::guest_memory::UmemAddr(at), (random >> 20) as u16 & 0x1f, Ordering::Relaxed);
    }
}

struct Case<'a> {
    world: World,
    pump: Pump,
    bytes: Unstructured<'a>,
    /// rx and tx.
    sides: [Side; 2],
    /// Whether the model knows what is whose.
    exact: bool,
    /// Whether somebody else writes to the rings.
    racing: bool,
    last_address: u64,
}

impl<'a> Case<'a> {
    fn new(world: World, bytes: Unstructured<'a>, lock: SourceLock, racing: bool) -> Self {
        let (commands, events) = (CommandQueue::new().expect("an eventfd"), EventQueue::new().expect("an eventfd"));
        let view = Arc::new(PumpView::default());
        let mut pump = Pump::new(0, PollMode::Adaptive, lock, Arc::new(commands), Arc::new(events), view);
        // The model kernel completes nothing by itself.
        pump.drain_deadline = Duration::ZERO;
        Self { world, pump, bytes, sides: Default::default(), exact: !racing, racing, last_address: 0 }
    }

    /// Both queues run in most cases before the first step.
    fn play(&mut self) -> Result<()> {
        self.choose_rules()?;
        self.attach();
        self.start(false)?;
        self.start(true)?;
        for _ in 0..STEPS_MAX {
            if self.bytes.is_empty() {
                break;
            }
            self.step()?;
        }
        Ok(())
    }

    fn vring(&self, tx: bool) -> Option<&Vring> {
        if tx { self.pump.tx.as_ref().map(|tx| &tx.vring) } else { self.pump.rx.as_ref().map(|rx| &rx.vring) }
    }

    fn ring(&self, tx: bool) -> Option<Ring> {
        self.sides[usize::from(tx)].ring
    }

    /// Lets the pump do something, and checks all that it did.
    fn observe<R>(&mut self, act: impl FnOnce(&mut Pump) -> R) -> R {
        let result = act(&mut self.pump);
        let broke = [false, true].map(|tx| self.check_queue(tx));
        if broke.contains(&true) {
            let fault = |event: &Event| if let Event::Fault { vring, .. } = event { Some(*vring) } else { None };
            let reported: Vec<usize> = self.pump.events.drain().iter().filter_map(fault).collect();
            let expected: Vec<usize> = (0..2).filter(|&index| broke[index]).collect();
            assert_eq!(reported, expected, "a fault is reported once");
        }
        self.check_memory();
        for tx in [false, true] {
            self.check_used(tx);
        }
        result
    }

    /// Whether it was stopped by a fault just now.
    fn check_queue(&mut self, tx: bool) -> bool {
        let Some((ring, vring)) = self.ring(tx).zip(self.vring(tx)) else { return false };
        let (position, faulted) = (vring.queue.position(), vring.faulted);
        let side = &mut self.sides[usize::from(tx)];
        let broke = faulted && !side.faulted;
        if self.exact {
            self.exact = side.take(&self.world, &ring, position, !tx);
            assert!(!broke || !self.exact || ring.is_broken(&self.world, position, !tx), "a fault without a cause");
        }
        side.faulted = faulted;
        broke
    }

    fn check_memory(&mut self) {
        let (rx, exact) = (&self.sides[0], self.exact);
        self.world.compare(self.world.plan.buffers_at(), |offset| {
            assert!(!exact || rx.holds(offset), "byte {offset:#x} changed, and no buffer is posted there");
        });
    }

    fn check_used(&mut self, tx: bool) {
        let Some(ring) = self.ring(tx).filter(|_| self.exact && self.vring(tx).is_some()) else { return };
        let side = &mut self.sides[usize::from(tx)];
        let old = side.used_idx;
        side.use_heads(&self.world, &ring);
        if ring.wants_call(&self.world, old, side.used_idx) {
            let call = self.vring(tx).and_then(|vring| vring.call.as_ref());
            assert!(call.is_none_or(was_signalled), "a call was not made");
        }
    }

    /// Everything that the kernel may still read lies in tx buffers that the device has, or is ours.
    fn check_reads(&mut self) {
        let slab_bytes = self.world.memory().slab_bytes();
        if !self.exact || self.pump.xsk.is_none() {
            return;
        }
        for (address, len) in self.world.kernel.pieces_to_read() {
            let end = address + u64::from(len);
            let held = address.checked_sub(slab_bytes).is_some_and(|start| {
                let inside = |&(at, room): &(u64, u64)| start >= at && start + u64::from(len) <= at + room;
                self.sides[1].taken.iter().any(|taken| taken.segments.iter().any(inside))
            });
            assert!(held || end <= slab_bytes, "the kernel reads {len} bytes at {address:#x}, which no head holds");
        }
    }

    /// Stops a queue, if it runs: refused while the kernel has buffers of it.
    fn stop(&mut self, tx: bool) {
        let Some(ring) = self.ring(tx) else { return };
        let Ok(base) = self.pump.execute(Command::Stop { tx }) else {
            assert!(self.pump.xsk.is_some(), "nothing keeps a queue without a socket from stopping");
            self.observe(|_| ());
            return;
        };
        assert!(base <= u64::from(u16::MAX), "a ring base has 16 bits");
        let base = base as u16;
        self.observe(|_| ());
        let (exact, side) = (self.exact, &mut self.sides[usize::from(tx)]);
        if exact {
            side.use_heads(&self.world, &ring);
            side.settle(base);
        }
        *side = Side { base, next_desc: side.next_desc, ..Side::default() };
        self.check_rings(tx, &ring);
    }

    /// Of all that is not buffers, the device may have written this queue's used ring, and that of the other one.
    fn check_rings(&mut self, tx: bool, stopped: &Ring) {
        let (other, exact) = (self.ring(!tx), self.exact);
        self.world.compare(0, |offset| {
            let inside = stopped.may_write(offset) || other.is_some_and(|ring| ring.may_write(offset));
            assert!(inside || !exact, "byte {offset:#x} of the rings changed");
        });
    }

    fn attach(&mut self) {
        let Some(xsk) = self.world.xsk.take() else { return };
        self.observe(|pump| {
            pump.reclaim();
            pump.flight.start(xsk.mode());
            pump.xsk = Some(xsk);
        });
        self.pump.memory = Some(Arc::clone(self.world.memory()));
    }

    /// The socket closes: the kernel forgets all that it had.
    fn detach(&mut self) {
        self.observe(Pump::drain);
        let Some(mut xsk) = self.pump.xsk.take() else { return };
        self.world.kernel.close(&mut xsk);
        self.world.xsk = Some(xsk);
        self.pump.detach();
    }

    fn stop_all(&mut self) {
        self.detach();
        self.stop(false);
        self.stop(true);
        // What was sent for a queue that stopped before its socket closed.
        self.pump.reclaim();
        let homeless = self.pump.rx_counts.dropped[DropReason::NoBuffer as usize];
        assert_eq!(homeless, 0, "a frame that arrives in the slab finds its buffers");
        assert!(self.pump.rx.is_none() && self.pump.tx.is_none(), "a queue without a socket stops");
        assert!(self.pump.flight.is_empty(), "nothing is in flight");
        self.finish_migration();
        assert_eq!((self.pump.rx_slab.used(), self.pump.flight.used_slab_frames()), (0, 0));
    }

    fn into_world(mut self) -> World {
        if let Some(socket) = self.world.xsk.take() {
            self.world.restore(socket);
        }
        self.world
    }
}

#[cfg(test)]
mod tests;
