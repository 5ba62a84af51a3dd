use proptest::prelude::*;

use super::super::Fit;
use super::super::assembly::Rest;
use super::bench::Bench;
use crate::fixture::cases;
use crate::guest_memory::{Segment, UmemAddr};
use crate::stats::{BounceReason, Counts};
use crate::xsk::DriverRules;

/// A chain of these lengths, somewhere in guest memory, `gap` bytes apart.
fn chain(bench: &mut Bench, lens: &[u32], gap: u64) {
    let mut at = bench.next_slot();
    bench.rx.chain.clear();
    for &len in lens {
        bench.rx.chain.push(Segment { addr: at, len });
        at = at.plus(u64::from(len) + gap);
    }
}

fn piece(frame_max: u32) -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(12u32),
        1u32..30,
        (frame_max - 2..frame_max + 14),
        (frame_max + 10..frame_max + 16),
        1u32..2 * frame_max
    ]
}

proptest! {
    #![proptest_config(cases(700))]

    #[test]
    fn test_direct_means_that_all_that_may_be_written_lies_in_one_piece_behind_the_header(
        lens in prop::collection::vec(piece(600), 1..4), gap in 0u64..3,
        write_max in 448u32..=600, align_bits in 0u32..7, before in prop::sample::select(vec![0u32, 12, 20]),
    ) {
        let mut bench = Bench::new(true, 600);
        bench.xsk.rules = DriverRules {
            rx_write_max: write_max,
            rx_write_align: 1 << align_bits,
            rx_write_before: before,
            ..DriverRules::copy_mode(600, 18)
        };
        chain(&mut bench, &lens, gap);
        let pieces = bench.rx.chain.clone();
        let holds = |start: u64, end: u64| {
            pieces.iter().any(|p| start >= p.addr.0 && end <= p.addr.0 + u64::from(p.len))
        };
        match bench.rx.fit(&bench.xsk) {
            Fit::Direct { first, frame } => {
                let header = first.addr;
                prop_assert_eq!(first, pieces[0]);
                let end = (frame.0 + u64::from(write_max)).next_multiple_of(1 << align_bits);
                prop_assert!(holds(frame.0, end), "a write past the end of its piece");
                prop_assert!(holds(frame.0 - u64::from(before), frame.0), "a write in front of its piece");
                prop_assert!(holds(header.0, header.0 + 12));
                let behind = frame.0 == header.0 + 12 || (pieces[0].len == 12 && frame == pieces[1].addr);
                prop_assert!(behind, "header and frame are neighbours in the chain");
            }
            Fit::Bounce(_) => prop_assert!(lens.iter().sum::<u32>() >= 12),
            Fit::Useless => prop_assert!(lens.iter().sum::<u32>() < 12),
        }
    }

    #[test]
    fn test_a_frame_is_copied_once_into_its_pieces_and_nowhere_else(
        lens in prop::collection::vec(1u32..600, 1..4), rooms in prop::collection::vec(0u32..300, 1..12), at_odd in 0u64..8,
    ) {
        let bench = Bench::new(true, 600);
        let memory = bench.rx.vring.queue.memory();
        let len: u32 = lens.iter().sum();
        let payload: Vec<u8> = (0..len).map(|i| i as u8 | 1).collect();
        let (mut source, mut sources, mut done) = (UmemAddr(4096 + at_odd), Vec::new(), 0);
        for &len in &lens {
            memory.write(source, &payload[done..done + len as usize]);
            sources.push(Segment { addr: source, len });
            (source, done) = (source.plus(u64::from(len) + at_odd), done + len as usize);
        }
        let header = [7u8; 12];
        let mut left = Rest::new(&header, sources.iter().copied());
        let mut counts = Counts::default();
        let start = bench.next_slot();
        let (mut at, mut got) = (start, Vec::new());
        for &room in &rooms {
            let copied = left.copy_into(memory, Segment { addr: at, len: room }, &mut counts);
            prop_assert_eq!(copied, room.min(12 + len - got.len() as u32));
            got.extend((0..u64::from(copied)).map(|i| memory.read::<1>(at.plus(i))[0]));
            at = at.plus(u64::from(room));
            prop_assert!(memory.is_zero(at, 64), "nothing behind the piece");
        }
        let whole: Vec<u8> = header.iter().chain(&payload).copied().collect();
        prop_assert_eq!(&got[..], &whole[..got.len()]);
        prop_assert_eq!(counts.copied_bytes, (got.len() as u64).saturating_sub(12));
        prop_assert_eq!(left.is_empty(), got.len() == whole.len());
    }
}

/// The reason why a buffer of these pieces bounces; `None` if it is direct.
fn reason(lens: &[u32]) -> Option<BounceReason> {
    let mut bench = Bench::new(true, 1524);
    chain(&mut bench, lens, 0);
    match bench.rx.fit(&bench.xsk) {
        Fit::Direct { .. } => None,
        Fit::Bounce(reason) => Some(reason),
        Fit::Useless => panic!("{lens:?} hold a header"),
    }
}

#[test]
fn test_each_shape_bounces_for_its_own_reason() {
    use BounceReason::{ShortBuffer, SplitBuffer};
    assert_eq!(reason(&[1536]), None);
    assert_eq!(reason(&[1536, 1]), None, "what follows does not matter");
    assert_eq!(reason(&[1535]), Some(ShortBuffer));
    assert_eq!(reason(&[12]), Some(ShortBuffer));
    assert_eq!(reason(&[1535, 4096]), Some(SplitBuffer));
    assert_eq!(reason(&[12, 1524]), None, "the header has a piece of its own");
    assert_eq!(reason(&[12, 1523]), Some(ShortBuffer));
    assert_eq!(reason(&[10, 4096]), Some(SplitBuffer), "the header itself is split");
}

#[test]
fn test_a_driver_without_proof_gets_no_guest_memory() {
    let mut bench = Bench::new(true, 600);
    chain(&mut bench, &[2000], 0);
    bench.xsk.rules.direct = false;
    assert!(matches!(bench.rx.fit(&bench.xsk), Fit::Bounce(BounceReason::DriverUnproven)));
    bench.xsk.rules = DriverRules { rx_write_before: 13, ..DriverRules::copy_mode(600, 18) };
    assert!(matches!(bench.rx.fit(&bench.xsk), Fit::Bounce(BounceReason::DriverUnproven)));
}
