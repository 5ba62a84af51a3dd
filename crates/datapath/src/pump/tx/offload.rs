//! Frames of which the guest asks for a checksum, or that they be cut into segments: header-split.
//!
//! Headers are made in a slot of our slab, payload stays in the guest's memory and goes out as further descriptors. Where
//! it cannot, the segment is bounced.
//!
//! A large frame may be more than the rings have room for. It is held then, and the next burst goes on with it before
//! another chain is taken. Its head is used when the last of all its pieces is done. If the socket closes or the queue
//! stops first, the head goes back to the avail ring, and the frame is sent once more, from its start.

use super::{ETHERNET_HEADER_BYTES, LONG_PIECES_MAX, PIECE_BYTES_MAX, Tx, TxInFlight, gather, reason_to_bounce};
use crate::guest_memory::{GuestMemory, Segment};
use crate::offload::headers::{NET_HEADER_BYTES, NetHeader};
use crate::offload::segment::Segmenter;
use crate::stats::Counts;
use crate::virtqueue::{CHAIN_DESCS_MAX, Taken};
use crate::xsk::XskSocket;

/// The frame that is being cut, and what that takes. Made once.
#[derive(Debug)]
pub(super) struct Split {
    segmenter: Segmenter,
    /// While not all of its frame is in the tx ring.
    held: Option<Held>,
    /// Payload that is not sent yet begins here.
    payload: Position,
    pieces: Vec<Segment>,
}

/// The head of a frame that is being cut, and the record of what of it is in flight.
#[derive(Debug, Clone, Copy)]
struct Held {
    taken: Taken,
    sent: u16,
}

impl Split {
    pub fn new() -> Self {
        Self {
            segmenter: Segmenter::default(),
            held: None,
            payload: Position::default(),
            pieces: Vec::with_capacity(CHAIN_DESCS_MAX + LONG_PIECES_MAX),
        }
    }
}

impl Tx {
    /// Begins with the frame in `self.chain`. Returns the number of frames sent or dropped; `None` if nothing is asked for
    /// and it is to be sent as it is.
    #[inline(never)]
    pub(super) fn send_offloaded(
        &mut self,
        taken: Taken,
        budget: u32,
        xsk: &mut XskSocket,
        flight: &mut TxInFlight,
        counts: &mut Counts,
    ) -> Option<u32> {
        let memory = self.vring.queue.memory();
        let mut header = [0; NET_HEADER_BYTES];
        Position::default().read(&self.chain, memory, &mut header);
        let header = NetHeader::parse(header);
        let mut frame = Position::default();
        frame.skip(&self.chain, self.vring.header_len);
        let len = frame.bytes_behind(&self.chain);
        if header.asks_for_nothing() || !self.vring.enabled || len < ETHERNET_HEADER_BYTES {
            return None;
        }
        let (segmenter, frame_max) = (&mut self.split.segmenter, xsk.rules.tx_frame_max);
        let read = |beginning: &mut [u8]| frame.read(&self.chain, memory, beginning);
        if let Err(reason) = segmenter.begin(self.vring.offloads, &header, len, frame_max, read) {
            counts.dropped(reason);
            self.vring.queue.push_used(taken.head, 0);
            return Some(1);
        }
        frame.skip(&self.chain, segmenter.headers());
        self.split.payload = frame;
        self.split.held = Some(Held { taken, sent: flight.hold(taken.head) });
        Some(self.go_on(budget, xsk, flight, counts))
    }

    /// Sends more of the frame that is held, up to `budget` segments. Returns their number.
    pub(super) fn go_on(
        &mut self,
        budget: u32,
        xsk: &mut XskSocket,
        flight: &mut TxInFlight,
        counts: &mut Counts,
    ) -> u32 {
        let mut sent = 0;
        while let Some(held) = self.split.held
            && sent < budget
            && self.send_segment(held.sent, xsk, flight, counts)
        {
            sent += 1;
            if self.split.segmenter.is_done() {
                self.split.held = None;
                counts.offloaded(self.split.segmenter.offload());
                if let Some(head) = flight.let_go(held.sent) {
                    self.vring.queue.push_used(head, 0);
                }
            }
        }
        sent
    }

    /// Sends the next segment of the held frame. Returns false, having done nothing, if there is no room.
    fn send_segment(&mut self, held: u16, xsk: &mut XskSocket, flight: &mut TxInFlight, counts: &mut Counts) -> bool {
        let Split { segmenter, payload: position, pieces, .. } = &mut self.split;
        let headers = segmenter.headers();
        let len = headers + segmenter.next_payload();
        let mut behind = *position;
        pieces.clear();
        behind.take(&self.chain, segmenter.next_payload(), pieces);
        let memory = self.vring.queue.memory();
        match reason_to_bounce(&self.vring, pieces, 1, len, xsk, flight) {
            None => {
                if !flight.has_room(xsk, 1 + pieces.len()) {
                    return false;
                }
                let Some(slot) = flight.headers.take() else { return false };
                memory
                    .write(slot, segmenter.make(|sum| pieces.iter().for_each(|&piece| sum.add_memory(memory, piece))));
                flight.send_split(xsk, Segment { addr: slot, len: headers }, pieces, held);
                counts.header_split(len, headers);
            }
            Some(reason) => {
                if !flight.take_copy(xsk, memory, len, &mut self.copy) {
                    return false;
                }
                let mut room = self.copy[0];
                let front = room.take(headers);
                let payload = || std::iter::once(room).chain(self.copy[1..].iter().copied());
                gather(memory, pieces, payload(), counts);
                // The sum is that of the copy: whatever the guest does meanwhile, it fits what is sent.
                memory
                    .write(front.addr, segmenter.make(|sum| payload().for_each(|piece| sum.add_memory(memory, piece))));
                counts.copied_bytes += u64::from(headers);
                flight.send_copy(xsk, &self.copy);
                counts.bounced(len, reason);
            }
        }
        *position = behind;
        true
    }

    /// Whether a frame is held.
    #[inline]
    pub fn holds(&self) -> bool {
        self.split.held.is_some()
    }

    /// Sends what there is room for of a frame that is held, if one is.
    pub fn finish(&mut self, xsk: &mut XskSocket, flight: &mut TxInFlight, counts: &mut Counts) {
        self.go_on(u32::MAX, xsk, flight, counts);
        xsk.tx_submit();
    }

    /// The queue stops, or its socket is closed: the head of a held frame goes back to the avail ring.
    pub fn withdraw(&mut self, flight: &mut TxInFlight) {
        if let Some(held) = self.split.held.take() {
            flight.disown(held.sent);
            self.vring.queue.untake(held.taken);
        }
    }
}

/// A place in a chain.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    piece: usize,
    offset: u32,
}

impl Position {
    /// Goes on by up to `bytes`, and calls `part` with each part of a piece that lies there.
    fn walk(&mut self, chain: &[Segment], mut bytes: u32, mut part: impl FnMut(Segment)) {
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

    fn skip(&mut self, chain: &[Segment], bytes: u32) {
        self.walk(chain, bytes, |_| {});
    }

    /// Appends what lies in the next `bytes` to `pieces`, cut to what a descriptor takes.
    fn take(&mut self, chain: &[Segment], bytes: u32, pieces: &mut Vec<Segment>) {
        self.walk(chain, bytes, |mut part| {
            while part.len > 0 {
                pieces.push(part.take(PIECE_BYTES_MAX));
            }
        });
    }

    /// Copies what lies here; what the chain does not hold stays as it is.
    fn read(mut self, chain: &[Segment], memory: &GuestMemory, into: &mut [u8]) {
        let mut done = 0;
        self.walk(chain, into.len() as u32, |part| {
            let end = done + part.len as usize;
            memory.read_bytes(part.addr, &mut into[done..end]);
            done = end;
        });
    }

    fn bytes_behind(self, chain: &[Segment]) -> u32 {
        let pieces = chain.get(self.piece..).unwrap_or_default();
        pieces.iter().fold(0u32, |sum, piece| sum.saturating_add(piece.len)).saturating_sub(self.offset)
    }
}
