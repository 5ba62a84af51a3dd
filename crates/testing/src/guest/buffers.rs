//! Buffers in guest memory, seen as streams of bytes whatever their pieces, and the canaries around them.

use std::ptr;
use std::sync::Arc;

use super::config::BufferLayout;
use crate::driver::Segment;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, GuestPhysAddr};

#[derive(Clone, Copy, Debug)]
struct Piece {
    address: GuestPhysAddr,
    host: *mut u8,
    len: u32,
}

/// All buffers of one queue.
///
/// Methods take the number of a buffer and an offset into the stream of its pieces. What lies in a buffer is the
/// driver's between `pop_used` and `repost`; a device that writes then makes bytes that a check will find wrong.
#[derive(Clone, Debug)]
pub(super) struct Buffers {
    /// Keeps the mapping of every piece's `host` alive.
    _memory: Arc<GuestMemory>,
    pieces: Vec<Piece>,
    pieces_each: usize,
    capacity_bytes: usize,
}

// SAFETY: `host` leads into `_memory`, which is Send, and is used by the one owner of the buffers only.
unsafe impl Send for Buffers {}
// SAFETY: as above; by `&self` of another thread the pieces are only counted and copied (`Guest` keeps a plan).
unsafe impl Sync for Buffers {}

impl Buffers {
    /// Places `count` buffers from `start` on.
    pub fn place(memory: &Arc<GuestMemory>, layout: &BufferLayout, count: u16, start: GuestPhysAddr) -> Result<Self> {
        let mut pieces = Vec::with_capacity(usize::from(count) * layout.pieces.len());
        let mut address = start.plus(u64::from(layout.offset_bytes));
        for _ in 0..count {
            for &len in &layout.pieces {
                pieces.push(Piece { address, host: memory.locate(address, u64::from(len))?, len });
                address = address.plus(u64::from(layout.stride()));
            }
        }
        Ok(Self {
            _memory: Arc::clone(memory),
            pieces,
            pieces_each: layout.pieces.len(),
            capacity_bytes: layout.capacity_bytes(),
        })
    }

    pub fn count(&self) -> u16 {
        (self.pieces.len() / self.pieces_each) as u16
    }

    pub fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }

    /// Address and length of every piece.
    pub fn extents(&self) -> impl Iterator<Item = (GuestPhysAddr, u64)> {
        self.pieces.iter().map(|piece| (piece.address, u64::from(piece.len)))
    }

    fn pieces_of(&self, buffer: u16) -> &[Piece] {
        let first = usize::from(buffer) * self.pieces_each;
        &self.pieces[first..first + self.pieces_each]
    }

    /// Appends the segments that hold the first `len` bytes of a buffer.
    pub fn segments(&self, buffer: u16, len: usize, writable: bool, into: &mut Vec<Segment>) {
        let mut left = len as u32;
        for piece in self.pieces_of(buffer) {
            if left == 0 {
                break;
            }
            let len = piece.len.min(left);
            into.push(Segment { address: piece.address, len, writable });
            left -= len;
        }
    }

    /// Calls `visit` with address, host pointer, length and stream position of each part of `offset..offset + len`.
    fn for_each_part(
        &self,
        buffer: u16,
        offset: usize,
        len: usize,
        mut visit: impl FnMut(GuestPhysAddr, *mut u8, usize, usize),
    ) {
        assert!(offset + len <= self.capacity_bytes, "within the buffer's stream");
        let (mut skip, mut done) = (offset, 0);
        for piece in self.pieces_of(buffer) {
            let piece_bytes = piece.len as usize;
            if skip >= piece_bytes {
                skip -= piece_bytes;
                continue;
            }
            let count = (piece_bytes - skip).min(len - done);
            if count == 0 {
                return;
            }
            // SAFETY: `skip` < the piece's length, so the pointer stays within what `place` located.
            visit(piece.address.plus(skip as u64), unsafe { piece.host.add(skip) }, count, done);
            done += count;
            skip = 0;
        }
    }

    /// Copies out of a buffer.
    pub fn read(&self, buffer: u16, offset: usize, into: &mut [u8]) {
        let len = into.len();
        self.for_each_part(buffer, offset, len, |_, host, count, done| {
            // SAFETY: `count` bytes at `host` were located; `into` has `len` >= done + count bytes of host memory.
            unsafe { ptr::copy_nonoverlapping(host, into[done..].as_mut_ptr(), count) };
        });
    }

    /// Copies into a buffer.
    pub fn write(&self, buffer: u16, offset: usize, bytes: &[u8]) {
        self.for_each_part(buffer, offset, bytes.len(), |_, host, count, done| {
            // SAFETY: as in `read`, the other way round.
            unsafe { ptr::copy_nonoverlapping(bytes[done..].as_ptr(), host, count) };
        });
    }

    /// Fills part of a buffer with canaries.
    pub fn fill_canaries(&self, buffer: u16, offset: usize, len: usize) {
        self.for_each_part(buffer, offset, len, |address, host, count, _| fill(address, host, count));
    }

    /// How many bytes from `offset` to the buffer's end are no longer canaries.
    pub fn changed_canaries(&self, buffer: u16, offset: usize) -> u64 {
        let mut changed = 0;
        let len = self.capacity_bytes - offset;
        self.for_each_part(buffer, offset, len, |address, host, count, _| changed += changed_at(address, host, count));
        changed
    }
}

/// The canary of an address: neighbours differ, so that bytes moved by a few places show.
fn canary(address: u64) -> u8 {
    (address as u8).wrapping_mul(31) ^ 0xa5
}

fn fill(address: GuestPhysAddr, host: *mut u8, count: usize) {
    for offset in 0..count {
        // SAFETY: callers pass `count` located bytes.
        unsafe { host.add(offset).write(canary(address.0 + offset as u64)) };
    }
}

fn changed_at(address: GuestPhysAddr, host: *mut u8, count: usize) -> u64 {
    let mut changed = 0;
    for offset in 0..count {
        // SAFETY: callers pass `count` located bytes.
        let byte = unsafe { host.add(offset).read() };
        changed += u64::from(byte != canary(address.0 + offset as u64));
    }
    changed
}

/// All guest memory that belongs to no ring and no buffer: nobody may ever write there.
#[derive(Debug)]
pub(super) struct Gaps {
    memory: Arc<GuestMemory>,
    gaps: Vec<(GuestPhysAddr, u64)>,
}

impl Gaps {
    /// The complement of `taken` (address, bytes).
    ///
    /// # Errors
    /// [`Error::Config`] if anything taken overlaps.
    pub fn around(memory: &Arc<GuestMemory>, mut taken: Vec<(GuestPhysAddr, u64)>) -> Result<Self> {
        taken.sort_unstable();
        let mut gaps = Vec::new();
        for region in memory.regions() {
            let mut cursor = region.config().guest_phys_address;
            let inside =
                |address: GuestPhysAddr| address >= region.config().guest_phys_address && address < region.end();
            for &(address, bytes) in taken.iter().filter(|(address, _)| inside(*address)) {
                if address < cursor {
                    return Err(Error::config(format!("rings and buffers overlap at {:#x}", address.0)));
                }
                gaps.push((cursor, address.0 - cursor.0));
                cursor = address.plus(bytes);
            }
            gaps.push((cursor, region.end().0 - cursor.0));
        }
        gaps.retain(|&(_, bytes)| bytes > 0);
        Ok(Self { memory: Arc::clone(memory), gaps })
    }

    pub fn fill(&self) -> Result<()> {
        for &(address, bytes) in &self.gaps {
            fill(address, self.memory.locate(address, bytes)?, bytes as usize);
        }
        Ok(())
    }

    /// How many bytes are no longer canaries.
    pub fn changed(&self) -> Result<u64> {
        let mut changed = 0;
        for &(address, bytes) in &self.gaps {
            changed += changed_at(address, self.memory.locate(address, bytes)?, bytes as usize);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionConfig;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::new(&[RegionConfig::memfd(0x10000, 65536)]).unwrap())
    }

    fn scattered() -> BufferLayout {
        BufferLayout { pieces: vec![12, 7, 100], stride_bytes: 131, offset_bytes: 3, ..BufferLayout::default() }
    }

    #[test]
    fn test_streams_cross_pieces_at_odd_addresses() {
        let memory = memory();
        let buffers = Buffers::place(&memory, &scattered(), 4, GuestPhysAddr(0x10000)).unwrap();
        let bytes: Vec<u8> = (0..119).collect();
        buffers.write(2, 0, &bytes);
        let mut back = vec![0; 100];
        buffers.read(2, 10, &mut back);
        assert_eq!(back, bytes[10..110]);
        let mut raw = [0; 7];
        memory.read(GuestPhysAddr(0x10000 + 3 + 7 * 131), &mut raw).unwrap();
        assert_eq!(raw, bytes[12..19]);
    }

    #[test]
    fn test_segments_end_with_the_frame() {
        let buffers = Buffers::place(&memory(), &scattered(), 2, GuestPhysAddr(0x10000)).unwrap();
        let mut segments = Vec::new();
        buffers.segments(1, 20, false, &mut segments);
        let lengths: Vec<_> = segments.iter().map(|segment| segment.len).collect();
        assert_eq!((lengths, segments[0].address), (vec![12, 7, 1], GuestPhysAddr(0x10000 + 3 + 3 * 131)));
        segments.clear();
        buffers.segments(1, 19, false, &mut segments);
        assert_eq!(segments.len(), 2);
    }

    #[test]
    fn test_each_changed_byte_outside_buffers_is_counted() {
        let memory = memory();
        let buffers = Buffers::place(&memory, &scattered(), 4, GuestPhysAddr(0x10100)).unwrap();
        let gaps = Gaps::around(&memory, buffers.extents().collect()).unwrap();
        gaps.fill().unwrap();
        for buffer in 0..4 {
            buffers.write(buffer, 0, &[0xff; 119]);
        }
        assert_eq!(gaps.changed().unwrap(), 0);
        let first = GuestPhysAddr(0x10103);
        for address in
            [GuestPhysAddr(0x10000), first.plus(12), GuestPhysAddr(0x102), first.plus(130), GuestPhysAddr(0x1ffff)]
        {
            if let Ok(host) = memory.locate(address, 1) {
                // SAFETY: just located.
                unsafe { *host ^= 1 };
            }
        }
        assert_eq!(gaps.changed().unwrap(), 4);
    }

    #[test]
    fn test_canaries_behind_a_frame_are_counted() {
        let buffers = Buffers::place(&memory(), &scattered(), 1, GuestPhysAddr(0x10000)).unwrap();
        buffers.fill_canaries(0, 0, 119);
        buffers.write(0, 0, &[0; 25]);
        assert_eq!(buffers.changed_canaries(0, 25), 0);
        assert!(buffers.changed_canaries(0, 20) >= 4);
    }

    #[test]
    fn test_overlap_is_refused() {
        let overlapping = vec![(GuestPhysAddr(0x10000), 100), (GuestPhysAddr(0x10063), 1)];
        assert!(Gaps::around(&memory(), overlapping).is_err());
    }
}
