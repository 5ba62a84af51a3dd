use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use mpassthru_testing::memory::{self as vmm, Backing, RegionConfig};

use super::super::{GuestMemory, PAGE_BYTES, RegionSpec, TAIL_SLAB_BYTES};
use super::region;
use crate::error::Error;
use crate::fixture::{memfd, specs};

const GIB: u64 = 1 << 30;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

pub(super) fn maps() -> String {
    std::fs::read_to_string("/proc/self/maps").unwrap()
}

/// The mappings of this process: start, end, permissions.
fn mappings() -> Vec<(u64, u64, String)> {
    let parse = |line: &str| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let number = |hex| u64::from_str_radix(hex, 16).unwrap();
        (number(start), number(end), rest[..4].to_owned())
    };
    maps().lines().map(parse).collect()
}

/// Bytes of `memory`'s range that are mapped for reading and writing.
pub(super) fn accessible_bytes(memory: &GuestMemory) -> u64 {
    let start = memory.base().as_ptr() as u64;
    let end = start + memory.len_bytes();
    let usable = |access: &str| access.starts_with("rw");
    let inside = |(from, to): (u64, u64)| to.min(end).saturating_sub(from.max(start));
    mappings().into_iter().filter(|(.., access)| usable(access)).map(|(from, to, _)| inside((from, to))).sum()
}

/// Asserts that slabs and regions lie back to back without a hole, biggest pages first, each aligned to its pages.
fn assert_packed(memory: &GuestMemory) {
    let mut regions = memory.regions().to_vec();
    regions.sort_by_key(|region| region.umem);
    let base = memory.base().as_ptr() as u64;
    let mut at = base + memory.slab_bytes();
    for region in &regions {
        let start = base + region.umem.0;
        assert_eq!(start & !(region.page_bytes - 1), at, "{region:?} follows the one before");
        at = (start + region.size_bytes).next_multiple_of(region.page_bytes);
    }
    assert!(regions.is_sorted_by_key(|region| std::cmp::Reverse(region.page_bytes)));
    assert_eq!(memory.len_bytes(), at + TAIL_SLAB_BYTES - base);
    assert_eq!(accessible_bytes(memory), memory.len_bytes(), "the kernel takes no UMEM with holes");
}

/// Asserts that what the driver writes at the edges of each region is what the data path reads there.
pub(super) fn assert_shared(guest: &vmm::GuestMemory, memory: &GuestMemory) {
    for (number, region) in guest.regions().iter().enumerate() {
        let last = region.config().size_bytes - 8;
        for offset in [0, 8, (last / 2) & !7, last] {
            let mark = ((number as u64) << 32) | offset;
            let address = region.config().guest_phys_address.plus(offset);
            guest.write(address, &mark.to_le_bytes()).unwrap();
            let segment = memory.translate(super::GuestPhysAddr(address.0), 8, &mut 0).unwrap();
            assert_eq!((segment.len, memory.read::<8>(segment.addr)), (8, mark.to_le_bytes()));
        }
    }
}

pub(super) fn free_huge_pages() -> u64 {
    let text = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn huge(guest_phys: u64, pages: u64) -> RegionConfig {
    RegionConfig { backing: Backing::HugeMemfd, ..RegionConfig::memfd(guest_phys, pages * HUGE_PAGE_BYTES) }
}

fn refused(specs: &[RegionSpec]) -> String {
    GuestMemory::map(specs, PAGE_BYTES).expect_err("a broken table is refused").to_string()
}

#[test]
fn test_regions_lie_back_to_back_and_show_the_guests_bytes() {
    let guest = vmm::GuestMemory::new(&[
        RegionConfig::memfd(0x10_0000, 3 * PAGE_BYTES),
        RegionConfig::memfd(0, PAGE_BYTES),
        RegionConfig { mmap_offset_bytes: 5 * PAGE_BYTES, ..RegionConfig::memfd(4 * GIB, 2 * PAGE_BYTES) },
    ])
    .unwrap();
    let memory = GuestMemory::map(&specs(&guest), 4 * PAGE_BYTES).unwrap();
    assert_packed(&memory);
    assert_shared(&guest, &memory);
    assert!(memory.regions().is_sorted_by_key(|region| region.guest_phys));
}

#[test]
fn test_slabs_belong_to_no_region_and_are_zero() {
    let file = memfd("slabs", PAGE_BYTES);
    let memory = GuestMemory::map(&[region(&file, 0, PAGE_BYTES, 0)], 2 * PAGE_BYTES).unwrap();
    assert_eq!(memory.regions()[0].umem.0, memory.slab_bytes());
    assert_eq!(memory.len_bytes(), (2 + 1) * PAGE_BYTES + TAIL_SLAB_BYTES);
    assert!(memory.is_zero(super::super::UmemAddr(0), memory.len_bytes()));
}

#[test]
fn test_no_region_at_all_leaves_the_slabs() {
    let memory = GuestMemory::map(&[], 2 * PAGE_BYTES).unwrap();
    assert_packed(&memory);
    assert_eq!(memory.translate(super::GuestPhysAddr(0), 1, &mut 0), None);
}

#[test]
fn test_file_offsets_inside_a_page_are_honoured() {
    let file = memfd("odd-offset", 4 * PAGE_BYTES);
    let content: Vec<u8> = (0..4 * PAGE_BYTES).map(|i| (i % 251) as u8).collect();
    // SAFETY: `content` is valid for reads of its length.
    let written = unsafe { libc::pwrite(file.as_raw_fd(), content.as_ptr().cast(), content.len(), 0) };
    assert_eq!(written as usize, content.len());
    let odd = [region(&file, 0x1000, 5000, 100), region(&file, 0x8000, 4096, 3 * PAGE_BYTES - 1)];
    let memory = GuestMemory::map(&odd, PAGE_BYTES).unwrap();
    assert_packed(&memory);
    for (guest, len, offset) in [(0x1000u64, 5000u64, 100), (0x8000, 4096, 3 * PAGE_BYTES - 1)] {
        for at in [0, len / 2, len - 1] {
            let segment = memory.translate(super::GuestPhysAddr(guest + at), u32::MAX, &mut 0).unwrap();
            assert_eq!(u64::from(segment.len), len - at, "a region ends at its size, not at its page");
            assert_eq!(memory.read::<1>(segment.addr)[0], content[(offset + at) as usize]);
        }
    }
}

#[test]
fn test_huge_pages_come_first_and_are_aligned() {
    if free_huge_pages() < 4 {
        eprintln!("skipped: 4 free huge pages are needed (sysctl vm.nr_hugepages=16)");
        return;
    }
    let guest = vmm::GuestMemory::new(&[
        RegionConfig::memfd(0, 3 * PAGE_BYTES),
        huge(GIB, 1),
        RegionConfig::memfd(0x10_0000, PAGE_BYTES),
        RegionConfig { mmap_offset_bytes: HUGE_PAGE_BYTES, ..huge(2 * GIB, 1) },
    ])
    .unwrap();
    for slab_bytes in [0, PAGE_BYTES, 513 * PAGE_BYTES] {
        let memory = GuestMemory::map(&specs(&guest), slab_bytes).unwrap();
        assert_packed(&memory);
        assert_shared(&guest, &memory);
    }
}

#[test]
fn test_a_part_of_a_huge_page_is_a_region_too() {
    if free_huge_pages() < 2 {
        eprintln!("skipped: 2 free huge pages are needed (sysctl vm.nr_hugepages=16)");
        return;
    }
    let guest = vmm::GuestMemory::new(&[huge(0, 2)]).unwrap();
    let whole = specs(&guest)[0];
    let part = RegionSpec { mmap_offset: HUGE_PAGE_BYTES + 4096, size_bytes: 8192, ..whole };
    let memory = GuestMemory::map(&[part], PAGE_BYTES).unwrap();
    assert_packed(&memory);
    guest.write(vmm::GuestPhysAddr(HUGE_PAGE_BYTES + 4096 + 8191), &[77]).unwrap();
    let segment = memory.translate(super::GuestPhysAddr(8191), 1, &mut 0).unwrap();
    assert_eq!(memory.read::<1>(segment.addr), [77]);
}

#[test]
fn test_a_region_past_the_end_of_its_file_is_refused() {
    let file = memfd("short-file", 4 * PAGE_BYTES);
    for (size_bytes, offset) in
        [(5 * PAGE_BYTES, 0), (PAGE_BYTES, 4 * PAGE_BYTES), (4 * PAGE_BYTES, 1), (u64::MAX - 8191, 8192), (0, 0)]
    {
        let message = refused(&[region(&file, 0, size_bytes, offset)]);
        assert!(message.contains("EINVAL") && message.contains("past the end of the file"), "{message}");
    }
    assert!(!maps().contains("memfd:short-file"));
}

#[test]
fn test_overlapping_regions_are_refused_and_neighbours_are_not() {
    let file = memfd("overlap", 8 * PAGE_BYTES);
    for second in [PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES - 1, 0] {
        let message = refused(&[region(&file, second, PAGE_BYTES, 0), region(&file, 0, 2 * PAGE_BYTES, 0)]);
        assert!(message.contains("overlap"), "{message}");
    }
    let neighbours = [region(&file, 2 * PAGE_BYTES, PAGE_BYTES, 0), region(&file, 0, 2 * PAGE_BYTES, 0)];
    assert!(GuestMemory::map(&neighbours, PAGE_BYTES).is_ok());
    assert!(!maps().contains("memfd:overlap"));
}

#[test]
fn test_a_region_past_the_end_of_the_address_space_is_refused() {
    let file = memfd("wraps", 8 * PAGE_BYTES);
    let message = refused(&[region(&file, u64::MAX - PAGE_BYTES + 1, 2 * PAGE_BYTES, 0)]);
    assert!(message.contains("0xfffffffffffff000"), "{message}");
    assert!(GuestMemory::map(&[region(&file, u64::MAX - 2 * PAGE_BYTES, 2 * PAGE_BYTES, 0)], PAGE_BYTES).is_ok());
}

#[test]
fn test_more_than_64_gib_is_refused_with_the_numbers_and_nothing_is_mapped() {
    let file = memfd("too-large", 64 * GIB);
    let halves = [region(&file, 0, 32 * GIB, 0), region(&file, 64 * GIB, 32 * GIB, 32 * GIB)];
    let error = GuestMemory::map(&halves, PAGE_BYTES).expect_err("more chunks than the kernel takes");
    assert!(matches!(&error, Error::Refused(text) if text.contains("64.0 GiB")), "{error}");
    assert!(!maps().contains("memfd:too-large"));
    // One chunk less than the limit, both slabs included, is taken.
    let most = 16_777_215 * PAGE_BYTES - TAIL_SLAB_BYTES - PAGE_BYTES;
    assert_eq!(
        GuestMemory::map(&[region(&file, 0, most, 0)], PAGE_BYTES).unwrap().len_bytes(),
        16_777_215 * PAGE_BYTES
    );
    assert!(GuestMemory::map(&[region(&file, 0, most + PAGE_BYTES, 0)], PAGE_BYTES).is_err());
    assert!(!maps().contains("memfd:too-large"));
}

#[test]
fn test_a_failure_half_way_leaves_nothing_mapped() {
    let file = memfd("half-way", 40 * GIB);
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    // SAFETY: the path is NUL-terminated and lives through the call.
    let read_only = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    assert!(read_only >= 0);
    // SAFETY: a new descriptor that nothing else owns.
    let read_only = unsafe { OwnedFd::from_raw_fd(read_only) };
    let message = refused(&[region(&file, 0, 40 * GIB, 0), region(&read_only, 64 * GIB, PAGE_BYTES, 0)]);
    assert!(message.contains("EACCES") && message.contains("read-only"), "{message}");
    assert!(!maps().contains("memfd:half-way"));
    // Each reserves almost 64 GiB of addresses, of which a process has 128 TiB.
    for _ in 0..2500 {
        assert!(refused(&[region(&read_only, 0, PAGE_BYTES, 0)]).contains("read-only"));
    }
}

#[test]
fn test_what_is_no_file_is_refused() {
    let event = crate::fd::EventFd::new().unwrap();
    let file = memfd("closed", PAGE_BYTES);
    let good = region(&file, 0, PAGE_BYTES, 0);
    let message = refused(&[RegionSpec { fd: event.raw(), ..good }]);
    assert!(message.contains("0x0 (4096 bytes)"), "{message}");
    let message = refused(&[RegionSpec { fd: -1, ..good }]);
    assert!(message.contains("EBADF") && message.contains("no file"), "{message}");
}

#[test]
fn test_dropping_unmaps_everything() {
    let file = memfd("dropped", 64 * PAGE_BYTES);
    let memory = GuestMemory::map(&[region(&file, 0, 64 * PAGE_BYTES, 0)], PAGE_BYTES).unwrap();
    assert!(maps().contains("memfd:dropped"));
    drop(memory);
    assert!(!maps().contains("memfd:dropped"));
}
