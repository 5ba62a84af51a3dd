use std::time::{Duration, Instant};

use super::{
    BUFFER_BYTES, BUFFERS_AT, Bench, Command, Error, FEATURES, Guest, GuestPhysAddr, PollMode, Segment, refused,
};
use crate::fd::EventFd;
use crate::fixture::{VIRTIO_F_RING_PACKED, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, was_signalled};
use crate::offload::tests::packet::{Ip, NEEDS_CSUM, Packet, Transport, net_header};
use crate::pump::{MacAddress, SourceLock};
use crate::stats::DropReason;
use crate::xsk::FRAME_BYTES_MAX;

#[test]
fn test_a_started_rx_queue_has_its_buffers_posted() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    bench.post(false, 3, 1600);
    bench.start(false);
    for len in [60, 1514] {
        kernel.receive(&vec![1; len], 0);
    }
    assert!(bench.pump.work() > 0);
    assert_eq!((bench.take(false), bench.pump.rx_counts.direct), (2, 2));
}

#[test]
fn test_a_queue_whose_buffers_the_kernel_has_stops_only_without_its_socket() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let _kernel = bench.attach();
    // One buffer is direct, the others wait for slab frames.
    bench.post(false, 1, 1600);
    bench.post(false, 4, 1000);
    bench.start(false);
    match bench.pump.execute(Command::Stop { tx: false }) {
        Err(Error::Host(error)) => assert_eq!((error.errno, error.advice), (libc::EBUSY, "detach its socket first")),
        other => panic!("stopped with buffers in the kernel's hands: {other:?}"),
    }
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.stop(false), 0, "all five are in the avail ring again");
    assert_eq!(bench.drivers[0].outstanding(), 5);
    assert!(bench.pump.view.socket.lock().unwrap().is_none());
}

#[test]
fn test_frames_in_the_kernels_hands_come_back_when_their_queue_stops_after_its_socket() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    bench.start(true);
    bench.post(true, 6, 72);
    bench.pump.work();
    kernel.send(3);
    kernel.complete(1);
    assert!(matches!(bench.pump.execute(Command::Stop { tx: true }), Err(Error::Host(_))), "five are not sent");
    assert_eq!(bench.take(true), 1);
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.take(true), 0, "a NIC may still read them");
    assert_eq!(bench.stop(true), 6);
    assert_eq!(bench.drivers[1].outstanding(), 0);
    assert_eq!((bench.pump.tx_counts.frames, bench.pump.tx_counts.direct), (6, 6));
}

#[test]
fn test_a_queue_stops_at_once_when_nothing_of_it_is_on_its_way() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut kernel = bench.attach();
    bench.start(true);
    bench.post(true, 2, 72);
    bench.pump.work();
    while kernel.send(1) > 0 {
        kernel.complete(0);
    }
    assert_eq!(bench.stop(true), 2);
    assert!(bench.pump.xsk.is_some(), "the socket stays");
}

#[test]
fn test_without_a_socket_queues_start_and_stop_where_they_are() {
    let mut bench = Bench::new(PollMode::Interrupt);
    bench.post(true, 4, 72);
    bench.start(true);
    assert_eq!(bench.pump.work(), 0);
    assert_eq!(bench.stop(true), 0);
    assert_eq!(bench.drivers[1].outstanding(), 4);
}

#[test]
fn test_what_waits_for_a_socket_keeps_nobody_awake_and_is_lost_in_the_end() {
    let mut bench = Bench::new(PollMode::Interrupt);
    bench.post(false, 4, 1600);
    bench.post(true, 4, 72);
    bench.start(false);
    bench.start(true);
    assert_eq!(bench.pump.work(), 0);
    assert!(!bench.pump.arm(true), "there is nothing to do but to wait");
    assert!(bench.pump.timeout().is_some_and(|timeout| timeout <= bench.pump.unsent_patience));

    bench.pump.unsent_patience = Duration::ZERO;
    assert!(bench.pump.arm(true));
    assert_eq!((bench.pump.work(), bench.take(true)), (4, 4));
    assert_eq!(bench.pump.tx_counts.dropped[DropReason::NoLink as usize], 4);
    bench.pump.tx.as_mut().unwrap().vring.enabled = false;
    bench.post(true, 2, 72);
    assert_eq!((bench.pump.work(), bench.take(true)), (2, 2));
    assert_eq!(bench.pump.tx_counts.dropped[DropReason::Disabled as usize], 2);
    assert!(!bench.pump.arm(true));
    assert_eq!((bench.pump.timeout(), bench.take(false)), (None, 0));
}

/// A frame of 100 segments, of which a burst sends 64: the rest is held.
fn post_large(bench: &mut Bench) {
    let packet = Packet {
        vlans: vec![],
        ip: Ip::V4 { id: 1, options: vec![] },
        transport: Transport::Tcp { sequence: 1, flags: 0x10, options: vec![] },
        payload: vec![7; 800],
    };
    let request = packet.request();
    let mut bytes = net_header(NEEDS_CSUM, packet.gso_type(), 8, &request).to_vec();
    bytes.resize(12, 0);
    bytes.extend(&request.frame);
    let at = GuestPhysAddr(BUFFERS_AT + 20 * BUFFER_BYTES);
    bench.guest.vmm.write(at, &bytes).unwrap();
    bench.drivers[1].add(&[Segment::readable(at, bytes.len() as u32)]).unwrap();
    bench.drivers[1].publish();
}

#[test]
fn test_what_waits_behind_a_frame_of_which_a_part_is_sent_is_not_lost_before_that_is_given_up() {
    for packed in [0, VIRTIO_F_RING_PACKED] {
        let features = FEATURES | VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | packed;
        let mut bench = Bench::with(Guest::of_pages(64), PollMode::Interrupt, features);
        let kernel = bench.attach();
        bench.start(true);
        post_large(&mut bench);
        bench.post(true, 3, 72);
        bench.pump.work();
        assert!(bench.pump.tx.as_ref().unwrap().holds());
        bench.pump.drain_deadline = Duration::ZERO;
        bench.pump.unsent_patience = Duration::ZERO;
        bench.pump.execute(Command::Detach).unwrap();
        drop(kernel);
        assert_eq!((bench.pump.work(), bench.take(true)), (0, 0), "a NIC may still read it");
        assert!(!bench.pump.arm(true), "there is nothing to do but to wait");
        assert_eq!(bench.pump.timeout(), None);
        bench.pump.execute(Command::Reclaim).unwrap();
        assert_eq!((bench.pump.work(), bench.take(true)), (4, 4));
        bench.stop(true);
    }
}

#[test]
fn test_patience_begins_anew_with_each_socket_and_each_queue() {
    let mut bench = Bench::new(PollMode::Interrupt);
    bench.start(true);
    bench.pump.work();
    assert!(bench.pump.unsent_since.is_some());
    let _kernel = bench.attach();
    bench.pump.work();
    assert!(bench.pump.unsent_since.is_none());
    bench.pump.execute(Command::Detach).unwrap();
    bench.pump.work();
    assert!(bench.pump.unsent_since.is_some());
    bench.stop(true);
    bench.pump.work();
    let before = Instant::now();
    bench.start(true);
    assert!(bench.pump.unsent_since.is_some_and(|since| since >= before));
}

#[test]
fn test_what_a_closed_socket_had_can_be_given_back_while_queues_run() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let _kernel = bench.attach();
    bench.post(false, 3, 1600);
    bench.start(false);
    bench.start(true);
    bench.post(true, 2, 72);
    bench.pump.work();
    bench.pump.execute(Command::Reclaim).unwrap();
    assert_eq!(bench.take(true), 0, "the socket is still there");
    bench.pump.execute(Command::Detach).unwrap();
    assert_eq!(bench.take(true), 0);

    bench.pump.execute(Command::Reclaim).unwrap();
    assert_eq!((bench.take(true), bench.take(false)), (2, 0));
    assert_eq!(bench.pump.rx.as_ref().unwrap().vring.queue.base(), 0, "buffers are in the avail ring again");

    let mut kernel = bench.attach();
    bench.pump.work();
    kernel.receive(&[1; 60], 0);
    bench.pump.work();
    assert_eq!(bench.take(false), 1);
    bench.pump.execute(Command::Detach).unwrap();
    bench.stop(false);
    bench.stop(true);
}

/// The guest sends a frame from `source`; what its address is known to be then.
fn send(bench: &mut Bench, source: MacAddress) -> Option<MacAddress> {
    let frame = [[0; 12].as_slice(), &[0xff; 6], &source].concat();
    bench.guest.vmm.write(GuestPhysAddr(BUFFERS_AT + BUFFER_BYTES), &frame).unwrap();
    bench.post(true, 1, 72);
    bench.pump.work();
    bench.pump.publish();
    bench.pump.view.guest_address()
}

#[test]
fn test_a_guest_whose_source_is_locked_is_announced_by_no_other() {
    let (mine, other) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut bench = Bench::new(PollMode::Interrupt);
    bench.pump.lock = SourceLock::to(&[mine]);
    let mut kernel = bench.attach();
    bench.start(true);
    assert_eq!(send(&mut bench, other), None);
    let mut inject = |source| {
        let frame = [&[0xff; 6], &source, [0x55; 48].as_slice()].concat();
        bench.pump.execute(Command::Inject { frame })
    };
    assert_eq!(refused(inject(other)), "cannot send a frame from an address that the guest may not have");
    assert_eq!(inject(mine).unwrap(), 0);
    assert_eq!(bench.pump.tx_counts.dropped[DropReason::Spoofed as usize], 2);
    kernel.send(usize::MAX);
    assert_eq!((kernel.sending(), kernel.complete(0)[6..12].to_vec()), (1, mine.to_vec()));
}

#[test]
fn test_the_guests_address_is_that_of_its_first_frame() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let mut _kernel = bench.attach();
    bench.start(true);
    assert_eq!(send(&mut bench, [2, 0, 0, 0, 0, 1]), Some([2, 0, 0, 0, 0, 1]));
    assert_eq!(send(&mut bench, [2, 0, 0, 0, 0, 2]), Some([2, 0, 0, 0, 0, 1]));
    for source in [[0; 6], [3, 0, 0, 0, 0, 1]] {
        bench.pump.execute(Command::Detach).unwrap();
        bench.stop(true);
        bench.start(true);
        assert_eq!(bench.pump.view.guest_address(), None, "it may be another guest");
        _kernel = bench.attach();
        assert_eq!(send(&mut bench, source), None, "no station has this address");
    }
}

#[test]
fn test_commands_in_the_wrong_state_are_refused_in_words() {
    let mut bench = Bench::new(PollMode::Interrupt);
    for tx in [false, true] {
        let index = usize::from(tx);
        let not_running = format!("vring {index} does not run");
        assert_eq!(refused(bench.pump.execute(Command::Stop { tx })), not_running);
        assert_eq!(refused(bench.pump.execute(Command::Enable { tx, enabled: true })), not_running);
        bench.start(tx);
        let (memory, config) = (bench.guest.memory.clone(), Box::new(bench.vring(tx)));
        let again = bench.pump.execute(Command::Start { tx, memory, config });
        assert_eq!(refused(again), format!("vring {index} runs already; stop it first"));
    }
    assert!(bench.pump.execute(Command::Detach).is_ok(), "what is not there can be taken away");
}

#[test]
fn test_a_new_call_eventfd_is_signalled_for_a_call_that_may_have_gone_to_the_old_one() {
    let mut bench = Bench::new(PollMode::Interrupt);
    bench.start(true);
    let call = EventFd::new().unwrap();
    let fd = Some(EventFd::duplicate(call.raw()).unwrap());
    bench.pump.execute(Command::SetCall { tx: true, fd }).unwrap();
    assert!(was_signalled(&call));
}

#[test]
fn test_frames_of_ours_leave_through_the_slab_with_or_without_a_queue() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let inject = |len| Command::Inject { frame: vec![7; len] };
    assert!(refused(bench.pump.execute(inject(60))).contains("no socket"));
    let mut kernel = bench.attach();
    for len in [13, FRAME_BYTES_MAX as usize + 1] {
        assert!(refused(bench.pump.execute(inject(len))).contains("no frame"));
    }
    for running in [false, true] {
        if running {
            bench.start(true);
        }
        for len in [14, FRAME_BYTES_MAX as usize] {
            bench.pump.execute(inject(len)).unwrap();
            kernel.send(1);
            assert_eq!(kernel.complete(0), vec![7; len]);
            bench.pump.work();
            assert!(bench.pump.flight.is_empty());
        }
    }
    assert_eq!(bench.pump.tx_counts, crate::stats::Counts::default(), "they are not the guest's");
}

#[test]
fn test_a_full_tx_ring_takes_no_frame_of_ours() {
    let mut bench = Bench::new(PollMode::Interrupt);
    let _kernel = bench.attach();
    let mut inject = || bench.pump.execute(Command::Inject { frame: vec![7; 60] });
    let sent = (0..).take_while(|_| inject().is_ok()).count();
    assert_eq!(sent, 512, "as many as there are slab frames");
    assert!(refused(inject()).contains("try again"));
}
