use proptest::prelude::*;

use super::bench::{Bench, FRAME_MAX};
use crate::fixture::{VIRTIO_F_VERSION_1, cases};
use crate::offload::tests::packet::{Ip, NEEDS_CSUM, Packet, Transport, net_header};
use crate::stats::{BounceReason, DropReason, Offload};
use crate::xsk::{BindMode, LONG_FRAME_BYTES_MAX, TX_RING_DESCS};

/// CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO.
const OFFLOADS: u64 = VIRTIO_F_VERSION_1 | 1 | 7 << 11 | 1 << 56;
const SLOT_BYTES: u64 = 72 << 10;
/// What Linux sends over Ethernet with timestamps.
const MSS: u16 = 1448;
const HEADERS: usize = 14 + 20 + 32;

fn bench(mode: BindMode) -> Bench {
    Bench::with_features(OFFLOADS, FRAME_MAX, mode, SLOT_BYTES)
}

fn tcp4(payload_bytes: usize, seed: usize) -> Packet {
    Packet {
        vlans: vec![],
        ip: Ip::V4 { id: 65530, options: vec![] },
        transport: Transport::Tcp { sequence: seed as u32, flags: 0x99, options: vec![1; 12] },
        payload: (0..payload_bytes).map(|i| (i * 7 + i / 256 + seed) as u8).collect(),
    }
}

/// Posts a large frame, in pieces of `cuts` bytes; false if the ring is full.
fn post_large(bench: &mut Bench, packet: &Packet, size: u16, cuts: &[usize]) -> bool {
    let request = packet.request();
    let header = net_header(NEEDS_CSUM, packet.gso_type(), size, &request);
    bench.post_frame(header, &request.frame, cuts, &packet.segments(usize::from(size)))
}

/// Posts a frame without its checksum.
fn post_unsummed(bench: &mut Bench, packet: &Packet, cuts: &[usize]) -> bool {
    let request = packet.request();
    bench.post_frame(net_header(NEEDS_CSUM, 0, 0, &request), &request.frame, cuts, &[packet.frame(false)])
}

#[test]
fn test_of_64_kib_of_tcp_nothing_is_copied_but_headers() {
    let mut bench = bench(BindMode::Copy);
    // In pieces as Linux has them: the headers, and page fragments of up to 32 KiB.
    assert!(post_large(&mut bench, &tcp4(65160, 1), MSS, &[12, HEADERS, 32768]));
    bench.settle_down();
    let counts = bench.counts;
    assert_eq!((counts.frames, counts.direct, counts.header_split), (45, 45, 45));
    assert_eq!((counts.copied_bytes, counts.header_bytes), (45 * HEADERS as u64, 45 * HEADERS as u64));
    assert_eq!(counts.bytes, 65160 + 45 * HEADERS as u64);
    assert_eq!(counts.offloaded[Offload::Tso4 as usize], 1);
    assert_eq!((bench.used, bench.sent.0, bench.driver.outstanding()), (1, 45, 0));
}

#[test]
fn test_a_frame_without_payload_is_one_piece_and_its_head_is_used_at_once() {
    let mut bench = bench(BindMode::Copy);
    assert!(post_unsummed(&mut bench, &tcp4(0, 1), &[12, 50, 1000]));
    assert!(post_unsummed(&mut bench, &tcp4(100, 2), &[12, 50, 1000]));
    bench.burst();
    assert_eq!(bench.kernel.pieces_to_read().len(), 1 + 2, "headers; headers and payload");
    bench.take();
    assert_eq!(bench.used, 1);
    bench.settle_down();
    assert_eq!((bench.used, bench.counts.header_split), (2, 2));
    assert_eq!(bench.counts.copied_bytes, 2 * HEADERS as u64);
    assert_eq!(bench.counts.offloaded[Offload::Checksum as usize], 2);
}

#[test]
fn test_frames_of_which_nothing_is_asked_leave_as_they_are() {
    let mut bench = bench(BindMode::Copy);
    let frame = tcp4(500, 1).frame(false);
    assert!(bench.post_frame([0; 10], &frame, &[2000], std::slice::from_ref(&frame)));
    // Only the checksum's flag has a meaning on tx; DATA_VALID has none.
    assert!(bench.post_frame([2, 0, 1, 2, 3, 4, 5, 6, 7, 8], &frame, &[5, 7, 2000], std::slice::from_ref(&frame)));
    bench.settle_down();
    assert_eq!((bench.counts.direct, bench.counts.header_split, bench.counts.copied_bytes), (2, 0, 0));
}

#[test]
fn test_a_frame_longer_than_the_rings_goes_on_when_there_is_room() {
    let mut bench = bench(BindMode::Copy);
    // One piece, and 3900 segments of two pieces each.
    let packet = tcp4(65000, 1);
    let room = 1 + (TX_RING_DESCS - 1) / 2;
    assert!(post_unsummed(&mut bench, &tcp4(0, 3), &[1000]));
    assert!(post_large(&mut bench, &packet, 17, &[40000]));
    assert!(post_unsummed(&mut bench, &tcp4(0, 2), &[1000]));
    while bench.burst() > 0 {}
    assert_eq!(bench.counts.frames, u64::from(room), "the ring is full");
    assert_eq!(bench.tx.vring.queue.base(), 2, "nothing overtakes a frame that is held");
    bench.kernel.send(usize::MAX);
    while bench.kernel.sending() > 0 {
        bench.complete(0);
    }
    bench.burst();
    bench.take();
    assert_eq!(bench.used, 1, "all that was sent is done, but not all is sent");
    bench.settle_down();
    assert_eq!((bench.used, bench.counts.frames), (3, packet.segments(17).len() as u64 + 2));
    assert_eq!(bench.unsent.values().sum::<u32>(), 0);
}

#[test]
fn test_a_burst_ends_within_a_large_frame() {
    let mut bench = bench(BindMode::Copy);
    assert!(post_large(&mut bench, &tcp4(65000, 1), 500, &[40000]));
    assert_eq!((bench.burst(), bench.burst()), (64, 64));
    bench.settle_down();
    assert_eq!(bench.counts.frames, 130);
}

#[test]
fn test_the_head_of_a_large_frame_is_used_when_the_last_of_its_pieces_is_done() {
    let mut bench = bench(BindMode::Copy);
    assert!(post_large(&mut bench, &tcp4(10 * 1448, 1), MSS, &[12, HEADERS, 32768]));
    bench.burst();
    assert_eq!(bench.kernel.send(usize::MAX), 10);
    for left in (1..10).rev() {
        bench.complete(left / 2);
        bench.burst();
        bench.take();
        assert_eq!(bench.used, 0, "{left} segments to go");
    }
    bench.complete(0);
    bench.burst();
    bench.take();
    assert_eq!(bench.used, 1);
}

#[test]
fn test_a_large_frame_of_which_a_part_is_sent_is_given_back_when_the_queue_stops() {
    let mut bench = bench(BindMode::Copy);
    assert!(post_unsummed(&mut bench, &tcp4(300, 1), &[1000]));
    assert!(post_large(&mut bench, &tcp4(65000, 2), 100, &[40000]));
    bench.burst();
    bench.kernel.send(20);
    assert!(bench.tx.holds());
    bench.restart();
    assert_eq!(bench.tx.vring.queue.base(), 1, "the one that is held, and not the one before");
    assert_eq!((bench.used, bench.flight.used_slab_frames()), (1, 0));
    bench.settle_down();
    assert_eq!((bench.used, bench.driver.outstanding()), (2, 0));
    let unsent: Vec<_> = bench.unsent.iter().filter(|(_, left)| **left > 0).map(|(frame, _)| frame.len()).collect();
    assert_eq!(unsent, [300 + HEADERS], "the whole of it is sent again");
}

#[test]
fn test_what_cannot_be_split_is_copied_with_its_checksum() {
    let mut bench = bench(BindMode::ZeroCopy);
    bench.xsk.rules.tx_pieces_max = 1;
    bench.xsk.rules.tx_frame_min = 100;
    assert!(post_large(&mut bench, &tcp4(3001, 1), MSS, &[12, 777]));
    assert!(post_unsummed(&mut bench, &tcp4(1000, 2), &[12, 30]));
    let mut padded = tcp4(1, 3).frame(false);
    padded.resize(100, 0);
    let request = tcp4(1, 3).request();
    assert!(bench.post_frame(net_header(NEEDS_CSUM, 0, 0, &request), &request.frame, &[99], &[padded]));
    bench.burst();
    bench.take();
    assert_eq!(bench.used, 3, "copied frames' heads are used at once");
    bench.settle_down();
    assert_eq!(bench.bounced(BounceReason::TooManyPieces), 4);
    assert_eq!(bench.bounced(BounceReason::ShortFrame), 1);
    assert_eq!((bench.counts.direct, bench.counts.header_bytes), (0, 0));
    assert_eq!(bench.counts.copied_bytes, bench.counts.bytes);
    assert_eq!(bench.unsent.values().sum::<u32>(), 0);
}

#[test]
fn test_what_cannot_be_done_is_dropped_by_reason_and_its_head_used() {
    let mut bench = bench(BindMode::Copy);
    let request = tcp4(100, 1).request();
    for (flags, gso_type, size, at) in [(1, 3, 10, 0), (0, 1, 10, 0), (1, 1, 0, 0), (1, 1, 10, 1), (1, 0, 0, 600)] {
        let mut header = net_header(flags, gso_type, size, &request);
        header[6..8].copy_from_slice(&(request.sum_start + at).to_le_bytes());
        assert!(bench.post_frame(header, &request.frame, &[1000], &[]));
    }
    let too_long = tcp4(FRAME_MAX as usize, 1).request();
    assert!(bench.post_frame(net_header(1, 0, 0, &too_long), &too_long.frame, &[1000], &[]));
    assert!(bench.post_frame(net_header(1, 1, 10, &request), &request.frame[..13], &[1000], &[]));
    bench.settle_down();
    let reasons =
        [DropReason::BadSegmentRequest, DropReason::BadChecksumRequest, DropReason::Oversize, DropReason::Runt];
    assert_eq!(reasons.map(|reason| bench.dropped(reason)), [4, 1, 1, 1]);
    assert_eq!((bench.used, bench.counts.frames, bench.counts.offloaded.iter().sum::<u64>()), (7, 0, 0));
    bench.tx.vring.enabled = false;
    assert!(post_large(&mut bench, &tcp4(1000, 1), MSS, &[1000]));
    bench.settle_down();
    assert_eq!(bench.dropped(DropReason::Disabled), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Post(usize, Option<u16>, Vec<usize>),
    Burst,
    Send(usize),
    Complete(prop::sample::Index),
    Take,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![4 => Just(MSS), 2 => 100u16..9216, 1 => 1u16..20];
    // Odd lengths and addresses, and pieces of which a segment has more than a packet may.
    let cuts = prop_oneof![Just(vec![12, HEADERS, 32768]), prop::collection::vec(1usize..3000, 1..4)];
    prop_oneof![
        6 => (0usize..12000, prop::option::of(size), cuts).prop_map(|(bytes, size, cuts)| Step::Post(bytes, size, cuts)),
        5 => Just(Step::Burst),
        4 => prop_oneof![18usize..60, Just(256usize)].prop_map(Step::Send),
        8 => any::<prop::sample::Index>().prop_map(Step::Complete),
        3 => Just(Step::Take),
        1 => Just(Step::Restart),
    ]
}

fn run(mode: BindMode, frame_max: u32, pieces_max: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut bench = Bench::with_features(OFFLOADS, frame_max, mode, SLOT_BYTES);
    let unsummed_max = frame_max as usize - HEADERS;
    let (mut posted, mut restarts) = (0, 0);
    bench.xsk.rules.tx_pieces_max = pieces_max;
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            Step::Post(bytes, Some(size), cuts) => {
                let size = size.min(unsummed_max as u16);
                posted += u64::from(post_large(&mut bench, &tcp4(bytes, number), size, &cuts));
            }
            Step::Post(bytes, None, cuts) => {
                posted += u64::from(post_unsummed(&mut bench, &tcp4(bytes % unsummed_max, number), &cuts));
            }
            Step::Burst => _ = bench.burst(),
            Step::Send(budget) => _ = bench.kernel.send(budget),
            Step::Complete(which) if bench.kernel.sending() > 0 => bench.complete(which.index(bench.kernel.sending())),
            Step::Complete(_) => {}
            Step::Take => bench.take(),
            Step::Restart => {
                restarts += 1;
                bench.restart();
                bench.xsk.rules.tx_pieces_max = pieces_max;
            }
        }
    }
    bench.settle_down();
    let counts = &bench.counts;
    prop_assert_eq!((bench.driver.outstanding(), bench.used), (0, posted), "every head came back once");
    prop_assert_eq!(bench.flight.used_slab_frames(), 0);
    prop_assert_eq!(counts.direct + bench.bounced_frames(), counts.frames);
    prop_assert_eq!(counts.direct, counts.header_split);
    if restarts == 0 {
        prop_assert_eq!(bench.unsent.values().sum::<u32>(), 0, "every segment left, once");
        prop_assert_eq!(counts.offloaded.iter().sum::<u64>(), posted);
        prop_assert_eq!(counts.bytes, bench.sent.1);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn test_in_copy_mode_every_segment_leaves_whole_and_every_head_comes_back_once(
        steps in prop::collection::vec(step(), 1..60), pieces_max in prop::sample::select(vec![2usize, 8, 18]),
        frame_max in prop::sample::select(vec![FRAME_MAX, LONG_FRAME_BYTES_MAX]),
    ) {
        run(BindMode::Copy, frame_max, pieces_max, steps)?;
    }

    #[test]
    fn test_with_exact_completions_every_segment_leaves_whole_and_every_head_comes_back_once(
        steps in prop::collection::vec(step(), 1..60), pieces_max in prop::sample::select(vec![1usize, 8]),
    ) {
        run(BindMode::ZeroCopy, FRAME_MAX, pieces_max, steps)?;
    }
}
