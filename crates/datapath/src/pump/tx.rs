//! tx: from the guest to the AF_XDP tx ring.
//!
//! **Direct**: the pieces of the guest's chain, less its virtio-net header, become tx descriptors; the head is used when
//! the completion ring has named every piece. **Bounce**: a frame that cannot be sent so is copied into slab frames, and its
//! head is used at once. **Header-split** ([`offload`]): its headers are made in a slab frame, its payload stays where it is.
//!
//! Invariant: no descriptor is submitted that the kernel would refuse, for such a one may never complete.

mod offload;

use std::ops::Range;

use self::offload::Split;
use super::inflight::InFlight;
use super::slab::Slab;
use super::source_lock::SourceLock;
use super::vring::Vring;
use crate::error::{BurstError, QueueFault, UnknownAnswer};
use crate::guest_memory::{GuestMemory, Segment, UmemAddr};
use crate::offload::headers::{self, asks_for_nothing};
use crate::stats::{BounceReason, Counts, DropReason};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction, Taken};
use crate::xsk::{
    BindMode, CHUNK_BYTES, COMPLETION_RING_DESCS, DriverRules, LONG_FRAME_BYTES_MAX, TX_RING_DESCS, XskSocket,
};

/// Frames handled before the other direction gets its turn.
const BURST: u32 = 64;
/// The shortest frame that has addresses.
const ETHERNET_HEADER_BYTES: u32 = headers::ETHERNET_HEADER_BYTES as u32;

/// Longest piece that one descriptor takes (`net/xdp/xsk_queue.h`: xp_unaligned_validate_desc).
const PIECE_BYTES_MAX: u32 = CHUNK_BYTES as u32;
/// Descriptors that the longest frame takes where it is copied; so many more pieces may one have by being cut.
const LONG_PIECES_MAX: usize = LONG_FRAME_BYTES_MAX.div_ceil(PIECE_BYTES_MAX) as usize;

/// Who has the memory of a piece.
#[derive(Debug, Clone, Copy)]
enum Owner {
    /// A frame of the guest's that is this piece alone: its head.
    Head(u16),
    /// A frame of the guest's with more pieces: its record.
    Record(u16),
    /// Us: the piece is a slab frame.
    Slab,
}

/// A frame of several pieces.
#[derive(Debug, Clone, Copy)]
struct Record {
    /// `None` if it is back in the avail ring.
    head: Option<u16>,
    pieces_left: u16,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    addr: UmemAddr,
    len: u32,
    owner: Owner,
}

impl Default for Piece {
    fn default() -> Self {
        Self { addr: UmemAddr(0), len: 0, owner: Owner::Slab }
    }
}

/// Frames in the kernel's hands: as long as a socket lives, whatever becomes of the virtqueue.
#[derive(Debug)]
pub(super) struct TxInFlight {
    pieces: InFlight<Piece, { 4 * COMPLETION_RING_DESCS as usize }>,
    records: Vec<Record>,
    free_records: Vec<u16>,
    slab: Slab,
    headers: Slab,
    /// Copy mode clears bit 0 of completed addresses (net/xdp/xsk.c keeps `address | 1` in the skb).
    key_mask: u64,
}

impl TxInFlight {
    /// Nothing, and the slabs of queue pair `pair`.
    pub fn new(pair: usize) -> Self {
        let capacity = COMPLETION_RING_DESCS as usize;
        // One more for a frame that is held, for nothing of it needs to be in flight.
        let records = capacity + 1;
        Self {
            pieces: InFlight::new(),
            records: vec![Record { head: None, pieces_left: 0 }; records],
            free_records: (0..records as u16).rev().collect(),
            slab: Slab::new(pair, 1),
            headers: Slab::of_headers(pair),
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

    /// Number of our frames that are in flight.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn used_slab_frames(&self) -> usize {
        self.slab.used() + self.headers.used()
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
        let owner = match pieces.len() {
            1 => Owner::Head(head),
            several => Owner::Record(self.record(head, several)),
        };
        for (index, piece) in pieces.iter().enumerate() {
            self.write(xsk, piece, owner, index + 1 < pieces.len());
        }
    }

    /// Sends a frame in one piece, if it is certain that nothing in flight can be taken for it. There is room in the tx ring.
    #[inline]
    fn send_alone(&mut self, xsk: &mut XskSocket, frame: Segment, head: u16) -> bool {
        let piece = Piece { addr: frame.addr, len: frame.len, owner: Owner::Head(head) };
        let is_alone = self.pieces.insert_alone(self.key(frame.addr), piece);
        if is_alone {
            xsk.tx_write(frame.addr, frame.len, false);
        }
        is_alone
    }

    /// Takes as many slab frames as a copy of `len` bytes needs, padded to what the driver takes. Returns false if there is
    /// no room for them.
    #[inline]
    fn take_copy(&mut self, xsk: &mut XskSocket, memory: &GuestMemory, len: u32, into: &mut Vec<Segment>) -> bool {
        let padded = len.max(xsk.rules.tx_frame_min);
        let frames = padded.div_ceil(PIECE_BYTES_MAX) as usize;
        if !self.has_room(xsk, frames) || self.slab.available() < frames {
            return false;
        }
        take_frames(&mut self.slab, padded, into);
        // Padding is for the shortest frames: those have one piece.
        memory.zero(into[0].addr.plus(u64::from(len)), padded - len);
        true
    }

    /// Writes those of a packet in slab frames, of which each goes back by itself; room was checked.
    #[inline]
    fn send_copy(&mut self, xsk: &mut XskSocket, frames: &[Segment]) {
        for (index, frame) in frames.iter().enumerate() {
            self.write(xsk, frame, Owner::Slab, index + 1 < frames.len());
        }
    }

    /// Writes a packet of headers of ours and of payload of a frame that is held; room was checked.
    fn send_split(&mut self, xsk: &mut XskSocket, headers: Segment, payload: &[Segment], held: u16) {
        self.write(xsk, &headers, Owner::Slab, !payload.is_empty());
        self.records[usize::from(held)].pieces_left += payload.len() as u16;
        for (index, piece) in payload.iter().enumerate() {
            self.write(xsk, piece, Owner::Record(held), index + 1 < payload.len());
        }
    }

    /// Holds a head: more of its frame may be sent than is in flight.
    fn hold(&mut self, head: u16) -> u16 {
        self.record(head, 1)
    }

    /// All of a held frame was sent. Returns its head if nothing of it is in flight.
    fn let_go(&mut self, held: u16) -> Option<u16> {
        self.done(held)
    }

    /// No more of a held frame is sent, and its head is not to be used.
    fn disown(&mut self, held: u16) {
        self.records[usize::from(held)].head = None;
        self.done(held);
    }

    fn record(&mut self, head: u16, pieces: usize) -> u16 {
        let Some(index) = self.free_records.pop() else {
            unreachable!("there is a record for each completion and one more, and only a held one has no piece");
        };
        self.records[usize::from(index)] = Record { head: Some(head), pieces_left: pieces as u16 };
        index
    }

    #[inline]
    fn write(&mut self, xsk: &mut XskSocket, piece: &Segment, owner: Owner, more: bool) {
        self.pieces.insert(self.key(piece.addr), Piece { addr: piece.addr, len: piece.len, owner });
        xsk.tx_write(piece.addr, piece.len, more);
    }

    /// A piece of a recorded frame is done, or a hold ended; the head that is to be used, if it was the last.
    fn done(&mut self, index: u16) -> Option<u16> {
        let record = &mut self.records[usize::from(index)];
        record.pieces_left -= 1;
        if record.pieces_left > 0 {
            return None;
        }
        self.free_records.push(index);
        record.head
    }

    #[inline]
    fn give_back(&mut self, frame: UmemAddr) -> Result<(), UnknownAnswer> {
        let slab = if self.headers.holds(frame) { &mut self.headers } else { &mut self.slab };
        slab.give_back(frame)
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
            match piece.owner {
                Owner::Head(head) => used(head),
                Owner::Record(index) => self.done(index).into_iter().for_each(&mut used),
                Owner::Slab => self.give_back(piece.addr)?,
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

    /// The socket is closed: what it had is gone. `used` gets each guest head; its frame may or may not have left. No
    /// frame is held.
    pub fn abandon(&mut self, mut used: impl FnMut(u16)) {
        let mut open = Vec::new();
        for piece in self.pieces.values() {
            match piece.owner {
                Owner::Head(head) => used(head),
                Owner::Record(index) => open.push(index),
                Owner::Slab => {}
            }
        }
        open.sort_unstable();
        open.dedup();
        for index in open {
            self.records[usize::from(index)].head.into_iter().for_each(&mut used);
            self.free_records.push(index);
        }
        self.pieces.clear();
        self.slab.reset();
        self.headers.reset();
    }
}

/// The tx side of a queue pair.
#[derive(Debug)]
pub(super) struct Tx {
    pub vring: Vring,
    lock: SourceLock,
    /// The chain at work: that of the frame that is held, while one is.
    chain: Vec<Segment>,
    /// The pieces of a long frame, cut to what descriptors take.
    cut: Vec<Segment>,
    /// Where a frame is copied to.
    copy: Vec<Segment>,
    split: Split,
    /// Why the kernel does not send at the moment, if it does not.
    pub wakeup_errno: Option<i32>,
}

impl Tx {
    pub fn new(vring: Vring, lock: SourceLock) -> Self {
        Self {
            vring,
            lock,
            chain: Vec::with_capacity(CHAIN_DESCS_MAX),
            cut: Vec::with_capacity(CHAIN_DESCS_MAX + LONG_PIECES_MAX),
            copy: Vec::with_capacity(LONG_PIECES_MAX),
            split: Split::new(),
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

    /// Drops what the guest has to send, for it cannot leave. Returns the number of heads used.
    ///
    /// # Errors
    /// The driver broke the ring protocol; what was taken before is used.
    pub fn discard(&mut self, counts: &mut Counts) -> Result<u32, QueueFault> {
        let dropped = self.drop_burst(counts);
        self.vring.flush();
        dropped
    }

    fn drop_burst(&mut self, counts: &mut Counts) -> Result<u32, QueueFault> {
        let mut dropped = 0;
        for _ in 0..u32::from(self.vring.queue.available()?).min(BURST) {
            self.chain.clear();
            let Some(taken) = self.vring.queue.take(Direction::DeviceReads, &mut self.chain)? else { break };
            counts.dropped(if self.vring.enabled { DropReason::NoLink } else { DropReason::Disabled });
            self.vring.queue.push_used(taken.head, 0);
            dropped += 1;
        }
        Ok(dropped)
    }

    /// Returns the number of frames sent or dropped.
    fn send(&mut self, xsk: &mut XskSocket, flight: &mut TxInFlight, counts: &mut Counts) -> Result<u32, QueueFault> {
        if !self.vring.runs() {
            return Ok(0);
        }
        let mut sent = 0;
        if self.holds() {
            sent = self.go_on(BURST, xsk, flight, counts);
        }
        let available = self.vring.queue.available()?;
        let plain = self.plain_lengths(&xsk.rules);
        for _ in 0..available {
            if sent >= BURST || self.holds() {
                break;
            }
            let taken = match self.vring.queue.take_single(Direction::DeviceReads)? {
                Some((taken, buffer)) => {
                    if self.send_plain(taken.head, buffer, &plain, xsk, flight) {
                        counts.direct(buffer.len - self.vring.header_len);
                        sent += 1;
                        continue;
                    }
                    self.chain.clear();
                    self.chain.push(buffer);
                    taken
                }
                None => {
                    self.chain.clear();
                    let Some(taken) = self.vring.queue.take(Direction::DeviceReads, &mut self.chain)? else { break };
                    taken
                }
            };
            let Some(frames) = self.send_chain(taken, BURST - sent, xsk, flight, counts) else {
                self.vring.queue.untake(taken);
                break;
            };
            sent += frames;
        }
        Ok(sent)
    }

    /// Lengths, header included, that a buffer in one piece has to have for its frame to go out as it is.
    fn plain_lengths(&self, rules: &DriverRules) -> Range<u32> {
        // The first frame goes the other way, where it is looked at: a question less for each of the others.
        let is_looked_at = !self.lock.is_open() || self.vring.source.is_none();
        if is_looked_at || !self.vring.enabled || !rules.direct || rules.tx_pieces_max == 0 {
            return 0..0;
        }
        let (shortest, longest) =
            (rules.tx_frame_min.max(ETHERNET_HEADER_BYTES), rules.tx_frame_max.min(PIECE_BYTES_MAX));
        self.vring.header_len + shortest..self.vring.header_len + longest + 1
    }

    /// Sends a frame in one piece of which nothing is asked. Returns false, having done nothing, if it is not certain to be
    /// one: [`send_chain`](Self::send_chain) knows more.
    #[inline]
    fn send_plain(
        &self,
        head: u16,
        buffer: Segment,
        lengths: &Range<u32>,
        xsk: &mut XskSocket,
        flight: &mut TxInFlight,
    ) -> bool {
        let (queue, header_len) = (&self.vring.queue, self.vring.header_len);
        if !lengths.contains(&buffer.len) {
            return false;
        }
        let frame = Segment { addr: buffer.addr.plus(u64::from(header_len)), len: buffer.len - header_len };
        let memory = queue.memory();
        frame.addr < xsk.umem_end
            && (self.vring.offloads.is_none() || asks_for_nothing(memory.read(buffer.addr)))
            && xsk.rules.is_contiguous(memory, frame.addr, u64::from(frame.len), frame.addr, queue.region_hint())
            && xsk.tx_free(1) > 0
            && flight.send_alone(xsk, frame, head)
    }

    /// Sends, copies or drops the frame in `self.chain`, or up to `budget` of the frames that it is cut into. Returns how
    /// many; `None`, having done nothing, if there is no room.
    #[inline]
    fn send_chain(
        &mut self,
        taken: Taken,
        budget: u32,
        xsk: &mut XskSocket,
        flight: &mut TxInFlight,
        counts: &mut Counts,
    ) -> Option<u32> {
        self.vring.learn_source(&self.chain);
        if (!self.vring.offloads.is_none() || !self.lock.is_open())
            && let Some(frames) = self.send_offloaded(taken, budget, xsk, flight, counts)
        {
            return Some(frames);
        }
        let mut pieces = strip_header(&mut self.chain, self.vring.header_len);
        let len = pieces.iter().fold(0u32, |sum, piece| sum.saturating_add(piece.len));
        if let Some(reason) = reason_to_drop(&self.vring, len, xsk.rules.tx_frame_max) {
            counts.dropped(reason);
            self.vring.queue.push_used(taken.head, 0);
            return Some(1);
        }
        if len > PIECE_BYTES_MAX {
            cut(pieces, &mut self.cut);
            pieces = &self.cut;
        }
        let Some(reason) = reason_to_bounce(&self.vring, pieces, 0, len, xsk, flight) else {
            if !flight.has_room(xsk, pieces.len()) {
                return None;
            }
            flight.send(xsk, pieces, taken.head);
            counts.direct(len);
            return Some(1);
        };
        let memory = self.vring.queue.memory();
        if !flight.take_copy(xsk, memory, len, &mut self.copy) {
            return None;
        }
        gather(memory, pieces, self.copy.iter().copied(), counts);
        flight.send_copy(xsk, &self.copy);
        counts.bounced(len, reason);
        self.vring.queue.push_used(taken.head, 0);
        Some(1)
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
fn reason_to_drop(vring: &Vring, len: u32, frame_max: u32) -> Option<DropReason> {
    if !vring.enabled {
        Some(DropReason::Disabled)
    } else if len < ETHERNET_HEADER_BYTES {
        Some(DropReason::Runt)
    } else if len > frame_max {
        Some(DropReason::Oversize)
    } else {
        None
    }
}

/// Why a frame of `len` bytes cannot go out as these pieces, behind `headers` pieces of ours, if it cannot.
#[inline]
fn reason_to_bounce(
    vring: &Vring,
    pieces: &[Segment],
    headers: usize,
    len: u32,
    xsk: &XskSocket,
    flight: &TxInFlight,
) -> Option<BounceReason> {
    let rules = &xsk.rules;
    let scattered = |piece: &Segment| {
        let queue = &vring.queue;
        !rules.is_contiguous(queue.memory(), piece.addr, u64::from(piece.len), piece.addr, queue.region_hint())
    };
    if !rules.direct {
        Some(BounceReason::DriverUnproven)
    } else if pieces.iter().any(|piece| piece.addr >= xsk.umem_end) {
        Some(BounceReason::Unregistered)
    } else if len < rules.tx_frame_min {
        Some(BounceReason::ShortFrame)
    } else if headers + pieces.len() > rules.tx_pieces_max {
        Some(BounceReason::TooManyPieces)
    } else if pieces.iter().any(scattered) {
        Some(BounceReason::NotContiguous)
    } else if pieces.iter().any(|piece| flight.is_ambiguous(piece)) {
        Some(BounceReason::AddressAlias)
    } else {
        None
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
#[inline]
fn gather(memory: &GuestMemory, pieces: &[Segment], mut frames: impl Iterator<Item = Segment>, counts: &mut Counts) {
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
