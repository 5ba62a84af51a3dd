//! What tests of several modules share: one guest's memory, seen by its driver and by the data path.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use mpassthru_testing::driver::{PackedDriver, RingLayout, SplitDriver};
#[cfg(test)]
use mpassthru_testing::driver::{QueueDriver, RawRing};
use mpassthru_testing::memory::{self as vmm, RegionConfig};
#[cfg(test)]
use proptest::test_runner::Config;

use crate::fd::EventFd;
use crate::guest_memory::{DirtyLog, FileSpec, GuestMemory, GuestPhysAddr, PAGE_BYTES, RegionSpec, UmemAddr, UserAddr};
use crate::pump::{VringConfig, slab_bytes};
use crate::virtqueue::{Logged, PackedQueue, QueueConfig, SplitQueue, WriteLog};

/// The ring base of a packed virtqueue that nobody has used yet.
pub const PACKED_START: u32 = 0x8000_8000;

pub const VIRTIO_NET_F_CSUM: u64 = 1;
pub const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
pub const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
pub const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
pub const VIRTIO_F_RING_PACKED: u64 = 1 << 34;

#[cfg(test)]
/// Settings of a property test: this many cases; a failing one is kept as a test of its own, not as a file.
pub fn cases(count: u32) -> Config {
    Config { cases: count, failure_persistence: None, max_shrink_iters: 4096, ..Config::default() }
}

/// The memory of one guest.
#[derive(Clone)]
pub struct Guest {
    /// As the driver has it.
    pub vmm: Arc<vmm::GuestMemory>,
    /// As the data path maps it.
    pub memory: Arc<GuestMemory>,
}

impl Guest {
    /// Makes the regions and maps them, with the slabs of one queue pair.
    pub fn new(regions: &[RegionConfig]) -> Self {
        let vmm = Arc::new(vmm::GuestMemory::new(regions).unwrap());
        let memory = Arc::new(GuestMemory::map(&specs(&vmm), slab_bytes(1)).unwrap());
        Self { vmm, memory }
    }

    /// A guest of `pages` pages at guest-physical address 0.
    pub fn of_pages(pages: u64) -> Self {
        Self::new(&[RegionConfig::memfd(0, pages * PAGE_BYTES)])
    }

    /// The rings of `layout`, in the front-end's addresses.
    pub fn queue_config(&self, layout: &RingLayout, event_idx: bool) -> QueueConfig {
        let user = |address| UserAddr(self.vmm.user_address(address).unwrap());
        QueueConfig {
            size: u32::from(layout.size),
            base: 0,
            desc: user(layout.desc),
            avail: user(layout.avail),
            used: user(layout.used),
            event_idx,
            packed: false,
        }
    }

    /// Both ends of a virtqueue: the driver and the device.
    pub fn queue(&self, layout: RingLayout, event_idx: bool) -> (SplitDriver, SplitQueue) {
        let driver = SplitDriver::new(&self.vmm, layout, event_idx).unwrap();
        let queue = SplitQueue::new(Arc::clone(&self.memory), &self.queue_config(&layout, event_idx)).unwrap();
        (driver, queue)
    }

    /// Both ends of a packed virtqueue: the driver and the device.
    pub fn packed_queue(&self, layout: RingLayout, event_idx: bool) -> (PackedDriver, PackedQueue) {
        let driver = PackedDriver::new(&self.vmm, layout, event_idx).unwrap();
        let config = QueueConfig { base: PACKED_START, packed: true, ..self.queue_config(&layout, event_idx) };
        (driver, PackedQueue::new(Arc::clone(&self.memory), &config).unwrap())
    }

    /// A virtqueue as vhost-user hands it over, that nobody has used yet.
    pub fn vring_config(&self, layout: &RingLayout, features: u64) -> VringConfig {
        let base = if features & VIRTIO_F_RING_PACKED != 0 { PACKED_START } else { 0 };
        VringConfig {
            queue: QueueConfig { base, ..self.queue_config(layout, false) },
            features,
            enabled: true,
            kick: EventFd::new().unwrap(),
            call: Some(EventFd::new().unwrap()),
            err: Some(EventFd::new().unwrap()),
            record: None,
            log: None,
        }
    }

    /// Where a guest-physical address lies in the UMEM.
    pub fn umem(&self, address: u64) -> UmemAddr {
        self.memory.translate(GuestPhysAddr(address), 1, &mut 0).unwrap().addr
    }
}

/// The split ring of a driver.
#[cfg(test)]
pub fn split(driver: &QueueDriver) -> &RawRing {
    match driver {
        QueueDriver::Split(driver) => driver.ring(),
        QueueDriver::Packed(_) => panic!("a split virtqueue"),
    }
}

/// The regions as SET_MEM_TABLE describes them. The descriptors stay those of `vmm`.
pub fn specs(vmm: &vmm::GuestMemory) -> Vec<RegionSpec> {
    let spec = |region: &vmm::Region| RegionSpec {
        guest_phys: GuestPhysAddr(region.config().guest_phys_address.0),
        size_bytes: region.config().size_bytes,
        user: UserAddr(region.user_address()),
        mmap_offset: region.config().mmap_offset_bytes,
        fd: region.file().as_raw_fd(),
    };
    vmm.regions().iter().map(spec).collect()
}

/// Whether an eventfd was signalled since the last time this was asked.
pub fn was_signalled(fd: &EventFd) -> bool {
    let mut polled = libc::pollfd { fd: fd.raw(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry; a timeout of 0 only looks.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) } == 1;
    if ready {
        fd.clear();
    }
    ready
}

/// A log for guest-physical addresses below `end`, that is anywhere in its file.
pub fn dirty_log(end: u64) -> Arc<DirtyLog> {
    let (offset, size_bytes) = (100, (end - 1) / PAGE_BYTES / 8 + 1);
    let file = memfd("migration-log", offset + size_bytes);
    Arc::new(DirtyLog::map(&FileSpec { fd: file.as_raw_fd(), offset, size_bytes }).unwrap())
}

/// How a queue logs all that it writes, its used ring being at `used`.
pub fn write_log(log: &Arc<DirtyLog>, used: u64) -> WriteLog {
    WriteLog {
        log: Arc::clone(log),
        logged: Logged { buffers: true, used_ring: Some(GuestPhysAddr(used)) },
        notify: None,
    }
}

/// Takes the marked pages below page `end`.
#[cfg(test)]
pub fn marked(log: &DirtyLog, end: u64) -> Vec<u64> {
    (0..end).filter(|&page| log.take(page)).collect()
}

/// A sparse memfd that can be found by its name in /proc/self/maps.
pub fn memfd(name: &str, size_bytes: u64) -> OwnedFd {
    let name = CString::new(name).unwrap();
    // SAFETY: the name is NUL-terminated and lives through the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: a new descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: resizes a file of ours.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), size_bytes as libc::off_t) }, 0);
    fd
}
