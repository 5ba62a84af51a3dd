use proptest::prelude::*;

use super::super::checksum::Sum;
use crate::fixture::{Guest, cases};
use crate::guest_memory::Segment;

/// RFC 1071, word by word.
pub fn reference(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!sum as u16).to_be_bytes()
}

/// Bytes that carry often: mostly ones.
fn bytes() -> impl Strategy<Value = u8> {
    prop_oneof![2 => Just(0xffu8), 1 => Just(0u8), 2 => any::<u8>()]
}

#[test]
fn test_the_sum_of_pieces_is_that_of_their_bytes_wherever_they_lie() {
    let guest = Guest::of_pages(2);
    let piece = (0u64..9, prop::collection::vec(bytes(), 0..300), any::<bool>());
    proptest!(cases(512), |(pieces in prop::collection::vec(piece, 0..6))| {
        let (mut at, mut sum, mut all) = (guest.umem(0), Sum::default(), Vec::new());
        for (gap, piece, ours) in pieces {
            at = at.plus(gap);
            if ours {
                sum.add_bytes(&piece);
            } else {
                guest.memory.write(at, &piece);
                sum.add_memory(&guest.memory, Segment { addr: at, len: piece.len() as u32 });
            }
            at = at.plus(piece.len() as u64);
            all.extend(piece);
        }
        prop_assert_eq!(sum.checksum(), reference(&all));
    });
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn test_what_is_removed_was_never_added(
        bytes in prop::collection::vec(bytes(), 1..100), number: [u8; 4], other: [u8; 4],
    ) {
        let mut sum = Sum::default();
        let mut expected = sum;
        for number in [number, other] {
            sum.add_bytes(&number);
        }
        sum.remove_bytes(&number);
        expected.add_bytes(&other);
        for sum in [&mut sum, &mut expected] {
            sum.add_bytes(&bytes);
        }
        let not_all_zero = other != [0; 4] || bytes.iter().any(|&byte| byte != 0);
        prop_assert!(!not_all_zero || sum.checksum() == expected.checksum());
    }

    #[test]
    fn test_with_its_checksum_a_frame_adds_up_to_ones(bytes in prop::collection::vec(bytes(), 0..200)) {
        let mut sum = Sum::default();
        sum.add_bytes(&bytes);
        let mut whole = bytes.clone();
        // The field lies at an even place.
        whole.resize(bytes.len().next_multiple_of(2), 0);
        whole.extend(sum.checksum());
        prop_assert_eq!(reference(&whole), [0, 0]);
    }
}

#[test]
fn test_zero_is_written_as_the_other_zero_where_it_means_none() {
    let mut sum = Sum::default();
    sum.add_bytes(&[0xff, 0xff]);
    assert_eq!((sum.checksum(), sum.checksum_not_zero()), ([0, 0], [0xff, 0xff]));
    sum.add_bytes(&[0, 1]);
    assert_eq!((sum.checksum(), sum.checksum_not_zero()), ([0xff, 0xfe], [0xff, 0xfe]));
}
