use std::time::Duration;

use mpassthru_testing::driver::Segment;
use mpassthru_testing::memory::GuestPhysAddr;
use proptest::prelude::*;

use super::bench::{Bench, Delivered, Shape, features, frame, number};
use crate::fixture::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, cases};
use crate::pump::wait::sleep;
use crate::stats::{BounceReason, DropReason};
use crate::xsk::LONG_FRAME_BYTES_MAX;
use crate::xsk::test_kernel::Received;

/// What happens between guest, device and kernel, in any order.
#[derive(Debug, Clone)]
enum Step {
    /// The driver posts buffers, by indirect tables or not.
    Post(Vec<Shape>, bool),
    /// Frames of these lengths arrive.
    Receive(Vec<u32>),
    /// A frame arrives a few bytes further on than computed (hardware timestamps).
    ReceiveShifted(u32),
    /// The XDP program passes a frame: its buffer is used again, before all others.
    Pass,
    Burst,
    /// The driver takes what was used.
    Take,
    /// SET_VRING_ENABLE.
    Enable(bool),
    /// The socket is closed, everything is given back, and the queue starts again.
    Restart,
}

/// Buffers that hold a frame in one piece, nearly do, do not, or not even the header; with odd places and empty pieces.
fn shape(frame_max: u32) -> impl Strategy<Value = Shape> {
    let whole = 12 + frame_max;
    prop_oneof![
        4 => (0u64..70, whole..whole + 70).prop_map(|piece| vec![piece]),
        3 => (0u64..70, 12..whole).prop_map(|piece| vec![piece]),
        2 => (0u64..70, 0u64..70, frame_max - 3..frame_max + 20).prop_map(|(a, b, len)| vec![(a, 12), (b, len)]),
        3 => prop::collection::vec((0u64..40, prop_oneof![0u32..30, 0u32..600]), 1..8),
    ]
}

fn step(frame_max: u32) -> impl Strategy<Value = Step> {
    steps_with(shape(frame_max).boxed(), prop_oneof![14u32..100, 14..=frame_max, Just(frame_max)].boxed())
}

/// As [`step`], with frames in several pieces of up to `room` bytes, too long ones among them, and buffers of up to a few
/// pages.
fn long_step(room: u32) -> impl Strategy<Value = Step> {
    let len = prop_oneof![
        2 => 14..=room,
        3 => room + 1..4 * room,
        2 => (1u32..5, 0u32..3).prop_map(move |(pieces, more)| pieces * room + more),
        2 => room..=LONG_FRAME_BYTES_MAX + 1,
    ];
    let long = (0u64..70, 4000u32..12_000).prop_map(|piece| vec![piece]);
    let chain = prop::collection::vec((0u64..40, 1000u32..2000), 5..8);
    let shape = prop_oneof![8 => shape(room), 2 => long, 2 => chain];
    steps_with(shape.boxed(), len.boxed())
}

fn steps_with(shape: BoxedStrategy<Shape>, len: BoxedStrategy<u32>) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (prop::collection::vec(shape, 1..12), any::<bool>()).prop_map(|(s, i)| Step::Post(s, i)),
        6 => prop::collection::vec(len.clone(), 1..8).prop_map(Step::Receive),
        1 => len.prop_map(Step::ReceiveShifted),
        1 => Just(Step::Pass),
        6 => Just(Step::Burst),
        4 => Just(Step::Take),
        1 => any::<bool>().prop_map(Step::Enable),
        1 => Just(Step::Restart),
    ]
}

/// The features that every driver has, with split or with packed virtqueues.
fn layout() -> impl Strategy<Value = u64> {
    prop_oneof![Just(VIRTIO_F_VERSION_1), Just(VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED)]
}

/// Runs the steps; the bench checks each head and each guarded byte as it goes.
fn run(mut bench: Bench, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mergeable = bench.rx.vring.mergeable;
    let frame_max = bench.umem.frame_max;
    let mut delivered = Vec::new();
    // Frames in the rx ring when the socket was closed: lost, as the wire loses them.
    let mut lost = 0;
    for step in steps.into_iter().chain([Step::Enable(true), Step::Burst, Step::Burst, Step::Restart]) {
        match step {
            Step::Post(shapes, indirect) => {
                let _posted = shapes.iter().filter(|shape| bench.post(shape, indirect)).count();
                bench.driver.publish();
            }
            Step::Receive(lens) => {
                for len in lens {
                    bench.receive(len, 0);
                }
            }
            Step::ReceiveShifted(len) => {
                bench.receive(len.min(frame_max - 16), 16);
            }
            Step::Pass => bench.kernel.drop_in_program(),
            Step::Burst => {
                bench.burst();
            }
            Step::Take => delivered.extend(bench.take()),
            Step::Enable(enabled) => bench.rx.vring.enabled = enabled,
            Step::Restart => {
                while bench.xsk.rx_peek() > 0 {
                    lost += u64::from(!bench.xsk.rx_read().more);
                }
                delivered.extend(bench.restart());
            }
        }
    }
    check_frames(&bench, mergeable, &delivered)?;
    check_counts(&bench, &delivered, lost)
}

/// Frames are whole, in order, and none comes twice.
fn check_frames(bench: &Bench, mergeable: bool, delivered: &[Delivered]) -> Result<(), TestCaseError> {
    let numbers: Vec<_> = delivered.iter().map(|d| number(&d.frame)).collect();
    prop_assert!(numbers.is_sorted_by(|a, b| a < b), "in the order of the wire, once each: {numbers:?}");
    for Delivered { frame: bytes, num_buffers, .. } in delivered {
        prop_assert_eq!(bytes, &frame(number(bytes), bytes.len() as u32));
        prop_assert!(mergeable || *num_buffers == 1);
        prop_assert!(bench.in_place[&number(bytes)] < bytes.len() as u32 || *num_buffers == 1);
    }
    Ok(())
}

/// direct + bounced = frames; frames + dropped = received; a byte in place is never copied, any other is once.
fn check_counts(bench: &Bench, delivered: &[Delivered], lost: u64) -> Result<(), TestCaseError> {
    let counts = &bench.counts;
    let in_place = |d: &Delivered| u64::from(bench.in_place[&number(&d.frame)]);
    let bytes = |d: &Delivered| d.frame.len() as u64;
    prop_assert_eq!(counts.frames, delivered.len() as u64);
    prop_assert_eq!(counts.bytes, delivered.iter().map(bytes).sum::<u64>());
    prop_assert_eq!(counts.direct, delivered.iter().filter(|d| in_place(d) == bytes(d)).count() as u64);
    prop_assert_eq!(counts.direct + counts.bounced.iter().sum::<u64>(), counts.frames);
    let copied = delivered.iter().map(|d| bytes(d) - in_place(d)).sum::<u64>();
    prop_assert_eq!(counts.copied_bytes, copied);
    let dropped = counts.dropped.iter().sum::<u64>();
    prop_assert_eq!(counts.frames + dropped + lost, bench.in_place.len() as u64);
    prop_assert_eq!(bench.dropped(DropReason::NoBuffer), 0, "a frame in the slab always finds its buffers");
    Ok(())
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn test_mergeable_buffers_of_any_shape_get_every_frame_whole_and_come_back_once(
        layout in layout(), steps in prop::collection::vec(step(600), 1..60),
    ) {
        run(Bench::of(layout | VIRTIO_NET_F_MRG_RXBUF, 600), steps)?;
    }

    #[test]
    fn test_single_buffers_of_any_shape_get_every_frame_whole_and_come_back_once(
        layout in layout(), steps in prop::collection::vec(step(1524), 1..60),
    ) {
        run(Bench::of(layout, 1524), steps)?;
    }

    #[test]
    fn test_mergeable_buffers_of_any_shape_get_frames_in_pieces_whole_and_come_back_once(
        layout in layout(), steps in prop::collection::vec(long_step(600), 1..60),
    ) {
        run(Bench::for_long_frames(layout | VIRTIO_NET_F_MRG_RXBUF, 600), steps)?;
    }

    #[test]
    fn test_single_buffers_of_any_shape_get_frames_in_pieces_whole_and_come_back_once(
        layout in layout(), steps in prop::collection::vec(long_step(1524), 1..60),
    ) {
        run(Bench::for_long_frames(layout, 1524), steps)?;
    }
}

#[test]
fn test_frames_that_fit_stay_in_place_and_not_a_byte_is_copied() {
    let mut bench = Bench::new(true, 1524);
    let mut received = 0;
    for round in 0..200u32 {
        while bench.post(&vec![(u64::from(round % 50), 1536)], round % 2 == 0) {}
        bench.driver.publish();
        bench.burst();
        for len in [60, 1514, 61 + round, 1524] {
            bench.receive(len, 0);
            received += 1;
        }
        bench.burst();
        assert_eq!(bench.take().len(), 4);
    }
    let counts = bench.counts;
    assert_eq!((counts.frames, counts.direct, counts.copied_bytes), (received, received, 0));
    assert_eq!(counts.bounced.iter().chain(&counts.dropped).sum::<u64>(), 0);
}

#[test]
fn test_one_buffer_posted_under_two_heads_takes_two_frames() {
    let mut bench = Bench::new(false, 600);
    let buffer = Segment::writable(GuestPhysAddr(0x1_0000), 700);
    let heads = [(); 2].map(|()| bench.driver.add(&[buffer]).unwrap());
    bench.driver.publish();
    bench.burst();
    let places = [bench.receive(600, 0), bench.receive(60, 0)];
    assert_eq!(places[0], places[1]);
    bench.burst();
    let mut used = [(); 2].map(|()| bench.driver.pop_used().unwrap().unwrap().head);
    used.sort_unstable();
    assert_eq!((used, bench.counts.direct), (heads, 2));
}

#[test]
fn test_without_buffers_the_kernel_drops_and_nothing_happens() {
    let mut bench = Bench::new(true, 1524);
    assert_eq!(bench.burst(), 0);
    assert_eq!(bench.receive(60, 0), Received::NoBuffer);
    assert_eq!((bench.burst(), bench.counts.frames), (0, 0));
}

#[test]
fn test_the_driver_is_woken_for_the_fill_ring_only_if_it_asked() {
    for asked in [false, true] {
        let mut bench = Bench::new(true, 1524);
        bench.kernel.ask_for_fill_wakeup(asked);
        bench.burst();
        assert_eq!(sleep([bench.xsk.raw_fd()], Some(Duration::ZERO)), [!asked], "a wake-up takes the message");
    }
}

#[test]
fn test_a_long_frame_leaves_its_first_piece_in_place_and_moves_the_rest_once() {
    let mut bench = Bench::for_long_frames(features(true), 1524);
    bench.post_many(8, &[(0, 1536)]);
    bench.burst();
    bench.receive(9014, 0);
    bench.burst();
    let delivered = bench.take();
    // 12 + 9014 bytes in full buffers of 1536.
    assert_eq!((delivered.len(), delivered[0].num_buffers), (1, 6));
    assert_eq!(delivered[0].frame, frame(0, 9014));
    assert_eq!(bench.counts.copied_bytes, 9014 - 1524);
    assert_eq!(bench.counts.bounced[BounceReason::LongFrame as usize], 1);
}

#[test]
fn test_buffers_that_a_long_frame_does_not_need_are_posted_again() {
    let mut bench = Bench::for_long_frames(features(true), 1524);
    bench.post_many(6, &[(0, 4096)]);
    for round in 0..20 {
        bench.burst();
        assert!(matches!(bench.receive(9014, 0), Received::At(_)), "six fill entries hold a frame of six pieces");
        bench.burst();
        let delivered = bench.take();
        assert_eq!((delivered[0].num_buffers, &delivered[0].frame), (3, &frame(round, 9014)));
        bench.post_many(3, &[(0, 4096)]);
    }
    assert_eq!(bench.counts.copied_bytes, 20 * (9014 - 1524));
}

#[test]
fn test_a_frame_longer_than_the_port_carries_is_dropped_and_its_buffers_are_posted_again() {
    let mut bench = Bench::for_long_frames(features(true), 1524);
    bench.post_many(7, &[(0, 1536)]);
    for _ in 0..3 {
        bench.burst();
        assert!(matches!(bench.receive(LONG_FRAME_BYTES_MAX + 1, 0), Received::At(_)));
        bench.burst();
    }
    assert_eq!((bench.dropped(DropReason::Oversize), bench.counts.frames, bench.counts.copied_bytes), (3, 0, 0));
    assert!(bench.take().is_empty());
    bench.stop();
}

#[test]
fn test_a_guest_that_cannot_merge_gets_a_long_frame_in_one_buffer() {
    let mut bench = Bench::for_long_frames(features(false), 1524);
    bench.post_many(8, &[(0, 1536)]);
    bench.post_many(8, &[(0, 12), (0, 9014)]);
    bench.burst();
    bench.receive(1524, 0);
    bench.receive(9014, 0);
    bench.burst();
    bench.take();
    assert_eq!((bench.counts.bounced[BounceReason::LongFrame as usize], bench.counts.copied_bytes), (1, 1524));
    assert_eq!(bench.dropped(DropReason::BufferTooSmall), 1, "its first buffer is small");
    for _ in 0..7 {
        bench.receive(60, 0);
    }
    bench.receive(9014, 0);
    bench.burst();
    let delivered = bench.take();
    assert_eq!((delivered.len(), &delivered[7].frame), (8, &frame(9, 9014)));
}

#[test]
fn test_an_answer_that_nobody_asked_for_amid_a_frame_loses_no_head() {
    let mut bench = Bench::for_long_frames(features(true), 1524);
    bench.post_many(8, &[(0, 1536)]);
    bench.burst();
    bench.receive(60, 0);
    bench.kernel.receive_first_pieces(&frame(9, 4000), 1);
    bench.kernel.answer_unasked(bench.umem_start(), 952);
    bench.rx.burst(&mut bench.xsk, &mut bench.slab, &mut bench.counts).unwrap_err();
    assert_eq!((bench.take().len(), bench.counts.frames), (1, 1), "the frame before");
    // Checks that each head comes back.
    assert!(bench.stop().is_empty());
}
