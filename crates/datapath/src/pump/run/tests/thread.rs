//! The whole loop on its thread: what the guest sends comes back to it, and nobody sleeps on work.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::{BUFFERS_AT, Bench, Command, Event, GuestPhysAddr, PollMode, QUEUE_SIZE, QueueDriver, Segment};
use crate::fd::EventFd;
use crate::fixture::Guest;
use crate::pump::wait::sleep;
use crate::xsk::test_kernel::{Received, TestKernel};

const FRAMES: u64 = 1500;
const IN_FLIGHT_MAX: u64 = QUEUE_SIZE as u64 / 2;
const FRAME_BYTES: u32 = 60;
const HEADER_BYTES: u32 = 12;
const DEADLINE: Duration = Duration::from_secs(10);

/// The guest and the kernel, on this thread; the kernel loops every frame back.
struct Loop {
    guest: Guest,
    kernel: TestKernel,
    drivers: [QueueDriver; 2],
    /// Where the rx buffer of a head is.
    places: HashMap<u16, GuestPhysAddr>,
    /// Frames sent and not received again: on a busy machine the pump posts buffers later than they are needed.
    wire: VecDeque<Vec<u8>>,
    sent: u64,
    returned: u64,
}

/// Where buffer `number` begins.
fn buffer(number: u64) -> GuestPhysAddr {
    GuestPhysAddr(BUFFERS_AT + number * super::BUFFER_BYTES)
}

impl Loop {
    /// Sends numbered frames, as many as may be on their way, and kicks for them if the device wants it.
    fn post(&mut self, kicks: &[EventFd; 2]) {
        let [_, tx] = &mut self.drivers;
        while self.sent < FRAMES && self.sent - self.returned < IN_FLIGHT_MAX && tx.free_descriptors() > 0 {
            let at = buffer(IN_FLIGHT_MAX + self.sent % u64::from(QUEUE_SIZE));
            self.guest.vmm.write(at.plus(u64::from(HEADER_BYTES)), &self.sent.to_le_bytes()).unwrap();
            tx.add(&[Segment::readable(at, HEADER_BYTES + FRAME_BYTES)]).unwrap();
            self.sent += 1;
        }
        for (driver, kick) in self.drivers.iter_mut().zip(kicks) {
            if driver.publish() {
                kick.signal();
            }
        }
    }

    /// The kernel sends what is in the tx ring, and receives it again as buffers allow.
    fn turn_kernel(&mut self) {
        self.kernel.send(32);
        while self.kernel.sending() > 0 {
            self.wire.push_back(self.kernel.complete(0));
        }
        while let Some(frame) = self.wire.front() {
            if !matches!(self.kernel.receive(frame, 0), Received::At(_)) {
                break;
            }
            self.wire.pop_front();
        }
        self.kernel.update_readiness();
    }

    /// Takes what is used on both queues; frames return in order.
    fn take(&mut self) {
        let [rx, tx] = &mut self.drivers;
        while let Some(used) = tx.pop_used() {
            tx.release(used.unwrap().head);
        }
        while let Some(used) = rx.pop_used() {
            let used = used.unwrap();
            assert_eq!(used.len, HEADER_BYTES + FRAME_BYTES);
            let at = self.places[&used.head];
            let mut number = [0; 8];
            self.guest.vmm.read(at.plus(u64::from(HEADER_BYTES)), &mut number).unwrap();
            assert_eq!(u64::from_le_bytes(number), self.returned, "in order");
            rx.repost(used.head);
            self.returned += 1;
        }
    }

    /// Sleeps unless something was used already. The tx ring announces nothing to the kernel here, so not for long.
    fn wait(&mut self, calls: &[EventFd; 2]) {
        if self.drivers.iter_mut().all(|driver| driver.enable_notifications(1)) {
            let woken = sleep(calls.each_ref().map(EventFd::raw), Some(Duration::from_micros(200)));
            calls.iter().zip(woken).filter(|(_, woken)| *woken).for_each(|(call, _)| call.clear());
        }
    }
}

/// Sends [`FRAMES`] frames through a pump on its thread.
fn loop_back(mut bench: Bench) {
    let kernel = bench.attach();
    kernel.ask_for_tx_wakeup(true);
    let configs = [false, true].map(|tx| bench.vring(tx));
    let copies = |of: fn(&super::VringConfig) -> &EventFd| {
        configs.each_ref().map(|config| EventFd::duplicate(of(config).raw()).unwrap())
    };
    let (kicks, calls) = (copies(|config| &config.kick), copies(|config| config.call.as_ref().unwrap()));
    for (config, tx) in configs.into_iter().zip([false, true]) {
        let memory = bench.guest.memory.clone();
        bench.commands.push(0, Command::Start { tx, memory, config: Box::new(config) });
    }
    let Bench { guest, pump, commands, events, mut drivers, .. } = bench;
    let mut post = |number| (drivers[0].add(&[Segment::writable(buffer(number), 1600)]).unwrap(), buffer(number));
    let places = (0..IN_FLIGHT_MAX).map(&mut post).collect();
    let thread = std::thread::spawn(move || pump.run());

    let mut ends = Loop { guest, kernel, drivers, places, wire: VecDeque::new(), sent: 0, returned: 0 };
    let deadline = Instant::now() + DEADLINE;
    while ends.returned < FRAMES {
        assert!(Instant::now() < deadline, "{} of {} came back: somebody sleeps on work", ends.returned, ends.sent);
        ends.post(&kicks);
        ends.turn_kernel();
        ends.take();
        ends.wait(&calls);
    }
    commands.push(0, Command::Quit);
    thread.join().unwrap();
    let completed = |event: &Event| matches!(event, Event::Completed(done) if done.result.is_ok());
    let events = events.drain();
    assert!(events.len() == 3 && events.iter().all(completed), "both starts and the end: {events:?}");
}

#[test]
fn test_a_sleeping_pump_is_woken_for_all_work() {
    loop_back(Bench::new(PollMode::Interrupt));
    loop_back(Bench::packed(PollMode::Interrupt));
}

#[test]
fn test_an_adaptive_pump_is_woken_for_all_work() {
    loop_back(Bench::new(PollMode::Adaptive));
    loop_back(Bench::packed(PollMode::Adaptive));
}

#[test]
fn test_a_busy_pump_needs_no_kick() {
    loop_back(Bench::new(PollMode::Busy));
    loop_back(Bench::packed(PollMode::Busy));
}

/// No descriptor announces completions: the pump looks for them by itself, though the guest does nothing more.
#[test]
fn test_buffers_that_the_kernel_gives_back_late_are_used_without_further_traffic() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    kernel.ask_for_tx_wakeup(true);
    let config = bench.vring(true);
    let kick = EventFd::duplicate(config.kick.raw()).unwrap();
    let call = EventFd::duplicate(config.call.as_ref().unwrap().raw()).unwrap();
    bench.commands.push(0, Command::Start { tx: true, memory: bench.guest.memory.clone(), config: Box::new(config) });
    let Bench { guest: _guest, pump, commands, events: _events, mut drivers, .. } = bench;
    let [_, tx] = &mut drivers;
    for number in 0..3 {
        tx.add(&[Segment::readable(buffer(number), HEADER_BYTES + FRAME_BYTES)]).unwrap();
    }
    let thread = std::thread::spawn(move || pump.run());
    tx.publish();
    kick.signal();
    let deadline = Instant::now() + DEADLINE;
    while kernel.sending() < 3 {
        assert!(Instant::now() < deadline, "the pump sends what was kicked for");
        kernel.send(32);
        std::thread::yield_now();
    }

    call.clear();
    sleep([call.raw()], Some(Duration::from_millis(20))); // long enough for the pump to fall asleep
    assert!(tx.pop_used().is_none(), "nothing was given back yet");
    while kernel.sending() > 0 {
        kernel.complete(0);
    }
    let mut used = 0;
    while used < 3 {
        if tx.enable_notifications(1) {
            assert!(sleep([call.raw()], Some(DEADLINE))[0], "{used} of 3 buffers came back");
            call.clear();
        }
        while let Some(head) = tx.pop_used() {
            tx.release(head.unwrap().head);
            used += 1;
        }
    }
    commands.push(0, Command::Quit);
    thread.join().unwrap();
}
