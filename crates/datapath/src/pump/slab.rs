//! Bounce frames: chunks of the front slab, for frames that cannot stay in the guest's buffers.

use crate::error::UnknownAnswer;
use crate::guest_memory::UmemAddr;
use crate::xsk::CHUNK_BYTES;

/// Bounce frames of one direction of one queue pair.
pub(super) const SLAB_FRAMES: usize = 512;
/// Front slab of a port: chunk 0 keeps fill addresses from being negative, then rx and tx frames of each queue pair.
pub(crate) fn slab_bytes(queue_pairs: usize) -> u64 {
    CHUNK_BYTES * (1 + (2 * SLAB_FRAMES * queue_pairs) as u64)
}

/// A stack of free frames of a fixed part of the slab.
#[derive(Debug)]
pub(super) struct Slab {
    start: u64,
    free: Vec<UmemAddr>,
    /// By frame: whether it is in use.
    in_use: [bool; SLAB_FRAMES],
}

impl Slab {
    /// The rx (`direction` 0) or tx (1) frames of queue pair `pair`.
    pub fn new(pair: usize, direction: usize) -> Self {
        let start = CHUNK_BYTES * (1 + (SLAB_FRAMES * (2 * pair + direction)) as u64);
        let mut slab = Self { start, free: Vec::with_capacity(SLAB_FRAMES), in_use: [false; SLAB_FRAMES] };
        slab.reset();
        slab
    }

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
    pub fn give_back(&mut self, frame: UmemAddr) -> Result<(), UnknownAnswer> {
        debug_assert!(self.owns(frame), "a frame goes back to its own slab");
        let index = self.index(frame);
        if !std::mem::take(&mut self.in_use[index]) {
            return Err(UnknownAnswer(frame));
        }
        self.free.push(frame);
        Ok(())
    }

    fn index(&self, frame: UmemAddr) -> usize {
        ((frame.0 - self.start) / CHUNK_BYTES) as usize
    }

    /// Whether an address is the start of one of these frames.
    pub fn owns(&self, frame: UmemAddr) -> bool {
        let end = self.start + SLAB_FRAMES as u64 * CHUNK_BYTES;
        (self.start..end).contains(&frame.0) && frame.0.is_multiple_of(CHUNK_BYTES)
    }

    /// Number of frames that can be taken.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Number of frames in use.
    pub fn used(&self) -> usize {
        SLAB_FRAMES - self.free.len()
    }

    /// All frames are free again: the socket that had them is closed.
    pub fn reset(&mut self) {
        self.in_use.fill(false);
        self.free.clear();
        self.free.extend((0..SLAB_FRAMES as u64).map(|i| UmemAddr(self.start + i * CHUNK_BYTES)));
    }
}

#[cfg(test)]
mod tests;
