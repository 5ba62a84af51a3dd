use proptest::prelude::*;

use super::{BOUNCE, BounceReason, Counts, DROP, DropReason, OFFLOAD, Offload, Published, WORDS};
use crate::fixture::cases;

/// Each variant's name, by the enum's own order.
macro_rules! assert_names {
    ($name:ident { $($variant:ident: $text:literal),* $(,)? }) => {
        let variants = [$(($name::$variant, $text),)*];
        assert_eq!($name::NAMES.len(), variants.len());
        for (variant, text) in variants {
            assert_eq!($name::NAMES[variant as usize], text);
        }
    };
}

#[test]
fn test_names_are_in_step_with_the_variants() {
    assert_names!(BounceReason {
        ShortBuffer: "short_buffer",
        SplitBuffer: "split_buffer",
        NotContiguous: "not_contiguous",
        Unregistered: "unregistered",
        DriverUnproven: "driver_unproven",
        FewBuffers: "few_buffers",
        LongFrame: "long_frame",
        Merged: "merged",
        Shifted: "shifted",
        ShortFrame: "short_frame",
        TooManyPieces: "too_many_pieces",
        AddressAlias: "address_alias",
        PacketMode: "packet_mode",
    });
    assert_names!(DropReason {
        NoBuffer: "no_buffer",
        Oversize: "oversize",
        RingFull: "rx_ring_full",
        BufferTooSmall: "buffer_too_small",
        Disabled: "disabled",
        Runt: "runt",
        NoLink: "no_link",
        UnknownAnswer: "unknown_answer",
        BadChecksumRequest: "bad_checksum_request",
        BadSegmentRequest: "bad_segment_request",
        Spoofed: "spoofed",
    });
    assert_names!(Offload { Checksum: "checksum", Tso4: "tso4", Tso6: "tso6", Uso: "uso", Gro: "gro" });
}

#[test]
fn test_each_frame_is_counted_once() {
    let mut counts = Counts::default();
    counts.direct(60);
    counts.bounced(1514, BounceReason::SplitBuffer);
    counts.dropped(DropReason::Runt);
    assert_eq!((counts.frames, counts.bytes, counts.direct, counts.copied_bytes), (2, 1574, 1, 0));
    assert_eq!(counts.bounced.iter().sum::<u64>(), 1);
    counts.header_split(1514, 54);
    assert_eq!((counts.frames, counts.bytes, counts.direct, counts.header_split), (3, 3088, 2, 1));
    assert_eq!((counts.copied_bytes, counts.header_bytes), (54, 54));
    assert_eq!((counts.bounced[BounceReason::SplitBuffer as usize], counts.dropped[DropReason::Runt as usize]), (1, 1));
}

fn counts() -> impl Strategy<Value = Counts> {
    let small = || 0u64..1 << 60;
    let plain = prop::array::uniform6(small());
    let by_name = (
        prop::array::uniform::<_, BOUNCE>(small()),
        prop::array::uniform::<_, DROP>(small()),
        prop::array::uniform::<_, OFFLOAD>(small()),
    );
    (plain, by_name).prop_map(|(plain, (bounced, dropped, offloaded))| {
        let [frames, bytes, direct, header_split, copied_bytes, header_bytes] = plain;
        Counts { frames, bytes, direct, header_split, bounced, dropped, offloaded, copied_bytes, header_bytes }
    })
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn test_what_is_published_is_what_is_seen(first in counts(), second in counts()) {
        let published = Published::default();
        prop_assert_eq!(published.snapshot(), Counts::default());
        published.publish(&first);
        prop_assert_eq!(published.snapshot(), first);
        published.publish(&second);
        prop_assert_eq!(published.snapshot(), second);
    }

    #[test]
    fn test_sums_add_every_figure(first in counts(), second in counts()) {
        let mut sum = first;
        sum.add(&second);
        let words: Vec<_> = first.words().iter().zip(second.words()).map(|(a, b)| a + b).collect();
        prop_assert_eq!(&sum.words()[..], &words[..]);
        prop_assert_eq!(words.len(), WORDS);
    }
}
