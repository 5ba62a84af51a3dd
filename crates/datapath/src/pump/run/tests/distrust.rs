//! A kernel, or its driver, that answers what it was not asked: its socket is closed, and no head is lost or used twice.

use super::{BUFFERS_AT, Bench, Command, Event, PollMode, refused};
use crate::error::Error;
use crate::fd::EventFd;
use crate::fixture::was_signalled;
use crate::guest_memory::UmemAddr;
use crate::stats::DropReason;
use crate::xsk::BindMode;
use crate::xsk::test_kernel::{Received, TestKernel};

const POSTED: u64 = 8;

/// Both queues run in `mode`, with buffers in the kernel's hands.
fn running(mode: BindMode) -> (Bench, TestKernel, [EventFd; 2]) {
    let mut bench = Bench::new(PollMode::Interrupt);
    let kernel = bench.attach_in(mode);
    bench.post(false, POSTED, 1600);
    bench.post(true, POSTED, 72);
    let err = [false, true].map(|tx| {
        bench.start(tx);
        let err = EventFd::new().unwrap();
        let fd = Some(EventFd::duplicate(err.raw()).unwrap());
        bench.pump.execute(Command::SetErr { tx, fd }).unwrap();
        err
    });
    bench.pump.work();
    (bench, kernel, err)
}

/// The fill entry of the buffer that a frame landed in.
fn fill_entry(bench: &Bench, at: UmemAddr) -> UmemAddr {
    UmemAddr(at.0 - bench.pump.xsk.as_ref().unwrap().layout.frame_offset())
}

fn unknown_answers(bench: &Bench) -> (u64, u64) {
    let reason = DropReason::UnknownAnswer as usize;
    (bench.pump.rx_counts.dropped[reason], bench.pump.tx_counts.dropped[reason])
}

/// What is told of, once; nothing more comes of working on.
fn told(bench: &mut Bench) -> String {
    for _ in 0..3 {
        assert_eq!(bench.pump.work(), 0);
        bench.pump.arm(true);
        bench.pump.arm(false);
    }
    match &bench.events.drain()[..] {
        [Event::Distrusted { error, mode: BindMode::ZeroCopy, .. }] => error.to_string(),
        events => panic!("{events:?}"),
    }
}

/// A frame arrives in its place; then the driver answers with the same buffer again.
fn answer_twice(bench: &Bench, kernel: &mut TestKernel) -> UmemAddr {
    let Received::At(at) = kernel.receive(&[1; 60], 0) else { panic!("there are buffers") };
    let fill = fill_entry(bench, at);
    kernel.answer_unasked(fill, 60);
    fill
}

#[test]
fn test_nothing_is_delivered_from_the_first_answer_on_that_nobody_asked_for() {
    let (mut bench, mut kernel, _) = running(BindMode::ZeroCopy);
    let fill = answer_twice(&bench, &mut kernel);
    kernel.receive(&[2; 60], 0);
    bench.pump.work();
    assert_eq!(bench.take(false), 1, "the frame before it");
    assert_eq!((unknown_answers(&bench), bench.pump.rx_counts.frames), ((1, 0), 1));
    assert!(bench.pump.xsk.is_none(), "the NIC is to stop writing");
    let told = told(&mut bench);
    assert!(told.contains(&format!("UMEM address {:#x}) (EIO)", fill.0)), "{told}");
    assert_eq!(bench.take(false), 0);
}

#[test]
fn test_a_slab_frame_that_comes_twice_is_not_delivered_twice() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach_in(BindMode::ZeroCopy);
    bench.post(false, POSTED, 300);
    bench.start(false);
    answer_twice(&bench, &mut kernel);
    bench.pump.work();
    assert_eq!((bench.take(false), bench.pump.rx_counts.frames), (1, 1));
    assert!(told(&mut bench).contains("queue pair 0: the kernel has received into a buffer"));
}

#[test]
fn test_a_completion_of_what_was_not_sent_closes_the_socket() {
    for twice in [false, true] {
        let (mut bench, mut kernel, _) = running(BindMode::ZeroCopy);
        let sent = bench.guest.umem(BUFFERS_AT + super::BUFFER_BYTES + 12);
        if twice {
            kernel.send(1);
            kernel.complete(0);
        }
        kernel.complete_unasked(if twice { sent } else { UmemAddr(sent.0 + 8) });
        bench.pump.work();
        assert_eq!(unknown_answers(&bench), (0, 1));
        let told = told(&mut bench);
        assert!(told.contains("the kernel has sent from a buffer that was not given to it"), "{told}");
        bench.pump.execute(Command::Detach).unwrap();
        bench.stop(true);
    }
}

#[test]
fn test_buffers_of_a_distrusted_socket_stay_taken_until_it_is_detached() {
    let (mut bench, mut kernel, _) = running(BindMode::ZeroCopy);
    answer_twice(&bench, &mut kernel);
    bench.pump.work();
    bench.take(false);
    assert!(bench.pump.view.shared_umem().is_some(), "the control plane has it to detach");
    for tx in [false, true] {
        match bench.pump.execute(Command::Stop { tx }) {
            Err(Error::Host(error)) => assert_eq!(error.errno, libc::EBUSY, "the NIC may still write to them"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bench.pump.refuse_second_socket().map(|()| 0).map_err(|_| ()), Err(()));
    bench.pump.execute(Command::Detach).unwrap();
    assert!(bench.pump.view.shared_umem().is_none());
    bench.stop(false);
    bench.stop(true);
}

#[test]
fn test_a_queue_without_buffers_in_the_kernels_hands_does_not_stop_before_the_distrusted_socket_is_detached() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach_in(BindMode::ZeroCopy);
    bench.start(false);
    kernel.answer_unasked(bench.guest.umem(BUFFERS_AT), 60);
    bench.pump.work();
    assert!(matches!(bench.pump.execute(Command::Stop { tx: false }), Err(Error::Host(_))));
    bench.pump.execute(Command::Detach).unwrap();
    bench.stop(false);
}

#[test]
fn test_virtqueues_go_on_with_the_next_socket() {
    let (mut bench, mut kernel, err) = running(BindMode::ZeroCopy);
    answer_twice(&bench, &mut kernel);
    bench.pump.work();
    assert_eq!(bench.take(false), 1);
    bench.pump.execute(Command::Detach).unwrap();
    bench.pump.reclaim();
    let mut kernel = bench.attach_in(BindMode::Copy);
    assert_eq!(bench.take(true) as u64, POSTED, "what the closed socket had may have been sent or not");
    bench.pump.work();
    kernel.receive(&[3; 60], 0);
    bench.post(true, 1, 72);
    bench.pump.work();
    assert_eq!((bench.take(false), kernel.send(9)), (1, 1));
    assert_eq!(err.each_ref().map(was_signalled), [false, false]);
    bench.pump.execute(Command::Detach).unwrap();
    bench.stop(false);
    bench.stop(true);
}

#[test]
fn test_without_another_mode_to_go_on_in_both_virtqueues_stop_and_their_err_eventfds_tell() {
    let (mut bench, mut kernel, err) = running(BindMode::Copy);
    answer_twice(&bench, &mut kernel);
    bench.pump.work();
    assert_eq!(err.each_ref().map(was_signalled), [true, true]);
    assert!(matches!(bench.events.drain()[..], [Event::Distrusted { vring: 0, mode: BindMode::Copy, .. }]));
    bench.pump.execute(Command::Detach).unwrap();
    bench.pump.reclaim();
    bench.take(true);
    let mut kernel = bench.attach_in(BindMode::Copy);
    kernel.receive(&[3; 60], 0);
    bench.pump.work();
    assert_eq!(bench.take(false), 1, "the one before");
    bench.pump.execute(Command::Detach).unwrap();
    for tx in [false, true] {
        bench.stop(tx);
    }
}

#[test]
fn test_a_wrong_completion_while_a_queue_stops_is_told_and_its_buffers_are_not_given_back() {
    let (mut bench, mut kernel, _) = running(BindMode::ZeroCopy);
    kernel.complete_unasked(UmemAddr(0));
    assert!(bench.pump.execute(Command::Stop { tx: true }).is_err());
    assert_eq!(unknown_answers(&bench), (0, 1));
    assert!(matches!(bench.events.drain()[..], [Event::Distrusted { vring: 1, .. }]));
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.stop(true), POSTED, "what was in flight may have been sent: used, not taken again");
}

#[test]
fn test_a_second_socket_is_refused_until_the_distrusted_one_is_detached() {
    let (mut bench, mut kernel, _) = running(BindMode::ZeroCopy);
    answer_twice(&bench, &mut kernel);
    bench.pump.work();
    let second = Command::AttachPacket { socket: crate::fixture::memfd("socket", 4096), frame_max: 1518 };
    assert!(refused(bench.pump.execute(second)).contains("detach it first"));
}
