use proptest::prelude::*;

use super::super::strip_header;
use super::bench::{Bench, Chain, FRAME_MAX, Piece};
use crate::fixture::cases;
use crate::guest_memory::{Segment, UmemAddr};
use crate::stats::{BounceReason, DropReason};
use crate::xsk::{BindMode, Contiguity};

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_stripping_leaves_the_bytes_behind_the_header(
        lens in prop::collection::vec(1u32..40, 0..6), header_len in prop::sample::select(vec![10u32, 12, 20]),
    ) {
        let mut at = 0x1000;
        let mut chain = Vec::new();
        for len in lens {
            chain.push(Segment { addr: UmemAddr(at), len });
            at += u64::from(len) + 5;
        }
        let bytes = |chain: &[Segment]| -> Vec<u64> {
            chain.iter().flat_map(|piece| piece.addr.0..piece.addr.0 + u64::from(piece.len)).collect()
        };
        let all = bytes(&chain);
        let frame = strip_header(&mut chain, header_len);
        prop_assert_eq!(bytes(frame), all.get(header_len as usize..).unwrap_or_default());
        prop_assert!(frame.iter().all(|piece| piece.len > 0), "no empty piece becomes a descriptor");
    }
}

/// A bench that has sent one frame of these pieces.
fn sent(pieces: &[Piece], change: impl FnOnce(&mut Bench)) -> Bench {
    let mut bench = Bench::new(BindMode::Copy);
    change(&mut bench);
    bench.post_all(&[Chain::of(pieces)]);
    bench.burst();
    bench
}

#[test]
fn test_frames_that_cannot_be_sent_are_dropped_by_reason_and_their_heads_used() {
    for (len, reason) in [(0, DropReason::Runt), (13, DropReason::Runt), (FRAME_MAX + 1, DropReason::Oversize)] {
        let mut bench = sent(&[Piece::Own(0, len)], |_| {});
        bench.take();
        assert_eq!((bench.dropped(reason), bench.used, bench.counts.frames), (1, 1, 0), "{len} bytes");
    }
    let mut disabled = sent(&[Piece::Own(0, 60)], |bench| bench.tx.vring.enabled = false);
    disabled.take();
    assert_eq!((disabled.dropped(DropReason::Disabled), disabled.used), (1, 1));
    assert_eq!(sent(&[], |_| {}).dropped(DropReason::Runt), 1, "a header alone");
}

#[test]
fn test_a_frame_with_more_pieces_than_a_packet_may_have_is_copied_once() {
    let direct = sent(&[Piece::Own(1, 5); 18], |_| {});
    assert_eq!((direct.counts.direct, direct.counts.copied_bytes), (1, 0));
    let mut bounced = sent(&[Piece::Own(1, 5); 19], |_| {});
    assert_eq!((bounced.bounced(BounceReason::TooManyPieces), bounced.counts.copied_bytes), (1, 95));
    bounced.take();
    assert_eq!(bounced.used, 1, "a copied frame's head is used at once");
    bounced.settle_down();
    assert_eq!(bounced.sent, (1, 95));
}

#[test]
fn test_zero_copy_rules_bounce_what_the_driver_does_not_take() {
    let reasons = |bench: &Bench| {
        let named = BounceReason::NAMES.iter().zip(bench.counts.bounced).filter(|(_, count)| *count > 0);
        named.map(|(name, _)| *name).collect::<Vec<_>>()
    };
    let unproven = sent(&[Piece::Own(0, 60)], |bench| bench.xsk.rules.direct = false);
    assert_eq!(reasons(&unproven), ["driver_unproven"]);
    let within_page = |bench: &mut Bench| bench.xsk.rules.contiguity = Contiguity::WithinBackingPage;
    // Shared memory starts at a page.
    assert_eq!(reasons(&sent(&[Piece::Shared(4096 - 60, 60)], within_page)), [""; 0]);
    assert_eq!(reasons(&sent(&[Piece::Shared(4096 - 59, 60)], within_page)), ["not_contiguous"]);
}

#[test]
fn test_short_frames_are_padded_with_zeros_where_the_driver_wants_it() {
    let mut bench = Bench::new(BindMode::Copy);
    bench.xsk.rules.tx_frame_min = 60;
    // The slab frame was used before: its old bytes must not be sent.
    bench.post_all(&[Chain::of(&[Piece::Own(1, 100); 1]), Chain::of(&[Piece::Own(1, 5); 19])]);
    bench.settle_down();
    bench.post_all(&[Chain::of(&[Piece::Shared(0, 20)])]);
    bench.burst();
    assert_eq!(bench.bounced(BounceReason::ShortFrame), 1);
    bench.kernel.send(1);
    let frame = bench.kernel.complete(0);
    assert_eq!((frame.len(), &frame[20..]), (60, &[0u8; 40][..]));
    assert_eq!(bench.counts.bytes, 100 + 95 + 20, "padding is no frame of the guest's");
}
