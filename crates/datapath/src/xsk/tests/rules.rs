use mpassthru_testing::memory::{Backing, GuestPhysAddr, RegionConfig};
use proptest::prelude::*;

use super::super::{CHUNK_BYTES, Contiguity, DriverRules, FRAME_BYTES_MAX};
use crate::fixture::{Guest, cases};
use crate::guest_memory::{PAGE_BYTES, UmemAddr};

const HUGE_PAGE_BYTES: u64 = 2 << 20;

fn rules(contiguity: Contiguity) -> DriverRules {
    DriverRules { contiguity, ..DriverRules::copy_mode(1536, 18) }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_a_padded_write_stays_inside_or_is_refused(
        frame in 0u64..10_000, room in 0u32..4096, rx_write_max in 1u32..2048, align_bits in 0u32..8,
    ) {
        let rx_write_align = 1 << align_bits;
        let rules = DriverRules { rx_write_max, rx_write_align, ..DriverRules::copy_mode(1536, 18) };
        let last = (frame..).skip(rx_write_max as usize).find(|end| end % u64::from(rx_write_align) == 0).unwrap();
        prop_assert_eq!(rules.write_stays_inside(UmemAddr(frame), room), last <= frame + u64::from(room));
    }

    #[test]
    fn test_a_range_in_base_pages_is_contiguous_only_inside_one(offset in 0u64..8192, len in 1u64..5000) {
        let guest = Guest::of_pages(4);
        let start = UmemAddr(guest.umem(0).0 + offset);
        let one_page = offset / PAGE_BYTES == (offset + len - 1) / PAGE_BYTES;
        for contiguity in [Contiguity::WithinBackingPage, Contiguity::WithinBasePage] {
            prop_assert_eq!(rules(contiguity).is_contiguous(&guest.memory, start, len, start, 0), one_page);
        }
        prop_assert!(rules(Contiguity::NotNeeded).is_contiguous(&guest.memory, start, len, start, 0));
    }
}

#[test]
fn test_a_range_in_a_huge_page_is_contiguous_unless_it_begins_before_it() {
    let huge = RegionConfig { backing: Backing::HugeMemfd, ..RegionConfig::memfd(0x4000_0000, 2 * HUGE_PAGE_BYTES) };
    let base = RegionConfig::memfd(0, 2 * PAGE_BYTES);
    if mpassthru_testing::memory::GuestMemory::new(&[huge]).is_err() {
        eprintln!("skipped: 2 free huge pages are needed (sysctl vm.nr_hugepages=16)");
        return;
    }
    let guest = Guest::new(&[base, huge]);
    let rules = rules(Contiguity::WithinBackingPage);
    for hint in [0, 1, usize::MAX] {
        let chunk = |frame: u64, before: u64| {
            let inside = guest.umem(GuestPhysAddr(0x4000_0000).plus(frame).0);
            rules.is_contiguous(&guest.memory, UmemAddr(inside.0 - before), CHUNK_BYTES, inside, hint)
        };
        assert!(chunk(2560, 2560), "the first chunk that fits");
        assert!(!chunk(2559, 2560), "one byte in front of the region");
        assert!(chunk(HUGE_PAGE_BYTES - CHUNK_BYTES, 0), "the last of a page");
        assert!(!chunk(HUGE_PAGE_BYTES - CHUNK_BYTES + 1, 0), "across two huge pages");
        assert!(chunk(HUGE_PAGE_BYTES, 0), "the first of the next");
        let small = guest.umem(PAGE_BYTES);
        assert!(!rules.is_contiguous(&guest.memory, UmemAddr(small.0 - 1), 2, small, hint), "base pages next to it");
    }
}

#[test]
fn test_rules_never_exceed_a_chunk_of_the_slab() {
    let wild = DriverRules {
        tx_frame_max: u32::MAX,
        tx_frame_min: 9000,
        rx_write_align: 0,
        ..DriverRules::copy_mode(1536, 18)
    };
    let held = wild.within_a_chunk();
    assert_eq!((held.tx_frame_max, held.tx_frame_min, held.rx_write_align), (FRAME_BYTES_MAX, FRAME_BYTES_MAX, 1));
    let tame = rules(Contiguity::WithinBasePage);
    assert_eq!(tame.within_a_chunk(), tame);
}
