//! Memory with regions added behind those that it had.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use mpassthru_testing::memory::{self as vmm, Backing, RegionConfig};

use super::super::{GuestMemory, PAGE_BYTES, RegionSpec, TAIL_SLAB_BYTES};
use super::arena::{accessible_bytes, assert_shared, free_huge_pages, maps};
use super::region;
use crate::fixture::{memfd, specs};

const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Two pages of `file` at guest address 0, and a slab of one page.
fn two_pages(file: &std::os::fd::OwnedFd) -> GuestMemory {
    GuestMemory::map(&[region(file, 0, 2 * PAGE_BYTES, 0)], PAGE_BYTES).unwrap()
}

#[test]
fn test_where_addresses_are_scarce_memory_is_mapped_with_less_room_to_grow() {
    let file = memfd("scarce", 8 * PAGE_BYTES);
    // More than a process has; the half of it is there.
    assert!(GuestMemory::map_with_room(&[region(&file, 0, PAGE_BYTES, 0)], PAGE_BYTES, 1 << 47).is_ok());
    // A slab, the region, the tail slab, a page for the alignment: nothing else.
    let tight = GuestMemory::map_with_room(&[region(&file, 0, PAGE_BYTES, 0)], PAGE_BYTES, 0).unwrap();
    let more = |pages| [region(&file, 1 << 30, pages * PAGE_BYTES, 0)];
    assert!(tight.with_regions(&more(2)).unwrap().is_none(), "it has to be mapped anew");
    assert_eq!(accessible_bytes(&tight), tight.len_bytes());
}

#[test]
fn test_addresses_of_before_mean_the_same_in_memory_with_more_regions() {
    let guest = vmm::GuestMemory::new(&[
        RegionConfig::memfd(0x10_0000, 2 * PAGE_BYTES),
        RegionConfig::memfd(0, PAGE_BYTES),
        RegionConfig::memfd(1 << 40, 3 * PAGE_BYTES),
    ])
    .unwrap();
    let specs = specs(&guest);
    let memory = Arc::new(GuestMemory::map(&specs[..1], PAGE_BYTES).unwrap());
    let more = Arc::new(memory.with_regions(&specs[1..]).unwrap().unwrap());
    for old in memory.regions() {
        assert!(more.regions().iter().any(|new| (new.guest_phys, new.umem) == (old.guest_phys, old.umem)));
    }
    assert!(more.regions().is_sorted_by_key(|region| region.guest_phys));
    assert_eq!((memory.end(), more.end()), (super::super::UmemAddr(3 * PAGE_BYTES), memory.end().plus(4 * PAGE_BYTES)));
    assert_eq!(more.len_bytes(), 7 * PAGE_BYTES + TAIL_SLAB_BYTES);
    assert_eq!(accessible_bytes(&more), more.len_bytes(), "the kernel takes no UMEM with holes");
    assert_shared(&guest, &more);

    assert!(more.is_shared() && memory.is_shared(), "they are on one arena");
    drop(memory);
    assert!(!more.is_shared());
    assert_shared(&guest, &more);
}

#[test]
fn test_memory_is_unmapped_with_the_last_one_that_uses_it() {
    let (first, second) = (memfd("grow-first", 2 * PAGE_BYTES), memfd("grow-second", PAGE_BYTES));
    let memory = two_pages(&first);
    let more = memory.with_regions(&[region(&second, 1 << 30, PAGE_BYTES, 0)]).unwrap().unwrap();
    drop(more);
    assert!(maps().contains("memfd:grow-first"));
    drop(memory);
    assert!(!maps().contains("memfd:grow-first") && !maps().contains("memfd:grow-second"));
}

#[test]
fn test_a_region_that_cannot_be_added_leaves_memory_as_it_was() {
    let (file, good) = (memfd("grow-kept", 2 * PAGE_BYTES), memfd("grow-refused", PAGE_BYTES));
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", good.as_raw_fd())).unwrap();
    // SAFETY: the path is NUL-terminated and lives through the call.
    let read_only = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    assert!(read_only >= 0);
    let memory = two_pages(&file);
    let unmappable = RegionSpec { fd: read_only, ..region(&good, 2 << 30, PAGE_BYTES, 0) };
    let error = memory.with_regions(&[region(&good, 1 << 30, PAGE_BYTES, 0), unmappable]).expect_err("read-only");
    assert!(error.to_string().contains("read-only"), "{error}");
    assert!(!maps().contains("memfd:grow-refused"));
    assert_eq!(accessible_bytes(&memory), memory.len_bytes());

    let overlapping = memory.with_regions(&[region(&good, PAGE_BYTES, PAGE_BYTES, 0)]).expect_err("overlap");
    assert!(overlapping.to_string().contains("overlap"), "{overlapping}");
    assert!(memory.with_regions(&[region(&good, 1 << 30, PAGE_BYTES, 0)]).unwrap().is_some(), "it can still grow");
    // SAFETY: a descriptor of this test.
    unsafe { libc::close(read_only) };
}

#[test]
fn test_more_than_the_kernel_takes_has_to_be_mapped_anew_and_is_refused_there() {
    let (file, large) = (memfd("grow-small", 2 * PAGE_BYTES), memfd("grow-large", 64 << 30));
    assert!(two_pages(&file).with_regions(&[region(&large, 1 << 30, 64 << 30, 0)]).unwrap().is_none());
    assert!(!maps().contains("memfd:grow-large"));
}

#[test]
fn test_huge_pages_behind_small_ones_have_to_be_mapped_anew() {
    if free_huge_pages() < 2 {
        eprintln!("skipped: 2 free huge pages are needed (sysctl vm.nr_hugepages=16)");
        return;
    }
    let huge = |at| RegionConfig { backing: Backing::HugeMemfd, ..RegionConfig::memfd(at, HUGE_PAGE_BYTES) };
    let guest = vmm::GuestMemory::new(&[RegionConfig::memfd(0, PAGE_BYTES), huge(1 << 30), huge(2 << 30)]).unwrap();
    let specs = specs(&guest);
    let small = GuestMemory::map(&specs[..1], PAGE_BYTES).unwrap();
    assert!(small.with_regions(&specs[1..2]).unwrap().is_none());
    let huge = GuestMemory::map(&specs[1..2], PAGE_BYTES).unwrap();
    let more = huge.with_regions(&[specs[0], specs[2]]).unwrap().expect("huge pages follow huge pages");
    assert_eq!(accessible_bytes(&more), more.len_bytes());
    assert_shared(&guest, &more);
}
