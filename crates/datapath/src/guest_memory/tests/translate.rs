use proptest::prelude::*;

use super::super::{GuestMemory, GuestPhysAddr, PAGE_BYTES, Region, Segment, UmemAddr, UserAddr};
use super::region;
use crate::fixture::{cases, memfd};

/// Translation by its definition: look at every region, in arithmetic that cannot overflow.
fn naive(regions: &[Region], addr: u64, len: u32) -> Option<Segment> {
    regions.iter().find_map(|region| {
        let (start, end) = (u128::from(region.guest_phys.0), end_of(region));
        let inside = (start..end).contains(&u128::from(addr));
        inside.then(|| Segment {
            addr: UmemAddr(region.umem.0 + (addr - region.guest_phys.0)),
            len: u128::from(len).min(end - u128::from(addr)) as u32,
        })
    })
}

fn end_of(region: &Region) -> u128 {
    u128::from(region.guest_phys.0) + u128::from(region.size_bytes)
}

/// Regions by their distances and sizes in pages; distance 0 makes neighbours. `top` puts the last one at the end of
/// the address space.
fn arena(pages: &[(u64, u64)], top: bool) -> GuestMemory {
    let total: u64 = pages.iter().map(|(gap, size)| gap + size).sum();
    let file = memfd("translate", total * PAGE_BYTES);
    let mut at = if top { 0u64.wrapping_sub((total + 1) * PAGE_BYTES) } else { 0 };
    let mut offset = 0;
    let mut specs = Vec::new();
    for (gap, size) in pages {
        at += gap * PAGE_BYTES;
        specs.push(region(&file, at, size * PAGE_BYTES, offset));
        offset += size * PAGE_BYTES;
        at += size * PAGE_BYTES;
    }
    GuestMemory::map(&specs, PAGE_BYTES).unwrap()
}

/// An address near an edge of a region: which region, which edge, how far.
type Near = (prop::sample::Index, bool, i64);

fn near(regions: &[Region], (which, at_end, distance): &Near) -> u64 {
    let region = which.get(regions);
    let edge = if *at_end { end_of(region) as u64 } else { region.guest_phys.0 };
    edge.wrapping_add_signed(*distance)
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_translation_is_that_of_the_naive_model_whatever_the_hint(
        pages in prop::collection::vec((0u64..3, 1u64..4), 1..6),
        top: bool,
        mut hint: usize,
        queries in prop::collection::vec(
            ((any::<prop::sample::Index>(), any::<bool>(), -5000i64..5000), prop_oneof![0u32..9000, any::<u32>()]),
            1..40,
        ),
    ) {
        let memory = arena(&pages, top);
        for (place, len) in queries {
            let addr = near(memory.regions(), &place);
            let expected = naive(memory.regions(), addr, len);
            prop_assert_eq!(memory.translate(GuestPhysAddr(addr), len, &mut hint), expected);
        }
    }

    #[test]
    fn test_front_end_ranges_are_found_only_if_one_region_holds_them(
        pages in prop::collection::vec((0u64..3, 1u64..4), 1..6),
        top: bool,
        place: Near,
        len_bytes in prop_oneof![0u64..9000, any::<u64>()],
    ) {
        let memory = arena(&pages, top);
        let guest = near(memory.regions(), &place);
        let user = UserAddr(guest.wrapping_add(1 << 40));
        let expected = memory.regions().iter().find_map(|region| {
            let start = u128::from(region.user.0);
            let (from, to) = (u128::from(user.0), u128::from(user.0) + u128::from(len_bytes));
            let inside = from >= start && to <= start + u128::from(region.size_bytes);
            inside.then(|| UmemAddr(region.umem.0 + (from - start) as u64))
        });
        prop_assert_eq!(memory.translate_user(user, len_bytes), expected);
    }
}

#[test]
fn test_a_range_is_cut_at_the_end_of_its_region_even_if_the_next_is_adjacent() {
    let memory = arena(&[(0, 1), (0, 1)], false);
    let mut hint = 0;
    let first = memory.translate(GuestPhysAddr(PAGE_BYTES - 3), 10, &mut hint).unwrap();
    assert_eq!((first.len, hint), (3, 0));
    let second = memory.translate(GuestPhysAddr(PAGE_BYTES), 7, &mut hint).unwrap();
    assert_eq!((second.len, hint), (7, 1));
}

#[test]
fn test_an_address_outside_memory_leaves_the_hint_alone() {
    let memory = arena(&[(0, 1), (1, 1)], false);
    let mut hint = 1;
    assert_eq!(memory.translate(GuestPhysAddr(PAGE_BYTES), 1, &mut hint), None);
    assert_eq!(memory.translate(GuestPhysAddr(u64::MAX), u32::MAX, &mut hint), None);
    assert_eq!(hint, 1);
}
