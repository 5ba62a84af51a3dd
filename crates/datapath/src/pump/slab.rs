//! Frames of our own: for frames that cannot stay in the guest's buffers, and for the headers of those whose headers are
//! made here.

use crate::error::UnknownAnswer;
use crate::guest_memory::UmemAddr;
use crate::offload::headers::HEADERS_MAX;
use crate::xsk::CHUNK_BYTES;

/// Bounce frames of one direction of one queue pair.
pub(super) const SLAB_FRAMES: usize = 512;
/// Headers on their way at once, of one queue pair: as many as a tx ring holds packets of two pieces.
pub(super) const HEADER_SLOTS: usize = 1024;
const HEADER_CHUNKS: usize = HEADER_SLOTS * HEADERS_MAX / CHUNK_BYTES as usize;
/// rx frames, tx frames, headers.
const PAIR_CHUNKS: usize = 2 * SLAB_FRAMES + HEADER_CHUNKS;

// A power of two, so that no slot crosses a page, which need not be contiguous with the next one for the device.
const _: () = assert!(HEADERS_MAX.is_power_of_two(), "a chunk is cut into whole slots");

/// Front slab of a port: chunk 0 keeps fill addresses from being negative, then the frames of each queue pair.
pub(crate) fn slab_bytes(queue_pairs: usize) -> u64 {
    CHUNK_BYTES * (1 + PAIR_CHUNKS * queue_pairs) as u64
}

/// A stack of free frames of a fixed part of the slab.
#[derive(Debug)]
pub(super) struct Slab {
    start: u64,
    frame_bytes: u64,
    free: Vec<UmemAddr>,
    /// By frame: whether it is in use.
    in_use: Box<[bool]>,
}

impl Slab {
    /// The rx (`direction` 0) or tx (1) frames of queue pair `pair`, of one chunk each.
    pub fn new(pair: usize, direction: usize) -> Self {
        Self::at(PAIR_CHUNKS * pair + SLAB_FRAMES * direction, CHUNK_BYTES, SLAB_FRAMES)
    }

    /// The tx headers of queue pair `pair`, of [`HEADERS_MAX`] bytes each.
    pub fn of_headers(pair: usize) -> Self {
        Self::at(PAIR_CHUNKS * pair + 2 * SLAB_FRAMES, HEADERS_MAX as u64, HEADER_SLOTS)
    }

    fn at(chunk: usize, frame_bytes: u64, count: usize) -> Self {
        let start = CHUNK_BYTES * (1 + chunk) as u64;
        let in_use = vec![false; count].into_boxed_slice();
        let mut slab = Self { start, frame_bytes, free: Vec::with_capacity(count), in_use };
        slab.reset();
        slab
    }

    #[inline]
    pub fn take(&mut self) -> Option<UmemAddr> {
        let frame = self.free.pop()?;
        let index = self.index(frame);
        self.in_use[index] = true;
        Some(frame)
    }

    /// Takes back a frame of its own.
    ///
    /// # Errors
    /// Nobody has it.
    #[inline]
    pub fn give_back(&mut self, frame: UmemAddr) -> Result<(), UnknownAnswer> {
        debug_assert!(self.owns(frame), "a frame goes back to its own slab");
        let index = self.index(frame);
        if !std::mem::take(&mut self.in_use[index]) {
            return Err(UnknownAnswer(frame));
        }
        self.free.push(frame);
        Ok(())
    }

    #[inline]
    fn index(&self, frame: UmemAddr) -> usize {
        ((frame.0 - self.start) >> self.frame_bytes.trailing_zeros()) as usize
    }

    fn count(&self) -> usize {
        self.in_use.len()
    }

    /// Whether an address is the start of one of these frames.
    pub fn owns(&self, frame: UmemAddr) -> bool {
        self.holds(frame) && (frame.0 - self.start).is_multiple_of(self.frame_bytes)
    }

    /// Whether an address lies in one of these frames.
    #[inline]
    pub fn holds(&self, at: UmemAddr) -> bool {
        at.0.wrapping_sub(self.start) < self.count() as u64 * self.frame_bytes
    }

    /// Number of frames that can be taken.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Number of frames in use.
    pub fn used(&self) -> usize {
        self.count() - self.free.len()
    }

    /// All frames are free again: the socket that had them is closed.
    pub fn reset(&mut self) {
        self.in_use.fill(false);
        self.free.clear();
        self.free.extend((0..self.count() as u64).map(|i| UmemAddr(self.start + i * self.frame_bytes)));
    }
}

#[cfg(test)]
mod tests;
