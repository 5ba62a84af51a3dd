//! GRO: what the guest gets, in whatever buffers it has, is what came, merged or not.

use proptest::prelude::*;
use proptest::sample::Index;

use super::bench::{Bench, Delivered, MERGING, Shape, features};
use crate::fixture::{VIRTIO_F_RING_PACKED, cases};
use crate::guest_memory::UmemAddr;
use crate::offload::tests::packet::{Ip, Packet, Transport};
use crate::offload::tests::segment::segments;
use crate::stats::{BounceReason, DropReason, Offload};

/// Of a driver that cuts what was merged.
const CUT: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 56;
const ROOM: u32 = 1524;

#[derive(Debug, Clone)]
enum Step {
    Post(Vec<Shape>),
    /// As many frames of a stream arrive, or something else.
    Receive(Index, usize),
    ReceiveOther,
    Burst,
    Take,
}

/// A stream of TCP or UDP; the VLAN tag tells it from others.
fn stream(vlan: u16, is_tcp: bool, is_ipv4: bool, segment: usize) -> Vec<Vec<u8>> {
    let ip = if is_ipv4 { Ip::V4 { id: 9, options: vec![] } } else { Ip::V6 { extensions: vec![] } };
    let tcp = Transport::Tcp { sequence: u32::MAX - 5000, flags: 0x10, options: vec![1; 12] };
    let transport = if is_tcp { tcp } else { Transport::Udp };
    let payload = (0..60_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    Packet { vlans: vec![vlan], ip, transport, payload }.segments(segment)
}

fn other() -> Vec<u8> {
    [&[0xff; 12][..], &[0x81, 0, 0xff, 0xff, 8, 6], &[0; 46]].concat()
}

fn shape() -> impl Strategy<Value = Shape> {
    prop_oneof![
        6 => Just(vec![(0, 1536)]),
        2 => (0u64..70, 1536u32..5000).prop_map(|piece| vec![piece]),
        2 => (0u64..70, 100u32..1536).prop_map(|piece| vec![piece]),
        1 => prop::collection::vec((0u64..40, 100u32..900), 2..5),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(shape(), 1..24).prop_map(Step::Post),
        6 => (any::<Index>(), 1usize..24).prop_map(|(which, count)| Step::Receive(which, count)),
        1 => Just(Step::ReceiveOther),
        4 => Just(Step::Burst),
        3 => Just(Step::Take),
    ]
}

fn tag(frame: &[u8]) -> [u8; 2] {
    [frame[14], frame[15]]
}

/// The frames that a packet was made of.
fn cut(delivered: &Delivered) -> Vec<Vec<u8>> {
    if delivered.net_header == [0; 10] {
        return vec![delivered.frame.clone()];
    }
    segments(&delivered.frame, delivered.net_header, CUT).unwrap().0
}

fn run(mut bench: Bench, streams: Vec<Vec<Vec<u8>>>, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (mut arrived, mut delivered) = (Vec::new(), Vec::new());
    let mut streams: Vec<_> = streams.into_iter().map(Vec::into_iter).collect();
    for step in steps.into_iter().chain([Step::Burst, Step::Burst, Step::Take]) {
        match step {
            Step::Post(shapes) => {
                let _posted = shapes.iter().filter(|shape| bench.post(shape, false)).count();
                bench.driver.publish();
            }
            Step::Receive(which, count) => {
                let frames = which.get_mut(&mut streams).by_ref().take(count);
                arrived.extend(frames.filter(|frame| bench.receive_frame(frame)));
            }
            Step::ReceiveOther => arrived.extend(Some(other()).filter(|frame| bench.receive_frame(frame))),
            Step::Burst => {
                bench.burst();
            }
            Step::Take => delivered.extend(bench.take()),
        }
    }
    let got: Vec<_> = delivered.iter().flat_map(cut).collect();
    for vlan in (0..streams.len() as u16).chain([0xffff]) {
        let of = |frames: &[Vec<u8>]| -> Vec<Vec<u8>> {
            frames.iter().filter(|frame| tag(frame) == vlan.to_be_bytes()).cloned().collect()
        };
        prop_assert_eq!(of(&got), of(&arrived), "stream {}", vlan);
    }
    let counts = &bench.counts;
    prop_assert_eq!((counts.frames, counts.dropped.iter().sum::<u64>()), (arrived.len() as u64, 0));
    prop_assert_eq!(counts.bytes, arrived.iter().map(|frame| frame.len() as u64).sum::<u64>());
    prop_assert_eq!(counts.direct + counts.bounced.iter().sum::<u64>(), counts.frames);
    let large = delivered.iter().filter(|delivered| delivered.net_header != [0; 10]);
    prop_assert_eq!(counts.offloaded[Offload::Gro as usize], large.clone().count() as u64);
    prop_assert_eq!(
        counts.bounced[BounceReason::Merged as usize],
        large.map(|large| cut(large).len() as u64).sum::<u64>()
    );
    prop_assert!(counts.copied_bytes <= counts.bytes);
    bench.stop();
    Ok(())
}

/// Streams of all kinds, each with segments of a length of its own.
fn streams() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
    prop::collection::vec((any::<bool>(), any::<bool>(), 200usize..1400), 1..5).prop_map(|kinds| {
        let numbered = kinds.into_iter().enumerate();
        numbered.map(|(vlan, (is_tcp, is_ipv4, segment))| stream(vlan as u16, is_tcp, is_ipv4, segment)).collect()
    })
}

proptest! {
    #![proptest_config(cases(150))]

    #[test]
    fn test_buffers_of_any_shape_get_every_stream_whole_and_in_order(
        streams in streams(), packed: bool, steps in prop::collection::vec(step(), 1..40),
    ) {
        let layout = if packed { VIRTIO_F_RING_PACKED } else { 0 };
        run(Bench::of(features(true) | MERGING | layout, ROOM), streams, steps)?;
    }

    #[test]
    fn test_frames_in_several_pieces_are_merged_too(
        streams in streams(), steps in prop::collection::vec(step(), 1..40),
    ) {
        run(Bench::for_long_frames(features(true) | MERGING, 500), streams, steps)?;
    }
}

#[test]
fn test_merged_payload_is_moved_once_and_the_first_frame_is_in_place() {
    let mut bench = Bench::of(features(true) | MERGING, ROOM);
    bench.post_many(40, &[(0, 1536)]);
    bench.burst();
    let frames: Vec<_> = stream(0, true, true, 1448).into_iter().take(40).collect();
    assert!(frames.iter().all(|frame| bench.receive_frame(frame)));
    bench.burst();
    let delivered = bench.take();
    // 12 + 70 bytes of headers and 40 of payload, in full buffers of 1536.
    let bytes = 12 + 70 + 40 * 1448;
    assert_eq!((delivered.len(), delivered[0].num_buffers), (1, (bytes as u16).div_ceil(1536)));
    assert_eq!(cut(&delivered[0]), frames);
    assert_eq!(bench.counts.copied_bytes, 39 * 1448, "all but the first frame's");
    assert_eq!(bench.counts.bounced[BounceReason::Merged as usize], 40);
    // Two of the buffers were not needed.
    assert!((0..2).all(|_| bench.receive_frame(&other())) && !bench.receive_frame(&other()));
}

#[test]
fn test_without_the_features_nothing_is_merged() {
    for lacking in [1 << 1, 1 << 7] {
        let mut bench = Bench::of((features(true) | MERGING) & !lacking, ROOM);
        bench.post_many(10, &[(0, 1536)]);
        bench.burst();
        stream(0, true, true, 1448).iter().take(10).for_each(|frame| assert!(bench.receive_frame(frame)));
        bench.burst();
        assert_eq!((bench.take().len(), bench.counts.direct, bench.counts.copied_bytes), (10, 10, 0));
    }
    let mut bench = Bench::of(features(false) | MERGING, ROOM);
    bench.post_many(10, &[(0, 12), (0, 1524)]);
    bench.burst();
    stream(0, true, true, 1448).iter().take(5).for_each(|frame| assert!(bench.receive_frame(frame)));
    bench.burst();
    assert_eq!((bench.take().len(), bench.counts.direct), (5, 5), "buffers that cannot be merged");
}

#[test]
fn test_a_disabled_queue_drops_what_would_be_merged() {
    let mut bench = Bench::of(features(true) | MERGING, ROOM);
    bench.post_many(5, &[(0, 1536)]);
    bench.burst();
    bench.rx.vring.enabled = false;
    let frames = stream(0, true, true, 1448);
    frames.iter().take(5).for_each(|frame| assert!(bench.receive_frame(frame)));
    bench.burst();
    assert_eq!((bench.dropped(DropReason::Disabled), bench.counts.frames), (5, 0));
    bench.rx.vring.enabled = true;
    frames.iter().take(5).for_each(|frame| assert!(bench.receive_frame(frame)));
    bench.burst();
    assert_eq!(cut(&bench.take()[0]), frames[..5]);
}

#[test]
fn test_a_frame_that_perhaps_no_head_waits_for_costs_those_of_its_flow_nothing() {
    let mut bench = Bench::of(features(true) | MERGING, ROOM);
    bench.xsk.rules.rx_buffers_min = 4;
    bench.post_many(5, &[(0, 1536)]);
    bench.burst();
    let frames = stream(0, true, true, 1448);
    frames.iter().take(9).for_each(|frame| assert!(bench.receive_frame(frame), "the driver has slab frames too"));
    bench.burst();
    let delivered = bench.take();
    assert_eq!((delivered.len(), cut(&delivered[0])), (1, frames[..5].to_vec()));
    assert_eq!(bench.dropped(DropReason::NoBuffer), 4);
}

#[test]
fn test_an_answer_that_nobody_asked_for_is_not_looked_into_and_loses_no_head() {
    let mut bench = Bench::of(features(true) | MERGING, ROOM);
    bench.post_many(5, &[(0, 1536)]);
    bench.burst();
    let frames = stream(0, true, true, 1448);
    frames.iter().take(3).for_each(|frame| assert!(bench.receive_frame(frame)));
    bench.kernel.answer_unasked(UmemAddr(1 << 40), 1000);
    bench.rx.burst(&mut bench.xsk, &mut bench.slab, &mut bench.counts).unwrap_err();
    assert_eq!(cut(&bench.take()[0]), frames[..3], "those before");
    // Checks that each head comes back.
    assert!(bench.stop().is_empty());
}

#[test]
fn test_where_nothing_can_be_merged_few_bursts_are_looked_at_and_a_stream_is_found_all_the_same() {
    let mut bench = Bench::of(features(true) | MERGING, ROOM);
    bench.post_many(40, &[(0, 1536)]);
    bench.burst();
    let mut round = |frames: [Vec<u8>; 2]| {
        frames.iter().for_each(|frame| assert!(bench.receive_frame(frame)));
        bench.burst();
        let delivered = bench.take().len();
        bench.post_many(2, &[(0, 1536)]);
        bench.burst();
        delivered
    };
    for _ in 0..17 {
        assert_eq!(round([other(), other()]), 2);
    }
    let frames = stream(0, true, true, 1448);
    let pair = || [frames[0].clone(), frames[1].clone()];
    let until_found = (1..).find(|_| round(pair()) == 1).unwrap();
    assert_eq!(until_found, 15, "the 32nd burst");
    assert_eq!(round(pair()), 1, "and each from then on");
}
