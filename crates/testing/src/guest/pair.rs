//! A queue pair at work: one thread that takes turns until it is told to park.
//!
//! A turn: reclaim tx, receive rx, generate, publish and kick once per queue. A turn without work ends in a rest:
//! a pause when polling; else a sleep on the call eventfds, entered only after both used rings were looked at again.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{RxRole, SourceConfig};
use super::counters::{Counters, SharedCounters, SharedViolations, Violations};
use super::rx::{Frame, RxQueue};
use super::tx::{Echo, TxQueue};
use crate::error::Result;
use crate::eventfd::{EventFd, wait_readable};
use crate::pattern::Checker;

/// Frames taken per turn, so that reclaiming, kicking and stopping get their share.
const RX_BURST: usize = 256;
/// Turns without work after which a polling thread lets others run.
const POLLS_BEFORE_YIELD: u32 = 256;
/// An IP packet of 64 KiB, with the longest Ethernet header.
const FRAME_MAX_BYTES: usize = (1 << 16) + 64;

/// The three eventfds of a virtqueue.
#[derive(Debug)]
pub struct QueueEvents {
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver.
    pub call: EventFd,
    /// Device to driver, once the device has given the queue up.
    pub err: EventFd,
}

impl QueueEvents {
    fn new() -> Result<Self> {
        Ok(Self { kick: EventFd::new()?, call: EventFd::new()?, err: EventFd::new()? })
    }
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Its virtio-net header.
    pub header: Vec<u8>,
    /// Its bytes.
    pub frame: Vec<u8>,
}

/// What a queue pair's thread shares with the rest of the program.
#[derive(Debug)]
pub(super) struct Shared {
    pub counters: SharedCounters,
    pub violations: SharedViolations,
    /// One checker for all queue pairs: a stream may be spread over them.
    pub checker: Arc<Mutex<Checker>>,
    pub captured: Mutex<VecDeque<Captured>>,
    pub rx: QueueEvents,
    pub tx: QueueEvents,
    stop: AtomicBool,
    wake: EventFd,
}

impl Shared {
    pub fn new(checker: Arc<Mutex<Checker>>) -> Result<Self> {
        Ok(Self {
            counters: SharedCounters::default(),
            violations: SharedViolations::default(),
            checker,
            captured: Mutex::default(),
            rx: QueueEvents::new()?,
            tx: QueueEvents::new()?,
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
        })
    }

    /// Asks the thread to park.
    pub fn request_stop(&self) {
        // Relaxed: the thread is joined afterwards, and the join orders everything else. Pairs with `run`.
        self.stop.store(true, Ordering::Relaxed);
        self.wake.signal();
    }
}

/// Locks, also after a panic of another holder: counters stay readable for the report of what went wrong.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One queue pair: owned by its thread while that runs, else by the guest.
#[derive(Debug)]
pub(super) struct QueuePair {
    pub rx: RxQueue,
    pub tx: TxQueue,
    shared: Arc<Shared>,
    counters: Counters,
    violations: Violations,
    role: RxRole,
    polling: bool,
    /// An echo that waits for room in the tx ring.
    stalled: Option<Frame>,
    capture_left: usize,
    scratch: Box<[u8]>,
    polls: u32,
}

impl QueuePair {
    pub fn new(rx: RxQueue, tx: TxQueue, shared: Arc<Shared>, polling: bool, capture_frames: usize) -> Self {
        Self {
            rx,
            tx,
            counters: shared.counters.snapshot(),
            violations: shared.violations.snapshot(),
            shared,
            role: RxRole::Idle,
            polling,
            stalled: None,
            capture_left: capture_frames,
            scratch: vec![0; FRAME_MAX_BYTES].into_boxed_slice(),
            polls: 0,
        }
    }

    /// Says what the next run does.
    pub fn set_roles(&mut self, role: RxRole, source: Option<SourceConfig>, polling: bool) {
        self.role = role;
        self.polling = polling;
        self.tx.set_source(source);
        // Relaxed: the thread is spawned afterwards, which orders it. Pairs with `run`.
        self.shared.stop.store(false, Ordering::Relaxed);
    }

    /// Works until told to stop.
    pub fn run(&mut self) -> Result<()> {
        // Relaxed: pairs with `Shared::request_stop`; a turn more does no harm.
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.turn() == 0 {
                self.rest()?;
            } else {
                self.polls = 0;
            }
        }
        Ok(())
    }

    /// Does what there is to do; returns how much that was.
    pub fn turn(&mut self) -> usize {
        let mut work = self.tx.reclaim(&mut self.rx, &mut self.counters, &mut self.violations);
        work += self.receive();
        work += self.tx.generate(&mut self.counters);
        self.publish();
        work
    }

    /// Takes everything out of the used rings of a stopped device, whatever the role.
    pub fn drain(&mut self) {
        if self.role == RxRole::Idle {
            self.role = RxRole::Sink;
        }
        self.tx.set_source(None);
        while self.turn() > 0 {}
    }

    /// Counts what a stopped device owes, given the bases at which it stopped (rx, tx).
    pub fn settle(&mut self, bases: [u32; 2]) {
        self.drain();
        for (driver, base) in [&self.rx.driver, &self.tx.driver].into_iter().zip(bases) {
            match driver.settle(base) {
                Ok(settlement) => {
                    self.violations.never_returned += u64::from(settlement.never_returned);
                    self.violations.returned_twice += u64::from(settlement.returned_twice);
                }
                Err(_) => self.violations.base_impossible += 1,
            }
        }
        self.shared.violations.publish(&self.violations);
    }

    fn receive(&mut self) -> usize {
        if self.role == RxRole::Idle {
            return 0;
        }
        let shared = Arc::clone(&self.shared);
        let mut checker = (self.role == RxRole::Check).then(|| lock(&shared.checker));
        let mut received = 0;
        while received < RX_BURST {
            let frame = match self.stalled.take() {
                Some(frame) => frame,
                None => match self.rx.pop_frame(&mut self.counters, &mut self.violations) {
                    Some(frame) => {
                        self.capture(frame);
                        frame
                    }
                    None => break,
                },
            };
            if let Some(checker) = &mut checker {
                checker.check(self.rx.read_frame(frame, &mut self.scratch));
            }
            if self.role == RxRole::Echo {
                if !self.echo(frame) {
                    break;
                }
            } else {
                self.rx.give_back(frame.first_buffer);
            }
            received += 1;
        }
        received
    }

    /// Sends a frame back; returns `false` if the tx ring has no room for it yet.
    fn echo(&mut self, frame: Frame) -> bool {
        self.rx.turn_round(frame);
        match self.tx.echo(&self.rx, frame) {
            Echo::Posted => self.counters.echo_posted += 1,
            Echo::RingFull => {
                // Turned once more when it is its turn again.
                self.rx.turn_round(frame);
                self.stalled = Some(frame);
                return false;
            }
            Echo::Refused => {
                self.counters.echo_refused += 1;
                self.rx.give_back(frame.first_buffer);
            }
        }
        true
    }

    fn capture(&mut self, frame: Frame) {
        if self.capture_left > 0 {
            self.capture_left -= 1;
            let header = self.rx.header(frame);
            let bytes = self.rx.read_frame(frame, &mut self.scratch).to_vec();
            lock(&self.shared.captured).push_back(Captured { header, frame: bytes });
        }
    }

    fn publish(&mut self) {
        if self.rx.driver.publish() {
            self.shared.rx.kick.signal();
            self.counters.kicks += 1;
        }
        if self.tx.driver.publish() {
            self.shared.tx.kick.signal();
            self.counters.kicks += 1;
        }
        self.shared.counters.publish(&self.counters);
        self.shared.violations.publish(&self.violations);
    }

    fn rest(&mut self) -> Result<()> {
        if self.polling {
            self.rx.driver.disable_notifications();
            self.tx.driver.disable_notifications();
            self.polls += 1;
            if self.polls.is_multiple_of(POLLS_BEFORE_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        if self.may_sleep() {
            self.counters.sleeps += 1;
            self.shared.counters.publish(&self.counters);
            let fds = [self.shared.wake.as_fd(), self.shared.rx.call.as_fd(), self.shared.tx.call.as_fd()];
            wait_readable(&fds, self.tx.next_due())?;
            self.counters.calls += u64::from(self.shared.rx.call.take() > 0);
            self.counters.calls += u64::from(self.shared.tx.call.take() > 0);
            let _ = self.shared.wake.take();
        }
        self.rx.driver.disable_notifications();
        self.tx.driver.disable_notifications();
        Ok(())
    }

    /// Asks for the notifications that could bring work; returns whether there is none yet.
    fn may_sleep(&mut self) -> bool {
        let wants_rx = self.role != RxRole::Idle && self.stalled.is_none();
        let rx_quiet = !wants_rx || self.rx.driver.enable_notifications(1);
        // Half of what is out, so that a sender is woken in bursts; one that never comes back holds up only itself.
        let owed = self.tx.driver.outstanding();
        let tx_quiet = owed == 0 || self.tx.driver.enable_notifications(owed.div_ceil(2));
        rx_quiet && tx_quiet
    }
}
