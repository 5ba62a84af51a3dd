use proptest::prelude::*;

use super::bench::{Bench, Chain, FRAME_MAX, LONG_SLOT_BYTES, Piece};
use crate::fixture::cases;
use crate::stats::BounceReason;
use crate::xsk::{BindMode, LONG_FRAME_BYTES_MAX};

#[derive(Debug, Clone)]
enum Step {
    Post(Vec<Chain>),
    Burst,
    /// The kernel works on the tx ring, with a budget of descriptors.
    Send(usize),
    /// It completes some packet.
    Complete(prop::sample::Index),
    Take,
    Enable(bool),
    /// The socket is closed with frames in it.
    Restart,
}

fn piece() -> impl Strategy<Value = Piece> {
    let len = || prop_oneof![4 => 1u32..40, 1 => Just(0u32), 1 => 1u32..400];
    prop_oneof![
        (0u64..3, len()).prop_map(|(gap, len)| Piece::Own(gap, len)),
        // Few places, so that frames in flight share addresses or nearly do.
        (0u64..6, len()).prop_map(|(offset, len)| Piece::Shared(offset, len)),
    ]
}

/// Chains from nothing at all to more pieces than a packet may have, and now and then a frame that is too long.
fn chain() -> impl Strategy<Value = Chain> {
    let pieces = prop_oneof![
        8 => prop::collection::vec(piece(), 0..6),
        2 => prop::collection::vec(piece(), 15..22),
        4 => (0u64..3, 14u32..=FRAME_MAX + 2).prop_map(|(gap, len)| vec![Piece::Own(gap, len)]),
    ];
    (any::<bool>(), pieces).prop_map(|(split_header, pieces)| Chain {
        split_header,
        indirect: pieces.len() > 4,
        pieces,
    })
}

/// Chains of long frames: in a few pieces that are longer than a descriptor takes or not, or in too many.
fn long_chain() -> impl Strategy<Value = Chain> {
    let piece = || (0u64..3, prop_oneof![1u32..5000, 4095u32..4098, Just(8192u32)]);
    let own = |pieces: Vec<(u64, u32)>| pieces.into_iter().map(|(gap, len)| Piece::Own(gap, len)).collect::<Vec<_>>();
    let fits = |pieces: &Vec<(u64, u32)>| pieces.iter().map(|(_, len)| len).sum::<u32>() <= LONG_FRAME_BYTES_MAX + 2;
    let pieces = prop_oneof![
        4 => prop::collection::vec(piece(), 1..4).prop_filter("frames are not much too long", fits).prop_map(own),
        2 => (0u64..3, 4000u32..=LONG_FRAME_BYTES_MAX + 2).prop_map(|(gap, len)| vec![Piece::Own(gap, len)]),
        1 => (16u32..480).prop_map(|len| vec![Piece::Own(1, len); 19]),
    ];
    (any::<bool>(), pieces).prop_map(|(split_header, pieces)| Chain { split_header, indirect: true, pieces })
}

fn step(chain: impl Strategy<Value = Chain>) -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => prop::collection::vec(chain, 1..12).prop_map(Step::Post),
        5 => Just(Step::Burst),
        4 => prop_oneof![1usize..40, Just(256usize)].prop_map(Step::Send),
        8 => any::<prop::sample::Index>().prop_map(Step::Complete),
        4 => Just(Step::Take),
        1 => any::<bool>().prop_map(Step::Enable),
        1 => Just(Step::Restart),
    ]
}

fn run(mut bench: Bench, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut lost = 0;
    for step in steps {
        match step {
            Step::Post(chains) => {
                let _posted = chains.iter().filter(|chain| bench.post(chain)).count();
                bench.driver.publish();
            }
            Step::Burst => {
                bench.burst();
            }
            Step::Send(budget) => {
                bench.kernel.send(budget);
            }
            Step::Complete(which) if bench.kernel.sending() > 0 => {
                let index = which.index(bench.kernel.sending());
                bench.complete(index);
            }
            Step::Complete(_) => {}
            Step::Take => bench.take(),
            Step::Enable(enabled) => bench.tx.vring.enabled = enabled,
            Step::Restart => {
                lost += bench.counts.frames - bench.sent.0;
                bench.restart();
            }
        }
    }
    bench.settle_down();
    check(&bench, lost)
}

/// direct + bounced = frames; every frame is sent or lost with its socket; copied bytes are those of bounced frames.
fn check(bench: &Bench, lost: u64) -> Result<(), TestCaseError> {
    let counts = &bench.counts;
    prop_assert_eq!(bench.driver.outstanding(), 0, "every head came back");
    prop_assert_eq!(counts.direct + bench.bounced_frames(), counts.frames);
    prop_assert_eq!(bench.sent.0, counts.frames);
    let unsent = bench.unsent.values().map(|&count| u64::from(count)).sum::<u64>();
    prop_assert_eq!(unsent, bench.dropped_frames() + lost);
    prop_assert_eq!(bench.used, counts.frames + bench.dropped_frames());
    prop_assert!(counts.copied_bytes <= counts.bytes);
    prop_assert_eq!(counts.copied_bytes == 0, bench.bounced_frames() == 0);
    if lost == 0 {
        prop_assert_eq!(counts.bytes, bench.sent.1);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn test_in_copy_mode_every_frame_leaves_whole_and_every_head_comes_back_once(
        packed: bool, steps in prop::collection::vec(step(chain()), 1..80),
    ) {
        run(Bench::new(BindMode::Copy).packed(packed), steps)?;
    }

    #[test]
    fn test_with_exact_completions_every_frame_leaves_whole_and_every_head_comes_back_once(
        packed: bool, steps in prop::collection::vec(step(chain()), 1..80),
    ) {
        run(Bench::new(BindMode::ZeroCopy).packed(packed), steps)?;
    }

    #[test]
    fn test_frames_longer_than_a_chunk_leave_whole_and_every_head_comes_back_once(
        steps in prop::collection::vec(step(prop_oneof![chain(), long_chain()]), 1..60),
    ) {
        run(Bench::for_frames(LONG_FRAME_BYTES_MAX, BindMode::Copy, LONG_SLOT_BYTES), steps)?;
    }
}

#[test]
fn test_whole_frames_leave_from_the_guests_memory_and_not_a_byte_is_copied() {
    let mut bench = Bench::new(BindMode::Copy);
    for round in 0..40u32 {
        let frame = |gap, len| Chain { split_header: round % 2 == 0, ..Chain::of(&[Piece::Own(gap, len)]) };
        bench.post_all(&[frame(0, 60), frame(1, 1514), frame(0, 14 + round), frame(2, FRAME_MAX)]);
        bench.settle_down();
    }
    let counts = bench.counts;
    assert_eq!((counts.frames, counts.direct, counts.copied_bytes, bench.sent.0), (160, 160, 0, 160));
}

#[test]
fn test_a_long_frame_is_cut_into_descriptors_and_not_copied() {
    let mut bench = Bench::for_frames(LONG_FRAME_BYTES_MAX, BindMode::Copy, LONG_SLOT_BYTES);
    let longest = LONG_FRAME_BYTES_MAX;
    bench.post_all(&[
        Chain::of(&[Piece::Own(0, longest)]),
        Chain::of(&[Piece::Own(1, 4096), Piece::Own(2, 4096), Piece::Own(0, longest - 8192)]),
        Chain::of(&[Piece::Own(1, 54), Piece::Own(2, 8960)]),
    ]);
    bench.burst();
    let pieces = bench.kernel.pieces_to_read();
    let lens: Vec<_> = pieces.iter().map(|(_, len)| *len).collect();
    assert_eq!(lens, [4096, 4096, longest - 8192, 4096, 4096, longest - 8192, 54, 4096, 4096, 768]);
    bench.settle_down();
    assert_eq!((bench.counts.direct, bench.counts.copied_bytes, bench.sent.0), (3, 0, 3));
}

#[test]
fn test_a_long_frame_in_too_many_pieces_is_copied_once_into_several_slab_frames() {
    let mut bench = Bench::for_frames(LONG_FRAME_BYTES_MAX, BindMode::Copy, LONG_SLOT_BYTES);
    for _ in 0..200 {
        bench.post_all(&[Chain::of(&[Piece::Own(1, 480); 19])]);
        bench.burst();
        bench.take();
        assert_eq!(bench.driver.outstanding(), 0, "a copied frame's head is used at once");
        bench.settle_down();
    }
    assert_eq!(bench.counts.bounced[BounceReason::TooManyPieces as usize], 200);
    assert_eq!((bench.counts.copied_bytes, bench.sent), (200 * 19 * 480, (200, 200 * 19 * 480)));
}
