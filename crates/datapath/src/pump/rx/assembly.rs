//! rx of frames that arrive in several pieces (XDP_USE_SG): each piece is where a frame of its own would be.
//!
//! The first is in place, behind its buffer's virtio-net header. The others are not: in further buffers of a packet there
//! is no header, and all buffers but the last are full (VIRTIO 1.3 §5.1.6.4). So their bytes move forward, each once, to
//! the end of the buffer before and the start of their own. Buffers that are not needed then are posted again.
//!
//! Invariant: a byte is moved before anything is written over it. Pieces are taken in their order, each buffer holds
//! more than the piece that came with it, so what is written to a buffer is never further back in the frame than what
//! lies there still.

use super::{Posted, Rx, header_of};
use crate::error::UnknownAnswer;
use crate::guest_memory::{GuestMemory, Segment};
use crate::pump::slab::Slab;
use crate::stats::{BounceReason, Counts, DropReason};
use crate::xsk::{RX_RING_DESCS, RxDesc, XskSocket};

/// The pieces of a frame, and the buffers that they came in.
#[derive(Debug)]
pub(super) struct Pieces {
    descs: Vec<RxDesc>,
    /// The guest's buffer of each; none if it is in the slab.
    homes: Vec<Option<Posted>>,
    /// Where its bytes are.
    bytes: Vec<Segment>,
}

impl Pieces {
    pub fn new() -> Self {
        let capacity = RX_RING_DESCS as usize;
        Self {
            descs: Vec::with_capacity(capacity),
            homes: Vec::with_capacity(capacity),
            bytes: Vec::with_capacity(capacity),
        }
    }
}

impl Rx {
    /// Reads frames off the rx ring until `wanted` descriptors are read, to the end of a frame, and delivers them. Returns
    /// the number of descriptors, and whether the kernel answered only what it was asked.
    #[inline(never)]
    pub(super) fn receive_pieces(
        &mut self,
        wanted: u32,
        xsk: &mut XskSocket,
        slab: &mut Slab,
        counts: &mut Counts,
    ) -> (u32, Result<(), UnknownAnswer>) {
        let present = xsk.rx_peek();
        let mut read = 0;
        while read < present.min(wanted) {
            self.pieces.descs.clear();
            let mut more = true;
            // The kernel shows all of a frame at once.
            while more && read < present {
                let desc = xsk.rx_read();
                self.pieces.descs.push(desc);
                more = desc.more;
                read += 1;
            }
            let delivered = match self.pieces.descs[..] {
                [desc] => self.deliver(desc, xsk, slab, counts),
                _ => self.deliver_pieces(xsk, slab, counts),
            };
            if delivered.is_err() {
                return (read, delivered);
            }
        }
        (read, Ok(()))
    }

    fn deliver_pieces(
        &mut self,
        xsk: &mut XskSocket,
        slab: &mut Slab,
        counts: &mut Counts,
    ) -> Result<(), UnknownAnswer> {
        let collected = self.collect_pieces(slab);
        if collected.is_err() {
            // Nothing comes of this socket any more; heads go back when it is closed.
            for (desc, home) in self.pieces.descs.iter().zip(&self.pieces.homes) {
                home.inspect(|posted| self.posted.insert(desc.fill, *posted));
            }
            return collected;
        }
        let len = self.pieces.bytes.iter().map(|piece| piece.len).sum();
        let heads = if !self.vring.enabled {
            Err(DropReason::Disabled)
        } else if len > xsk.frame_max {
            Err(DropReason::Oversize)
        } else {
            self.heads_for_pieces(self.vring.header_len + len, self.group_bytes(xsk))
        };
        match heads {
            Ok(heads) => {
                counts.bounced(len, self.reason_to_assemble());
                self.assemble(heads as u16, xsk, counts);
            }
            Err(reason) => {
                counts.dropped(reason);
                self.post_pieces_again(0, xsk);
            }
        }
        Ok(())
    }

    /// Takes the pieces' buffers out of the kernel's hands. Slab frames are free at once: nothing is posted before the
    /// frame is delivered.
    fn collect_pieces(&mut self, slab: &mut Slab) -> Result<(), UnknownAnswer> {
        self.pieces.homes.clear();
        self.pieces.bytes.clear();
        for desc in &self.pieces.descs {
            let home = if slab.owns(desc.fill) {
                slab.give_back(desc.fill)?;
                None
            } else {
                Some(self.posted.remove(desc.fill).ok_or(UnknownAnswer(desc.fill))?)
            };
            self.pieces.homes.push(home);
            self.pieces.bytes.push(Segment { addr: desc.frame, len: desc.len });
        }
        Ok(())
    }

    /// What the waiting heads of each slab frame hold together, or more.
    fn group_bytes(&self, xsk: &XskSocket) -> u32 {
        self.vring.header_len + xsk.layout.frame_max
    }

    /// A frame with a piece in the guest's memory was copied because it is long; else, why its heads waited.
    fn reason_to_assemble(&self) -> BounceReason {
        match self.waiting.front() {
            Some(waiting) if self.pieces.homes.iter().all(Option::is_none) => waiting.reason,
            _ => BounceReason::LongFrame,
        }
    }

    /// Number of heads that hold `total` bytes, in the order of the pieces: a piece's own, or those that wait for it.
    fn heads_for_pieces(&self, total: u32, group_bytes: u32) -> Result<usize, DropReason> {
        if !self.vring.mergeable {
            return self.heads_for(total);
        }
        let (mut room, mut heads) = (0u64, 0);
        let mut waiting = self.waiting.iter();
        for home in &self.pieces.homes {
            let mut group = 0u64;
            while room < u64::from(total) && group < u64::from(group_bytes) {
                let bytes = match home {
                    Some(posted) => posted.room,
                    None => waiting.next().ok_or(DropReason::NoBuffer)?.capacity_bytes,
                };
                (room, group, heads) = (room + u64::from(bytes), group + u64::from(bytes), heads + 1);
            }
        }
        if room < u64::from(total) { Err(DropReason::NoBuffer) } else { Ok(heads) }
    }

    /// Moves the frame to where it belongs, and uses its heads.
    fn assemble(&mut self, heads: u16, xsk: &mut XskSocket, counts: &mut Counts) {
        let header = header_of(heads);
        let group_bytes = u64::from(self.group_bytes(xsk));
        let pieces = std::mem::take(&mut self.pieces.bytes);
        let mut left = Rest::new(&header[..self.vring.header_len as usize], pieces.iter().copied());
        for index in 0..self.pieces.homes.len() {
            if left.is_empty() {
                self.post_pieces_again(index, xsk);
                break;
            }
            if let Some(posted) = self.pieces.homes[index] {
                let room = Segment { addr: posted.header, len: posted.room };
                let written = left.copy_into(self.vring.queue.memory(), room, counts);
                if self.vring.queue.is_logged() {
                    self.log_posted(self.pieces.descs[index].fill, posted.header);
                    self.vring.queue.log_buffer(posted.header, u64::from(written));
                }
                self.vring.queue.push_used(posted.head, written);
                continue;
            }
            let mut group = 0;
            while group < group_bytes && !left.is_empty() {
                group += u64::from(self.fill_waiting(&mut left, counts));
            }
        }
        debug_assert!(left.is_empty(), "heads were counted before");
        self.pieces.bytes = pieces;
    }

    /// Posts the buffers of the pieces from `first` on once more.
    fn post_pieces_again(&mut self, first: usize, xsk: &mut XskSocket) {
        for index in first..self.pieces.homes.len() {
            if let Some(posted) = self.pieces.homes[index] {
                self.post_again(self.pieces.descs[index].fill, posted, xsk);
            }
        }
    }
}

/// The part of a frame that is not in its place yet: header bytes of ours, then pieces of memory.
pub(super) struct Rest<'a, P> {
    header: &'a [u8],
    piece: Segment,
    pieces: P,
}

impl<'a, P: Iterator<Item = Segment>> Rest<'a, P> {
    #[inline]
    pub fn new(header: &'a [u8], mut pieces: P) -> Self {
        Self { header, piece: pieces.next().unwrap_or_default(), pieces }
    }

    pub fn is_empty(&self) -> bool {
        self.header.is_empty() && self.piece.len == 0
    }

    /// Moves as much as fits into `to`; returns its length. What is there already is not copied, and not counted.
    #[inline(always)]
    pub fn copy_into(&mut self, memory: &GuestMemory, to: Segment, counts: &mut Counts) -> u32 {
        let mut room = to;
        if !self.header.is_empty() {
            let header = room.take(self.header.len() as u32);
            memory.write(header.addr, &self.header[..header.len as usize]);
            self.header = &self.header[header.len as usize..];
        }
        while room.len > 0 && self.piece.len > 0 {
            let from = self.piece.take(room.len);
            let to = room.take(from.len);
            if from != to {
                memory.copy(from.addr, to.addr, from.len);
                counts.copied_bytes += u64::from(from.len);
            }
            if self.piece.len == 0 {
                self.piece = self.pieces.next().unwrap_or_default();
            }
        }
        to.len - room.len
    }
}
