//! What a case runs on: guest memory with a shadow copy, a socket and the model kernel behind it. Kept from case to
//! case, for making it costs more than a case does.

use std::sync::Arc;

use mpassthru_testing::memory::RegionConfig;

use super::migration::Migration;
use crate::fixture::Guest;
use crate::guest_memory::{GuestMemory, PAGE_BYTES, UmemAddr, UserAddr};
use crate::xsk::test_kernel::TestKernel;
use crate::xsk::{BindMode, FRAME_BYTES_MAX, UmemLayout, XskSocket};

const NEAR_BUFFERS_BYTES: u64 = 0x4000;
const NEIGHBOUR_BYTES: u64 = 0x2000;
const FAR_AT: u64 = 0x1000_0000;
const FAR_BYTES: u64 = 0x2000;
const GUARD: u8 = 0xa5;

/// A kind of world.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Room for the rings of one queue.
    pub queue_bytes: u64,
    /// Room for indirect tables, behind the rings of both queues.
    pub tables_bytes: u64,
    /// Longest queue.
    pub size_max: u32,
    pub mode: BindMode,
    /// Room for a frame, or a piece of one, in a chunk.
    pub room: u32,
    pub frame_max: u32,
}

const SMALL: Plan = Plan {
    queue_bytes: 0x2000,
    tables_bytes: 0x2000,
    size_max: 256,
    mode: BindMode::Copy,
    room: 1524,
    frame_max: 1524,
};

/// The second plan is for queues of every size; most cases run on smaller memory, which is faster to check.
pub const PLANS: [Plan; 5] = [
    SMALL,
    Plan { queue_bytes: 0xe_0000, tables_bytes: 0x1_0000, size_max: 32768, ..SMALL },
    Plan { mode: BindMode::ZeroCopy, room: 2000, frame_max: 2000, ..SMALL },
    Plan { mode: BindMode::ZeroCopy, room: FRAME_BYTES_MAX, frame_max: FRAME_BYTES_MAX, ..SMALL },
    // Frames in several pieces.
    Plan { room: 600, frame_max: 4500, ..SMALL },
];

impl Plan {
    pub fn tables_at(&self) -> u64 {
        2 * self.queue_bytes
    }

    /// Everything from here on is buffers.
    pub fn buffers_at(&self) -> u64 {
        self.tables_at() + self.tables_bytes
    }

    pub fn first_region_bytes(&self) -> u64 {
        self.buffers_at() + NEAR_BUFFERS_BYTES
    }

    /// End of the two regions that the guest sees as one range from address 0 on.
    fn near_bytes(&self) -> u64 {
        self.first_region_bytes() + NEIGHBOUR_BYTES
    }

    pub fn total_bytes(&self) -> u64 {
        self.near_bytes() + FAR_BYTES
    }

    /// Guest-physical addresses around which things change.
    pub fn edges(&self) -> [u64; 6] {
        let near = self.near_bytes();
        [self.buffers_at(), self.first_region_bytes(), near, FAR_AT, FAR_AT + FAR_BYTES, 0]
    }

    /// The part of a guest-physical range that lies in one region, as `(offset, length)`: offsets count bytes of guest
    /// memory, whatever region they are in. Written apart from the code under test.
    pub fn locate(&self, address: u64, len: u64) -> Option<(u64, u64)> {
        let regions = [
            (0, self.first_region_bytes(), 0),
            (self.first_region_bytes(), NEIGHBOUR_BYTES, self.first_region_bytes()),
            (FAR_AT, FAR_BYTES, self.near_bytes()),
        ];
        let inside = |&&(start, size, _): &&(u64, u64, u64)| address >= start && address - start < size;
        let &(start, size, offset) = regions.iter().find(inside)?;
        Some((offset + (address - start), len.min(size - (address - start))))
    }

    /// The guest-physical address of an offset.
    pub fn guest_phys(&self, offset: u64) -> u64 {
        offset.checked_sub(self.near_bytes()).map_or(offset, |far| FAR_AT + far)
    }
}

/// Guest memory, a socket, its kernel.
pub struct World {
    pub plan: Plan,
    pub guest: Guest,
    pub kernel: TestKernel,
    /// The socket, while the pump does not have it.
    pub xsk: Option<XskSocket>,
    template: Vec<u8>,
    /// Guest memory as it should be.
    shadow: Vec<u8>,
    pub migration: Option<Migration>,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let regions = [
            RegionConfig::memfd(0, plan.first_region_bytes()),
            RegionConfig::memfd(plan.first_region_bytes(), NEIGHBOUR_BYTES),
            RegionConfig::memfd(FAR_AT, FAR_BYTES),
        ];
        let guest = Guest::new(&regions);
        let layout = UmemLayout::for_frames(plan.room).expect("a frame fits a chunk");
        let (kernel, xsk) = TestKernel::bind_for(plan.frame_max, &guest.memory, layout, plan.mode);
        let mut template = vec![GUARD; plan.total_bytes() as usize];
        template[..plan.buffers_at() as usize].fill(0);
        let world = Self { plan, guest, kernel, xsk: Some(xsk), shadow: template.clone(), template, migration: None };
        world.memory().write(world.umem(0), &world.template);
        world
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.guest.memory
    }

    pub fn umem(&self, offset: u64) -> UmemAddr {
        UmemAddr(self.guest.memory.slab_bytes() + offset)
    }

    /// The front-end's address of a place in the first region.
    pub fn user(&self, offset: u64) -> UserAddr {
        UserAddr(self.guest.vmm.regions()[0].user_address().wrapping_add(offset))
    }

    /// The driver writes; what lies outside guest memory is left out.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let at = offset.min(self.plan.total_bytes()) as usize;
        let bytes = &bytes[..bytes.len().min(self.shadow.len() - at)];
        self.guest.memory.write(self.umem(at as u64), bytes);
        self.shadow[at..at + bytes.len()].copy_from_slice(bytes);
        if let Some(migration) = &mut self.migration {
            migration.driver_writes(at, bytes);
        }
    }

    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.guest.memory.read(self.umem(offset))
    }

    pub fn read_u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    /// Calls `changed` with the offset of each byte from `start` on that is not what the shadow has, and takes it over.
    pub fn compare(&mut self, start: u64, mut changed: impl FnMut(u64)) {
        for page in (start..self.plan.total_bytes()).step_by(PAGE_BYTES as usize) {
            let range = page as usize..(page + PAGE_BYTES) as usize;
            if self.page_is(page, &self.shadow[range.clone()]) {
                continue;
            }
            let now: [u8; PAGE_BYTES as usize] = self.read(page);
            let known = &mut self.shadow[range];
            (0..PAGE_BYTES).filter(|&i| known[i as usize] != now[i as usize]).for_each(|i| changed(page + i));
            known.copy_from_slice(&now);
        }
    }

    /// Memory as it was at first, rings empty. `socket` is the one that the pump had.
    pub fn restore(&mut self, mut socket: XskSocket) {
        self.kernel.close(&mut socket);
        self.xsk = Some(socket);
        for page in (0..self.plan.total_bytes()).step_by(PAGE_BYTES as usize) {
            let fresh = &self.template[page as usize..(page + PAGE_BYTES) as usize];
            if !self.page_is(page, fresh) {
                self.guest.memory.write(self.umem(page), fresh);
            }
            self.shadow[page as usize..(page + PAGE_BYTES) as usize].copy_from_slice(fresh);
        }
    }

    /// Whether a page of guest memory holds `bytes`.
    fn page_is(&self, page: u64, bytes: &[u8]) -> bool {
        assert!(page + bytes.len() as u64 <= self.plan.total_bytes(), "a page of guest memory");
        let start = self.guest.memory.ptr(self.umem(page));
        // SAFETY: both ranges are valid for the length (checked above). No reference is made, and nothing else writes
        // to this page now, or the comparison may turn out either way.
        unsafe { libc::memcmp(start.cast(), bytes.as_ptr().cast(), bytes.len()) == 0 }
    }
}
