//! The Internet checksum (RFC 1071) of what lies in several pieces, partly in guest memory.
//!
//! Guest memory is added up where it lies. A guest that changes it before it is sent makes its own checksum wrong, and
//! nothing else.

use crate::guest_memory::{self, GuestMemory, Segment};

/// A checksum in the making: the ones' complement sum of the bytes added so far, as if they lay one behind the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// With each odd byte rotated by one byte, so that what comes next is added where it lies.
    words: u64,
    odd: bool,
}

impl Sum {
    /// Adds bytes of ours.
    #[inline]
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.add_words(guest_memory::sum_bytes(bytes), bytes.len());
    }

    /// Adds a piece of guest memory, or of our slabs.
    #[inline]
    pub fn add_memory(&mut self, memory: &GuestMemory, piece: Segment) {
        self.add_words(memory.sum(piece.addr, piece.len), piece.len as usize);
    }

    #[inline]
    fn add_words(&mut self, words: u64, len_bytes: usize) {
        self.words = guest_memory::add_words(self.words, words);
        if !len_bytes.is_multiple_of(2) {
            self.words = self.words.rotate_left(8);
            self.odd = !self.odd;
        }
    }

    /// Takes bytes out again that are part of the sum at an even place.
    #[inline]
    pub fn remove_bytes(&mut self, bytes: &[u8; 4]) {
        self.add_bytes(&bytes.map(|byte| !byte));
    }

    /// The checksum: what makes the sum 0xffff where it is added. In the frame's byte order.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        let words = if self.odd { self.words.rotate_right(8) } else { self.words };
        let halves = (words >> 32) + (words & 0xffff_ffff);
        // Three rounds: 33 bits, 18 bits, 17 bits, 16 bits.
        let folded = (0..3).fold(halves, |sum, _| (sum >> 16) + (sum & 0xffff));
        (!folded as u16).to_ne_bytes()
    }

    /// The checksum where zero means that there is none (RFC 768): the other zero instead.
    #[inline]
    pub fn checksum_not_zero(self) -> [u8; 2] {
        let checksum = self.checksum();
        if checksum == [0, 0] { [0xff, 0xff] } else { checksum }
    }
}
