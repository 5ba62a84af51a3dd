use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::{Entries, GuestMemory, PAGE_BYTES, TAIL_SLAB_BYTES, UmemAddr};
use super::region;
use crate::fixture::{cases, memfd};

fn one_page() -> (GuestMemory, UmemAddr) {
    let file = memfd("access", PAGE_BYTES);
    let memory = GuestMemory::map(&[region(&file, 0, PAGE_BYTES, 0)], PAGE_BYTES).unwrap();
    let start = memory.regions()[0].umem;
    (memory, start)
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn test_copy_write_and_zero_change_their_range_and_nothing_else(
        content in prop::collection::vec(any::<u8>(), 256),
        from in 0usize..256, to in 0usize..256, len in 0usize..256, zeroed in 0usize..256,
    ) {
        let (memory, start) = one_page();
        memory.write(start, &content);
        let len = len.min(256 - from.max(to));
        let mut expected = content;
        expected.copy_within(from..from + len, to);
        expected[zeroed..].fill(0);
        memory.copy(start.plus(from as u64), start.plus(to as u64), len as u32);
        memory.zero(start.plus(zeroed as u64), 256 - zeroed as u32);
        prop_assert_eq!(&memory.read::<256>(start)[..], &expected[..]);
        prop_assert!(memory.is_zero(start.plus(256), PAGE_BYTES - 256));
        prop_assert_eq!(memory.is_zero(start, 256), expected.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn test_reads_are_the_same_at_any_alignment(content: [u8; 40], offset in 0u64..24) {
        let (memory, start) = one_page();
        memory.write(start, &content);
        let at = offset as usize;
        let words = memory.read_words(start.plus(offset)).map(u64::to_ne_bytes);
        prop_assert_eq!(words.as_flattened(), &content[at..at + 16]);
    }
}

#[test]
fn test_ring_fields_are_little_endian() {
    let (memory, start) = one_page();
    memory.store_u16(start, 0x1234, Ordering::Relaxed);
    assert_eq!(memory.read::<4>(start), [0x34, 0x12, 0, 0]);
    assert_eq!(memory.load_u16(start, Ordering::Relaxed), 0x1234);
}

#[test]
fn test_entries_are_where_they_were_found_and_their_index_wraps() {
    let (memory, start) = one_page();
    let entries = Entries::<[u32; 2]>::new(&memory, start.plus(4), 4);
    entries.write(6, [0x0102_0304u32.to_le(), 0x0506_0708u32.to_le()]);
    assert_eq!(memory.read::<8>(start.plus(4 + 2 * 8)), [4, 3, 2, 1, 8, 7, 6, 5]);
    assert_eq!(entries.read(u16::MAX - 1), entries.read(2));
    drop(memory);
    assert_eq!(entries.read(2)[0].to_le(), 0x0102_0304, "they keep their memory");
}

#[test]
fn test_entries_outside_the_umem_or_misaligned_are_a_bug_that_is_caught() {
    let (memory, start) = one_page();
    let panics = |at, count| catch_unwind(AssertUnwindSafe(|| Entries::<u64>::new(&memory, at, count))).is_err();
    let end = memory.len_bytes();
    assert!(!panics(UmemAddr(end - 32), 4));
    assert!(panics(UmemAddr(end - 24), 4) && panics(UmemAddr(u64::MAX - 7), 4));
    assert!(panics(start.plus(4), 4) && panics(start, 3) && panics(start, 0));
}

#[test]
fn test_access_past_the_umem_is_a_bug_that_is_caught() {
    let (memory, _) = one_page();
    let last = memory.end();
    let panics = |access: &dyn Fn()| catch_unwind(AssertUnwindSafe(access)).is_err();
    let tail = TAIL_SLAB_BYTES as u32;
    assert!(!panics(&|| memory.zero(last, tail)));
    assert!(panics(&|| memory.zero(last, tail + 1)));
    // Short accesses are caught by their start.
    let past = last.plus(1);
    assert!(panics(&|| memory.write(past, &[1, 2])));
    assert!(panics(&|| memory.copy(past, UmemAddr(0), 2)));
    assert!(panics(&|| memory.copy(UmemAddr(0), past, 2)));
    assert!(panics(&|| memory.zero(UmemAddr(u64::MAX), 1)));
    assert!(panics(&|| memory.copy(UmemAddr(u64::MAX), UmemAddr(0), tail + 1)));
    assert!(panics(&|| _ = memory.read_words(past)));
    assert!(panics(&|| _ = memory.is_zero(UmemAddr(u64::MAX - 1), 2)));
}
