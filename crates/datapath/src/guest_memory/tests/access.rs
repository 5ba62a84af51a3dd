use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::{GuestMemory, PAGE_BYTES, UmemAddr};
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
        prop_assert_eq!(&memory.read::<16>(start.plus(offset))[..], &content[at..at + 16]);
    }
}

#[test]
fn test_ring_fields_are_little_endian() {
    let (memory, start) = one_page();
    memory.store_u16(start, 0x1234, Ordering::Relaxed);
    memory.store_used_element(start.plus(4), 0x0102_0304, 0x0506_0708);
    assert_eq!(memory.read::<12>(start), [0x34, 0x12, 0, 0, 4, 3, 2, 1, 8, 7, 6, 5]);
    assert_eq!(memory.load_u16(start, Ordering::Relaxed), 0x1234);
}

#[test]
fn test_access_past_the_umem_is_a_bug_that_is_caught() {
    let (memory, _) = one_page();
    let last = UmemAddr(memory.len_bytes() - 1);
    let panics = |access: &dyn Fn()| catch_unwind(AssertUnwindSafe(access)).is_err();
    assert!(!panics(&|| memory.write(last, &[1])));
    assert!(panics(&|| memory.write(last, &[1, 2])));
    assert!(panics(&|| memory.copy(last, UmemAddr(0), 2)));
    assert!(panics(&|| memory.copy(UmemAddr(0), last, 2)));
    assert!(panics(&|| memory.zero(UmemAddr(u64::MAX), 1)));
    assert!(panics(&|| _ = memory.read::<2>(last)));
    assert!(panics(&|| _ = memory.is_zero(UmemAddr(u64::MAX - 1), 2)));
}
