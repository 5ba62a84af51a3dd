//! rx-drop and tx-only on one socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mpassthru_datapath::error::HostError;
use mpassthru_datapath::fd::EventFd;
use mpassthru_datapath::pump::{PollMode, Spin, sleep};
use mpassthru_datapath::xsk::{SharedUmem, statistics};

use crate::socket::{BUFFERS, Bound};

/// As the pump's.
const BURST: u32 = 64;
/// As the pump's: completions wake nobody. A paced sender looks at its clock as often.
const PERIOD: Duration = Duration::from_millis(1);
const SIZES: std::ops::RangeInclusive<u32> = 14..=2034;

/// What the traffic thread is to do.
pub struct Orders {
    /// Frame size to send, 0 for none.
    size: AtomicU32,
    /// Frames a second, 0 for as many as go.
    rate: AtomicU32,
    changed: AtomicBool,
    quit: AtomicBool,
    wake: EventFd,
}

impl Orders {
    pub fn new() -> Result<Self, HostError> {
        let (size, rate) = (AtomicU32::new(0), AtomicU32::new(0));
        Ok(Self { size, rate, changed: AtomicBool::new(false), quit: AtomicBool::new(false), wake: EventFd::new()? })
    }

    pub fn send(&self, size: u32, rate: u32) -> Result<(), String> {
        if size != 0 && !SIZES.contains(&size) {
            return Err(format!("cannot send frames of {size} bytes: {SIZES:?} are possible"));
        }
        self.size.store(size, Ordering::Relaxed);
        self.rate.store(rate, Ordering::Relaxed);
        // Release: size and rate are seen with it. Pairs with the Acquire swap in `Traffic::run`.
        self.changed.store(true, Ordering::Release);
        self.wake.signal();
        Ok(())
    }

    pub fn quit(&self) {
        // Relaxed: looked at again and again; the eventfd ends a sleep.
        self.quit.store(true, Ordering::Relaxed);
        self.wake.signal();
    }
}

/// What was done so far. Relaxed throughout: counters order nothing.
#[derive(Default)]
pub struct Totals {
    rx_frames: AtomicU64,
    tx_frames: AtomicU64,
}

impl Totals {
    /// All totals, those of the kernel included, as a line of JSON.
    pub fn json(&self, umem: &SharedUmem) -> String {
        let kernel = statistics(umem);
        format!(
            r#"{{"rx_frames":{},"tx_frames":{},"no_buffer":{},"oversize":{},"rx_ring_full":{},"tx_invalid":{}}}"#,
            self.rx_frames.load(Ordering::Relaxed),
            self.tx_frames.load(Ordering::Relaxed),
            kernel.fill_empty,
            kernel.oversize,
            kernel.rx_ring_full,
            kernel.tx_invalid,
        )
    }
}

/// The thread's state.
pub struct Traffic {
    bound: Bound,
    orders: Arc<Orders>,
    totals: Arc<Totals>,
    spin: Spin,
    size: u32,
    rate: u32,
    since: Instant,
    paced_frames: u64,
    next_frame: u64,
    in_flight: u32,
}

impl Traffic {
    pub fn new(mut bound: Bound, orders: Arc<Orders>, totals: Arc<Totals>) -> Result<Self, String> {
        if u64::from(bound.xsk.fill_free(BUFFERS as u32)) < BUFFERS {
            return Err("the fill ring is smaller than it was asked to be".into());
        }
        for index in 0..BUFFERS {
            let entry = bound.layout.fill_address(bound.rx_frame(index));
            bound.xsk.fill_write(entry);
        }
        bound.xsk.fill_submit();
        let spin = Spin::new(PollMode::Adaptive);
        let since = Instant::now();
        Ok(Self { bound, orders, totals, spin, size: 0, rate: 0, since, paced_frames: 0, next_frame: 0, in_flight: 0 })
    }

    /// Works until told to quit.
    pub fn run(mut self) {
        let orders = Arc::clone(&self.orders);
        while !orders.quit.load(Ordering::Relaxed) {
            // Acquire: pairs with the Release store in `Orders::send`.
            if orders.changed.load(Ordering::Relaxed) && orders.changed.swap(false, Ordering::Acquire) {
                self.obey();
            }
            if self.drop_received() + self.send() > 0 {
                self.spin.worked();
            } else if !self.spin.look_again() {
                self.wait();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn obey(&mut self) {
        self.size = self.orders.size.load(Ordering::Relaxed);
        self.rate = self.orders.rate.load(Ordering::Relaxed);
        (self.since, self.paced_frames) = (Instant::now(), 0);
        let mut frame = vec![0u8; self.size as usize];
        if let Some(header) = frame.first_chunk_mut::<14>() {
            *header = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        }
        for index in 0..BUFFERS {
            self.bound.memory.write(self.bound.tx_frame(index), &frame);
        }
    }

    fn drop_received(&mut self) -> u32 {
        let xsk = &mut self.bound.xsk;
        let received = xsk.rx_peek().min(BURST);
        if received == 0 {
            return 0;
        }
        for _ in 0..received {
            // Each entry that is read leaves room in the fill ring: there are as many buffers as entries.
            let fill = xsk.rx_read().fill;
            debug_assert!(xsk.fill_free(1) > 0, "a received frame came out of the fill ring");
            xsk.fill_write(fill);
        }
        xsk.rx_release();
        xsk.fill_submit();
        self.totals.rx_frames.fetch_add(u64::from(received), Ordering::Relaxed);
        received
    }

    fn send(&mut self) -> u32 {
        let due = self.due().min(BURST).min(BUFFERS as u32 - self.in_flight);
        let room = self.bound.xsk.tx_free(due).min(due);
        for _ in 0..room {
            let frame = self.bound.tx_frame(self.next_frame % BUFFERS);
            self.bound.xsk.tx_write(frame, self.size, false);
            self.next_frame += 1;
        }
        self.in_flight += room;
        self.paced_frames += u64::from(room);
        if self.in_flight == 0 {
            return 0;
        }
        let xsk = &mut self.bound.xsk;
        xsk.tx_submit();
        if xsk.tx_pending() > 0 {
            // Refused or not, what was not sent is still in the ring, and the next round asks again.
            let _ = xsk.tx_wakeup();
        }
        let completed = xsk.completion_peek();
        for _ in 0..completed {
            xsk.completion_read();
        }
        xsk.completion_release();
        self.in_flight -= completed;
        self.totals.tx_frames.fetch_add(u64::from(completed), Ordering::Relaxed);
        room + completed
    }

    /// Frames to send now.
    fn due(&self) -> u32 {
        match (self.size, self.rate) {
            (0, _) => 0,
            (_, 0) => u32::MAX,
            (_, rate) => {
                let by_now = (self.since.elapsed().as_secs_f64() * f64::from(rate)) as u64;
                u32::try_from(by_now.saturating_sub(self.paced_frames)).unwrap_or(u32::MAX)
            }
        }
    }

    fn wait(&mut self) {
        let timeout = (self.size > 0 || self.in_flight > 0).then_some(PERIOD);
        let [woken, _] = sleep([self.orders.wake.raw(), self.bound.xsk.raw_fd()], timeout);
        self.spin.slept();
        if woken {
            self.orders.wake.clear();
        }
    }
}
