//! tx: from the guest to the AF_XDP tx ring.
//!
//! **Direct**: the pieces of the guest's chain, less its virtio-net header, become tx descriptors; the head is used when
//! the completion ring has named every piece. **Bounce**: a frame that cannot be sent so is copied into slab frames, and its
//! head is used at once.
//!
//! Invariant: no descriptor is submitted that the kernel would refuse, for such a one may never complete.

use super::inflight::InFlight;
use super::slab::Slab;
use super::vring::Vring;
use crate::error::{BurstError, QueueFault, UnknownAnswer};
use crate::guest_memory::{GuestMemory, Segment, UmemAddr};
use crate::stats::{BounceReason, Counts, DropReason};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction};
use crate::xsk::{BindMode, CHUNK_BYTES, COMPLETION_RING_DESCS, LONG_FRAME_BYTES_MAX, TX_RING_DESCS, XskSocket};

/// Frames handled before the other direction gets its turn.
const BURST: u32 = 64;
/// Ethernet header: the shortest frame that has addresses.
const ETHERNET_HEADER_BYTES: u32 = 14;

/// Longest piece that one descriptor takes (`net/xdp/xsk_queue.h`: xp_unaligned_validate_desc).
const PIECE_BYTES_MAX: u32 = CHUNK_BYTES as u32;
/// Descriptors that the longest frame takes where it is copied; so many more pieces may one have by being cut.
const LONG_PIECES_MAX: usize = LONG_FRAME_BYTES_MAX.div_ceil(PIECE_BYTES_MAX) as usize;

/// Who is waiting for a frame to be sent.
#[derive(Debug, Clone, Copy)]
enum Owner {
    Guest { head: u16 },
    Slab { frame: UmemAddr },
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    owner: Owner,
    pieces_left: u16,
}

#[derive(Debug, Clone, Copy, Default)]
struct Piece {
    addr: UmemAddr,
    len: u32,
    sent: u16,
}

/// Frames in the kernel's hands: as long as a socket lives, whatever becomes of the virtqueue.
#[derive(Debug)]
pub(super) struct TxInFlight {
    pieces: InFlight<Piece, { 4 * COMPLETION_RING_DESCS as usize }>,
    sent: Vec<Sent>,
    free: Vec<u16>,
    slab: Slab,
    /// Copy mode clears bit 0 of completed addresses (net/xdp/xsk.c keeps `address | 1` in the skb).
    key_mask: u64,
}

impl TxInFlight {
    pub fn new(slab: Slab) -> Self {
        let capacity = COMPLETION_RING_DESCS as usize;
        Self {
            pieces: InFlight::new(),
            sent: vec![Sent { owner: Owner::Guest { head: 0 }, pieces_left: 0 }; capacity],
            free: (0..capacity as u16).rev().collect(),
            slab,
            key_mask: !0,
        }
    }

    /// A new socket: completions carry addresses as its mode makes them.
    pub fn start(&mut self, mode: BindMode) {
        self.key_mask = if mode == BindMode::Copy { !1 } else { !0 };
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.len() == 0
    }

    /// Number of bounce frames that nobody has.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn free_slab_frames(&self) -> usize {
        crate::pump::slab::SLAB_FRAMES - self.slab.used()
    }

    fn key(&self, addr: UmemAddr) -> UmemAddr {
        UmemAddr(addr.0 & self.key_mask)
    }

    /// Whether a completion of `piece` could be taken for that of another one in flight. The very same piece is no
    /// other: whichever head is used first, the one that is not used holds all the memory that is still to be read.
    fn is_ambiguous(&self, piece: &Segment) -> bool {
        let other = self.pieces.get(self.key(piece.addr));
        other.is_some_and(|other| (other.addr, other.len) != (piece.addr, piece.len))
    }

    /// Whether the tx ring and the completion ring have room for `pieces` more descriptors.
    fn has_room(&self, xsk: &mut XskSocket, pieces: usize) -> bool {
        self.pieces.len() + pieces <= COMPLETION_RING_DESCS as usize && xsk.tx_free(pieces as u32) as usize >= pieces
    }

    /// Writes the descriptors of a packet in the guest's memory; room was checked.
    fn send(&mut self, xsk: &mut XskSocket, pieces: &[Segment], head: u16) {
        let sent = self.record(Owner::Guest { head }, pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            self.write(xsk, piece, sent, index + 1 < pieces.len());
        }
    }

    /// Writes those of a packet in slab frames, of which each goes back by itself; room was checked.
    fn send_copy(&mut self, xsk: &mut XskSocket, frames: &[Segment]) {
        for (index, frame) in frames.iter().enumerate() {
            let sent = self.record(Owner::Slab { frame: frame.addr }, 1);
            self.write(xsk, frame, sent, index + 1 < frames.len());
        }
    }

    #[inline]
    fn record(&mut self, owner: Owner, pieces: usize) -> u16 {
        let Some(sent) = self.free.pop() else {
            unreachable!("there are as many records as completions, and each of them has a piece");
        };
        self.sent[usize::from(sent)] = Sent { owner, pieces_left: pieces as u16 };
        sent
    }

    #[inline]
    fn write(&mut self, xsk: &mut XskSocket, piece: &Segment, sent: u16, more: bool) {
        self.pieces.insert(self.key(piece.addr), Piece { addr: piece.addr, len: piece.len, sent });
        xsk.tx_write(piece.addr, piece.len, more);
    }

    /// Takes completions in; `used` gets the head of each guest frame that is done. Returns their number.
    ///
    /// # Errors
    /// The kernel completed what was not sent; those before count.
    pub fn reap(&mut self, xsk: &mut XskSocket, mut used: impl FnMut(u16)) -> Result<u32, UnknownAnswer> {
        let completed = xsk.completion_peek();
        for _ in 0..completed {
            let addr = xsk.completion_read();
            let piece = self.pieces.remove(self.key(addr)).ok_or(UnknownAnswer(addr))?;
            let sent = &mut self.sent[usize::from(piece.sent)];
            sent.pieces_left -= 1;
            if sent.pieces_left == 0 {
                self.free.push(piece.sent);
                match sent.owner {
                    Owner::Guest { head } => used(head),
                    Owner::Slab { frame } => self.slab.give_back(frame)?,
                }
            }
        }
        if completed > 0 {
            xsk.completion_release();
        }
        Ok(completed)
    }

    /// Sends a frame of our own. Returns whether there was room.
    pub fn inject(&mut self, xsk: &mut XskSocket, memory: &GuestMemory, frame: &[u8]) -> bool {
        if !self.has_room(xsk, 1) {
            return false;
        }
        let Some(at) = self.slab.take() else { return false };
        memory.write(at, frame);
        self.send_copy(xsk, &[Segment { addr: at, len: frame.len() as u32 }]);
        xsk.tx_submit();
        true
    }

    /// The socket is closed: what it had is gone. `used` gets each guest head; its frame may or may not have left.
    pub fn abandon(&mut self, mut used: impl FnMut(u16)) {
        let mut open: Vec<u16> = self.pieces.values().map(|piece| piece.sent).collect();
        open.sort_unstable();
        open.dedup();
        for sent in open {
            if let Owner::Guest { head } = self.sent[usize::from(sent)].owner {
                used(head);
            }
            self.free.push(sent);
        }
        self.pieces.clear();
        self.slab.reset();
    }
}

/// What becomes of a chain.
enum Verdict {
    Direct,
    Bounce(BounceReason),
    Drop(DropReason),
}

/// The tx side of a queue pair.
#[derive(Debug)]
pub(super) struct Tx {
    pub vring: Vring,
    chain: Vec<Segment>,
    /// The pieces of a long frame, cut to what descriptors take.
    cut: Vec<Segment>,
    /// Where a frame is copied to.
    copy: Vec<Segment>,
    /// Why the kernel does not send at the moment, if it does not.
    pub wakeup_errno: Option<i32>,
}

impl Tx {
    pub fn new(vring: Vring) -> Self {
        Self {
            vring,
            chain: Vec::with_capacity(CHAIN_DESCS_MAX),
            cut: Vec::with_capacity(CHAIN_DESCS_MAX + LONG_PIECES_MAX),
            copy: Vec::with_capacity(LONG_PIECES_MAX),
            wakeup_errno: None,
        }
    }

    /// Returns finished heads and sends fresh ones. Returns the number of completions and frames moved.
    ///
    /// # Errors
    /// The driver broke the ring protocol, and what was taken before is sent; or the kernel completed what was not sent.
    pub fn burst(
        &mut self,
        xsk: &mut XskSocket,
        flight: &mut TxInFlight,
        counts: &mut Counts,
    ) -> Result<u32, BurstError> {
        let mut moved = self.reap(xsk, flight)?;
        let taken = self.send(xsk, flight, counts);
        xsk.tx_submit();
        let pending = xsk.tx_pending();
        self.wakeup_errno = None;
        if pending > 0 {
            self.wakeup_errno = xsk.tx_wakeup().err().filter(|errno| !is_passing(*errno));
            // In copy mode the call has sent frames, and most are complete already.
            moved += pending - xsk.tx_pending() + self.reap(xsk, flight)?;
        }
        self.vring.flush();
        Ok(moved + taken?)
    }

    /// Uses the heads of frames that are done.
    pub fn reap(&mut self, xsk: &mut XskSocket, flight: &mut TxInFlight) -> Result<u32, UnknownAnswer> {
        flight.reap(xsk, |head| self.vring.queue.push_used(head, 0))
    }

    fn send(&mut self, xsk: &mut XskSocket, flight: &mut TxInFlight, counts: &mut Counts) -> Result<u32, QueueFault> {
        if !self.vring.runs() {
            return Ok(0);
        }
        let available = u32::from(self.vring.queue.available()?).min(BURST);
        for taken in 0..available {
            self.chain.clear();
            let head = self.vring.queue.take(Direction::DeviceReads, &mut self.chain)?;
            if !self.send_chain(head.head, xsk, flight, counts) {
                self.vring.queue.untake(head);
                return Ok(taken);
            }
        }
        Ok(available)
    }

    /// Sends, copies or drops the frame in `self.chain`. Returns false, having done nothing, if there is no room.
    #[inline]
    fn send_chain(&mut self, head: u16, xsk: &mut XskSocket, flight: &mut TxInFlight, counts: &mut Counts) -> bool {
        let mut pieces = strip_header(&mut self.chain, self.vring.header_len);
        let len = pieces.iter().fold(0u32, |sum, piece| sum.saturating_add(piece.len));
        if len > PIECE_BYTES_MAX && len <= xsk.rules.tx_frame_max {
            cut(pieces, &mut self.cut);
            pieces = &self.cut;
        }
        match judge(&self.vring, pieces, len, xsk, flight) {
            Verdict::Drop(reason) => {
                counts.dropped(reason);
                self.vring.queue.push_used(head, 0);
            }
            Verdict::Direct => {
                if !flight.has_room(xsk, pieces.len()) {
                    return false;
                }
                flight.send(xsk, pieces, head);
                counts.direct(len);
            }
            Verdict::Bounce(reason) => {
                let padded = len.max(xsk.rules.tx_frame_min);
                let frames = padded.div_ceil(PIECE_BYTES_MAX) as usize;
                if !flight.has_room(xsk, frames) || flight.slab.available() < frames {
                    return false;
                }
                let memory = self.vring.queue.memory();
                take_frames(&mut flight.slab, padded, &mut self.copy);
                gather(memory, pieces, &self.copy, counts);
                // Padding is for the shortest frames: those have one piece.
                memory.zero(self.copy[0].addr.plus(u64::from(len)), padded - len);
                flight.send_copy(xsk, &self.copy);
                counts.bounced(len, reason);
                self.vring.queue.push_used(head, 0);
            }
        }
        true
    }
}

/// Answers of sendto that need no attention: work is left over (budget or send buffer), a frame was dropped by the
/// device's queue and completed, or memory is short for a moment.
pub(super) fn is_passing(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR)
}

/// Cuts the virtio-net header off; returns the pieces that hold the frame.
#[inline]
pub(super) fn strip_header(chain: &mut [Segment], header_len: u32) -> &[Segment] {
    let mut left = header_len;
    let mut first = 0;
    for piece in chain.iter_mut() {
        if piece.len > left {
            piece.addr = piece.addr.plus(u64::from(left));
            piece.len -= left;
            break;
        }
        left -= piece.len;
        first += 1;
    }
    &chain[first..]
}

#[inline]
fn judge(vring: &Vring, pieces: &[Segment], len: u32, xsk: &XskSocket, flight: &TxInFlight) -> Verdict {
    let rules = &xsk.rules;
    let scattered = |piece: &Segment| {
        let queue = &vring.queue;
        !rules.is_contiguous(queue.memory(), piece.addr, u64::from(piece.len), piece.addr, queue.region_hint())
    };
    if !vring.enabled {
        Verdict::Drop(DropReason::Disabled)
    } else if len < ETHERNET_HEADER_BYTES {
        Verdict::Drop(DropReason::Runt)
    } else if len > rules.tx_frame_max {
        Verdict::Drop(DropReason::Oversize)
    } else if !rules.direct {
        Verdict::Bounce(BounceReason::DriverUnproven)
    } else if pieces.iter().any(|piece| piece.addr >= xsk.umem_end) {
        Verdict::Bounce(BounceReason::Unregistered)
    } else if len < rules.tx_frame_min {
        Verdict::Bounce(BounceReason::ShortFrame)
    } else if pieces.len() > rules.tx_pieces_max {
        Verdict::Bounce(BounceReason::TooManyPieces)
    } else if pieces.iter().any(scattered) {
        Verdict::Bounce(BounceReason::NotContiguous)
    } else if pieces.iter().any(|piece| flight.is_ambiguous(piece)) {
        Verdict::Bounce(BounceReason::AddressAlias)
    } else {
        Verdict::Direct
    }
}

/// Cuts pieces to what one descriptor takes.
#[cold]
fn cut(pieces: &[Segment], into: &mut Vec<Segment>) {
    into.clear();
    for piece in pieces {
        let mut left = *piece;
        while left.len > 0 {
            let taken = left.take(PIECE_BYTES_MAX);
            into.push(taken);
        }
    }
}

/// Takes as many slab frames as `len` bytes need; there are so many.
fn take_frames(slab: &mut Slab, len: u32, into: &mut Vec<Segment>) {
    into.clear();
    let mut left = len;
    while left > 0
        && let Some(addr) = slab.take()
    {
        let len = left.min(PIECE_BYTES_MAX);
        into.push(Segment { addr, len });
        left -= len;
    }
}

/// Copies the pieces of a frame into slab frames.
fn gather(memory: &GuestMemory, pieces: &[Segment], frames: &[Segment], counts: &mut Counts) {
    let mut frames = frames.iter().copied();
    let mut to = Segment::default();
    for piece in pieces {
        let mut from = *piece;
        while from.len > 0 {
            if to.len == 0 {
                let Some(next) = frames.next() else { return };
                to = next;
            }
            let part = from.take(to.len);
            memory.copy(part.addr, to.take(part.len).addr, part.len);
            counts.copied_bytes += u64::from(part.len);
        }
    }
}

// The tx ring never holds more than the completion ring can answer.
const _: () = assert!(TX_RING_DESCS <= COMPLETION_RING_DESCS, "a completion has room for every descriptor");

#[cfg(test)]
mod tests;
