//! Guest memory as a VMM makes it: regions at guest-physical addresses, each backed by a file that can be sent to a
//! back-end (VHOST_USER_SET_MEM_TABLE) and mapped here for the driver.
//!
//! The one invariant: a [`Region`]'s mapping lives, at the same address, as long as the [`GuestMemory`] that owns it;
//! whoever keeps a pointer into it keeps an `Arc<GuestMemory>` beside it. Nothing here makes a reference into guest
//! memory: a device, in this process or another, writes to it at any time.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use crate::error::{Error, Result, check};

const HUGE_PAGE_BYTES: u64 = 2 << 20;
const BASE_PAGE_BYTES: u64 = 4096;

/// A guest-physical address: what the driver writes into descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPhysAddr(pub u64);

impl GuestPhysAddr {
    /// The address `bytes` further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    /// The next address that is a multiple of `alignment` (a power of two).
    #[must_use]
    pub fn align_up(self, alignment: u64) -> Self {
        Self(self.0.next_multiple_of(alignment))
    }
}

/// What a region of guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd of base pages, mapped shared: `memory-backend-memfd,share=on`.
    Memfd,
    /// A memfd of 2 MiB pages, mapped shared. Needs reserved hugepages.
    HugeMemfd,
    /// A memfd mapped privately, so that the back-end never sees what the driver writes: `share=off`, the classic
    /// mistake in a VM's configuration.
    PrivateMemfd,
    /// An unnamed file in the temporary directory, mapped shared. The kernel refuses to make a UMEM of it unless
    /// the directory is on tmpfs.
    File,
}

/// One region to be made.
#[derive(Clone, Copy, Debug)]
pub struct RegionConfig {
    /// Where the guest sees it.
    pub guest_phys_address: GuestPhysAddr,
    /// Its size; a multiple of the page size of `backing`.
    pub size_bytes: u64,
    /// What it is made of.
    pub backing: Backing,
    /// Where in its file it begins; a multiple of the page size of `backing`.
    pub mmap_offset_bytes: u64,
}

impl RegionConfig {
    /// A region of base pages at the start of its own memfd.
    #[must_use]
    pub fn memfd(guest_phys_address: u64, size_bytes: u64) -> Self {
        Self {
            guest_phys_address: GuestPhysAddr(guest_phys_address),
            size_bytes,
            backing: Backing::Memfd,
            mmap_offset_bytes: 0,
        }
    }
}

/// A mapped region.
#[derive(Debug)]
pub struct Region {
    config: RegionConfig,
    file: OwnedFd,
    start: *mut u8,
}

impl Region {
    fn map(config: RegionConfig) -> Result<Self> {
        let page_bytes = if config.backing == Backing::HugeMemfd { HUGE_PAGE_BYTES } else { BASE_PAGE_BYTES };
        let aligned = |value: u64| value.is_multiple_of(page_bytes);
        if config.size_bytes == 0 || !aligned(config.size_bytes) || !aligned(config.mmap_offset_bytes) {
            return Err(Error::config(format!(
                "guest memory region of {} bytes at file offset {}: both must be multiples of its page size, {page_bytes}",
                config.size_bytes, config.mmap_offset_bytes
            )));
        }
        let file = create_file(config.backing)?;
        let file_bytes = (config.mmap_offset_bytes + config.size_bytes).cast_signed();
        // SAFETY: `file` is open; no memory is involved.
        let resized = unsafe { libc::ftruncate(file.as_raw_fd(), file_bytes) };
        check(resized, || format!("size guest memory to {file_bytes} bytes"))?;
        let sharing = if config.backing == Backing::PrivateMemfd { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let length = usize::try_from(config.size_bytes).map_err(|_| Error::config("region exceeds address space"))?;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing existing is touched.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing,
                file.as_raw_fd(),
                config.mmap_offset_bytes.cast_signed(),
            )
        };
        if start == libc::MAP_FAILED {
            let pages = if config.backing == Backing::HugeMemfd { " in hugepages" } else { "" };
            return Err(Error::last_os(format!("map {length} bytes of guest memory{pages}")));
        }
        Ok(Self { config, file, start: start.cast() })
    }

    /// How the region was configured.
    #[must_use]
    pub fn config(&self) -> &RegionConfig {
        &self.config
    }

    /// The file behind it, for the back-end.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Where it is mapped in this process: the front-end's user address of VHOST_USER_SET_MEM_TABLE.
    #[must_use]
    pub fn user_address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// One past its last guest-physical address.
    #[must_use]
    pub fn end(&self) -> GuestPhysAddr {
        self.config.guest_phys_address.plus(self.config.size_bytes)
    }

    fn offset_of(&self, address: GuestPhysAddr, length: u64) -> Option<usize> {
        let offset = address.0.checked_sub(self.config.guest_phys_address.0)?;
        let end = offset.checked_add(length)?;
        if end > self.config.size_bytes { None } else { usize::try_from(offset).ok() }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; pointers into it live beside an Arc of the owner (module header).
        unsafe { libc::munmap(self.start.cast(), self.config.size_bytes as usize) };
    }
}

fn create_file(backing: Backing) -> Result<OwnedFd> {
    let fd = if backing == Backing::File {
        let directory = std::env::temp_dir();
        let path = CString::new(directory.as_os_str().as_bytes())
            .map_err(|_| Error::config("the temporary directory's name has a NUL"))?;
        // SAFETY: `path` is NUL-terminated and lives through the call.
        let fd = unsafe { libc::open(path.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, 0o600) };
        check(fd, || format!("make an unnamed file in {}", directory.display()))?
    } else {
        let huge = if backing == Backing::HugeMemfd { libc::MFD_HUGETLB } else { 0 };
        // SAFETY: the name is NUL-terminated and static.
        let fd = unsafe { libc::memfd_create(c"mpassthru-guest".as_ptr(), libc::MFD_CLOEXEC | huge) };
        check(fd, || "make a memfd for guest memory".to_string())?
    };
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// All memory of one guest.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

// SAFETY: the pointers are to shared memory that any process may change; all access goes through the copying and
// atomic methods below and in `driver::raw`, which make no reference that a write could invalidate.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; no method of `&self` keeps state outside the mappings.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Makes and maps every region.
    ///
    /// # Errors
    /// [`Error::Config`] for no region, overlap, or a size that is no multiple of the page size; [`Error::System`] if
    /// the kernel has no such memory.
    pub fn new(configs: &[RegionConfig]) -> Result<Self> {
        if configs.is_empty() {
            return Err(Error::config("a guest needs at least one region of memory"));
        }
        let mut ranges: Vec<_> = configs
            .iter()
            .map(|region| (region.guest_phys_address.0, region.guest_phys_address.0.checked_add(region.size_bytes)))
            .collect();
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[0].1.is_none_or(|end| end > pair[1].0) {
                return Err(Error::config(format!("guest memory regions overlap at {:#x}", pair[1].0)));
            }
        }
        let regions = configs.iter().copied().map(Region::map).collect::<Result<_>>()?;
        Ok(Self { regions })
    }

    /// The regions, in the order in which they were configured.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The host address of `length` bytes at `address`, which must lie within one region.
    ///
    /// # Errors
    /// [`Error::Config`] if any of it is outside.
    pub(crate) fn locate(&self, address: GuestPhysAddr, length: u64) -> Result<*mut u8> {
        for region in &self.regions {
            if let Some(offset) = region.offset_of(address, length) {
                // SAFETY: `offset_of` proved offset + length <= the size of the mapping.
                return Ok(unsafe { region.start.add(offset) });
            }
        }
        Err(Error::config(format!("{length} bytes at guest address {:#x} are outside guest memory", address.0)))
    }

    /// The front-end's user address of a guest-physical address, as VHOST_USER_SET_VRING_ADDR wants it.
    ///
    /// # Errors
    /// [`Error::Config`] if `address` is outside guest memory.
    pub fn user_address(&self, address: GuestPhysAddr) -> Result<u64> {
        Ok(self.locate(address, 1)?.addr() as u64)
    }

    /// Copies guest memory into `into`.
    ///
    /// # Errors
    /// [`Error::Config`] if the range is not within one region.
    pub fn read(&self, address: GuestPhysAddr, into: &mut [u8]) -> Result<()> {
        let from = self.locate(address, into.len() as u64)?;
        // SAFETY: `locate` proved the range; `into` is host memory and cannot overlap it. A device that writes at the
        // same time makes torn bytes, never an access elsewhere.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `bytes` into guest memory.
    ///
    /// # Errors
    /// [`Error::Config`] if the range is not within one region.
    pub fn write(&self, address: GuestPhysAddr, bytes: &[u8]) -> Result<()> {
        let to = self.locate(address, bytes.len() as u64)?;
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Sets `length` bytes to zero.
    ///
    /// # Errors
    /// [`Error::Config`] if the range is not within one region.
    pub fn zero(&self, address: GuestPhysAddr, length: u64) -> Result<()> {
        let to = self.locate(address, length)?;
        // SAFETY: `locate` proved the range.
        unsafe { ptr::write_bytes(to, 0, length as usize) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_is_written_is_seen_through_the_file() {
        let memory =
            GuestMemory::new(&[RegionConfig { mmap_offset_bytes: 8192, ..RegionConfig::memfd(0x1_0000_0000, 65536) }])
                .unwrap();
        memory.write(GuestPhysAddr(0x1_0000_1001), b"shared").unwrap();
        let mut seen = [0u8; 6];
        let file = memory.regions()[0].file().as_raw_fd();
        // SAFETY: `seen` has room for six bytes.
        let count = unsafe { libc::pread(file, seen.as_mut_ptr().cast(), 6, 8192 + 0x1001) };
        assert_eq!((count, &seen), (6, b"shared"));
    }

    #[test]
    fn test_private_memory_hides_writes_from_the_file() {
        let config = RegionConfig { backing: Backing::PrivateMemfd, ..RegionConfig::memfd(0, 4096) };
        let memory = GuestMemory::new(&[config]).unwrap();
        memory.write(GuestPhysAddr(0), b"hidden").unwrap();
        let mut seen = [1u8; 6];
        // SAFETY: `seen` has room for six bytes.
        unsafe { libc::pread(memory.regions()[0].file().as_raw_fd(), seen.as_mut_ptr().cast(), 6, 0) };
        assert_eq!(seen, [0; 6]);
    }

    #[test]
    fn test_ranges_across_or_outside_regions_are_refused() {
        let memory = GuestMemory::new(&[RegionConfig::memfd(0, 4096), RegionConfig::memfd(4096, 4096)]).unwrap();
        assert!(memory.read(GuestPhysAddr(4094), &mut [0; 4]).is_err());
        assert!(memory.write(GuestPhysAddr(8191), &[0; 2]).is_err());
        assert!(memory.locate(GuestPhysAddr(u64::MAX), 2).is_err());
        assert!(memory.write(GuestPhysAddr(8190), &[0; 2]).is_ok());
    }

    #[test]
    fn test_overlapping_and_odd_regions_are_refused() {
        assert!(GuestMemory::new(&[RegionConfig::memfd(0, 8192), RegionConfig::memfd(4096, 4096)]).is_err());
        assert!(GuestMemory::new(&[RegionConfig::memfd(0, 100)]).is_err());
        assert!(GuestMemory::new(&[]).is_err());
    }
}
