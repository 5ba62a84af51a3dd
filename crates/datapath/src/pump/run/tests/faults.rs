use super::super::{COMPLETION_PERIOD, REFUSED_PERIOD};
use super::{Bench, Command, Event, PollMode};
use crate::error::QueueFault;
use crate::fd::EventFd;
use crate::fixture::{split, was_signalled};

fn set_err(bench: &mut Bench, tx: bool) -> EventFd {
    let err = EventFd::new().unwrap();
    let fd = Some(EventFd::duplicate(err.raw()).unwrap());
    bench.pump.execute(Command::SetErr { tx, fd }).unwrap();
    err
}

#[test]
fn test_a_broken_queue_stops_alone_and_is_reported_once() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    bench.start(false);
    bench.start(true);
    let err = [false, true].map(|tx| set_err(&mut bench, tx));
    bench.post(false, 2, 1600);
    split(&bench.drivers[1]).set_avail_idx(100);
    for _ in 0..3 {
        bench.pump.work();
        bench.pump.arm(true);
        bench.pump.arm(false);
    }
    let events = bench.events.drain();
    assert!(
        matches!(&events[..], [Event::Fault { vring: 1, fault: QueueFault::AvailIndexJump { ahead: 100, .. } }]),
        "{events:?}"
    );
    assert_eq!(err.each_ref().map(was_signalled), [false, true]);
    kernel.receive(&[1; 60], 0);
    bench.pump.work();
    assert_eq!(bench.take(false), 1, "rx goes on");
    split(&bench.drivers[1]).set_avail_idx(0);
    bench.stop(true);
    bench.start(true);
    bench.post(true, 1, 72);
    bench.pump.work();
    assert_eq!(kernel.send(9), 1, "a queue that was stopped and started runs again");
}

#[test]
fn test_a_fault_that_shows_before_sleeping_is_reported_too() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let _kernel = bench.attach();
    bench.start(false);
    split(&bench.drivers[0]).set_avail_idx(33);
    assert!(!bench.pump.arm(true));
    assert!(matches!(bench.events.drain()[..], [Event::Fault { vring: 0, .. }]));
}

#[test]
fn test_what_was_received_before_a_fault_is_delivered_and_what_was_posted_comes_back() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    bench.post(false, 4, 1600);
    bench.start(false);
    kernel.receive(&[1; 60], 0);
    split(&bench.drivers[0]).set_avail_entry(4, 99);
    split(&bench.drivers[0]).set_avail_idx(5);
    bench.pump.work();
    assert_eq!(bench.take(false), 1);
    kernel.receive(&[1; 60], 0);
    assert_eq!(bench.pump.work(), 0, "a broken queue gets no more frames");
    split(&bench.drivers[0]).set_avail_idx(4);
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.stop(false), 1);
    assert_eq!(bench.drivers[0].outstanding(), 3);
}

#[test]
fn test_the_second_kick_of_rings_that_are_all_zero_is_reported_once_per_start() {
    let mut bench = Bench::new(PollMode::Interrupt);
    for _ in 0..2 {
        bench.start(true);
        bench.pump.tx.as_ref().unwrap().vring.kick.signal();
        bench.pump.kicked(false, true);
        assert!(bench.events.drain().is_empty(), "QEMU kicks a queue that nobody has used yet");
        for _ in 0..3 {
            bench.pump.tx.as_ref().unwrap().vring.kick.signal();
            bench.pump.kicked(false, true);
        }
        let events = bench.events.drain();
        assert!(matches!(events[..], [Event::KickedEmpty { vring: 1 }]), "{events:?}");
        bench.stop(true);
    }
    bench.start(true);
    bench.post(true, 1, 72);
    bench.pump.kicked(false, false);
    bench.pump.tx.as_ref().unwrap().vring.kick.signal();
    bench.pump.kicked(false, true);
    assert!(bench.events.drain().is_empty(), "shared memory shows what the driver wrote");
}

#[test]
fn test_an_interface_that_refuses_frames_is_reported_once_until_it_recovers() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let kernel = bench.attach();
    bench.start(true);
    bench.post(true, 1, 72);
    kernel.ask_for_tx_wakeup(true);
    kernel.refuse_sends();
    for _ in 0..3 {
        bench.pump.work();
    }
    match &bench.events.drain()[..] {
        [Event::Host { vring: 1, error }] => assert_eq!(error.errno, libc::EPIPE),
        events => panic!("{events:?}"),
    }
    assert_eq!(bench.pump.timeout(), Some(REFUSED_PERIOD));
    kernel.ask_for_tx_wakeup(false);
    bench.pump.work();
    assert_eq!(bench.pump.timeout(), Some(COMPLETION_PERIOD));
    kernel.ask_for_tx_wakeup(true);
    bench.pump.work();
    assert_eq!(bench.events.drain().len(), 1, "refused again, reported again");
}

#[test]
fn test_a_pump_without_a_socket_sleeps_until_it_is_told_something() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let _kernel = bench.attach();
    bench.start(true);
    bench.post(true, 3, 72);
    bench.pump.work();
    assert_eq!(bench.pump.timeout(), Some(COMPLETION_PERIOD));
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.pump.timeout(), None, "no completion can come");
}
