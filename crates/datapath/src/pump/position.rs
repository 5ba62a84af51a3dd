//! Where in a chain the work has got to.

use crate::guest_memory::{GuestMemory, Segment};

/// A place in a chain.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Position {
    piece: usize,
    offset: u32,
}

impl Position {
    /// Goes on by up to `bytes`, and calls `part` with each part of a piece that lies there.
    pub fn walk(&mut self, chain: &[Segment], mut bytes: u32, mut part: impl FnMut(Segment)) {
        while bytes > 0
            && let Some(piece) = chain.get(self.piece)
        {
            let len = (piece.len - self.offset).min(bytes);
            part(Segment { addr: piece.addr.plus(u64::from(self.offset)), len });
            bytes -= len;
            self.offset += len;
            if self.offset == piece.len {
                *self = Self { piece: self.piece + 1, offset: 0 };
            }
        }
    }

    pub fn skip(&mut self, chain: &[Segment], bytes: u32) {
        self.walk(chain, bytes, |_| {});
    }

    /// Appends what lies in the next `bytes` to `pieces`, cut to `piece_max` bytes each.
    pub fn take(&mut self, chain: &[Segment], bytes: u32, piece_max: u32, pieces: &mut Vec<Segment>) {
        self.walk(chain, bytes, |mut part| {
            while part.len > 0 {
                pieces.push(part.take(piece_max));
            }
        });
    }

    /// Copies what lies here; what the chain does not hold stays as it is.
    pub fn read(mut self, chain: &[Segment], memory: &GuestMemory, into: &mut [u8]) {
        let mut done = 0;
        self.walk(chain, into.len() as u32, |part| {
            let end = done + part.len as usize;
            memory.read_bytes(part.addr, &mut into[done..end]);
            done = end;
        });
    }

    /// How many bytes the chain has from here on.
    pub fn bytes_behind(self, chain: &[Segment]) -> u32 {
        let pieces = chain.get(self.piece..).unwrap_or_default();
        pieces.iter().fold(0u32, |sum, piece| sum.saturating_add(piece.len)).saturating_sub(self.offset)
    }
}
