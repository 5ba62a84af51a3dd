//! Frames of which the guest asks for a checksum, or that they be cut into segments, and all frames where their source is
//! checked ([`SourceLock`](crate::pump::SourceLock)): header-split.
//!
//! Headers are made in a slot of our slab, payload stays in the guest's memory and goes out as further descriptors. Where
//! it cannot, the segment is bounced.
//!
//! A large frame may be more than the rings have room for. It is held then, and the next burst goes on with it before
//! another chain is taken. Its head is used when the last of all its pieces is done. If the socket closes or the queue
//! stops first, the head goes back to the avail ring, and the frame is sent once more, from its start.

use super::{ETHERNET_HEADER_BYTES, LONG_PIECES_MAX, PIECE_BYTES_MAX, Tx, TxInFlight, gather, reason_to_bounce};
use crate::guest_memory::Segment;
use crate::offload::headers::{NET_HEADER_BYTES, NetHeader};
use crate::offload::segment::Segmenter;
use crate::pump::position::Position;
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
    /// Begins with the frame in `self.chain`. Returns the number of frames sent or dropped; `None` if nothing is to be made
    /// of it, and it is to be sent as it is.
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
        let header = Some(NetHeader::parse(header));
        let request = header.filter(|header| !self.vring.offloads.is_none() && !header.asks_for_nothing());
        let mut frame = Position::default();
        frame.skip(&self.chain, self.vring.header_len);
        let len = frame.bytes_behind(&self.chain);
        if request.is_none() && self.lock.is_open() || !self.vring.enabled || len < ETHERNET_HEADER_BYTES {
            return None;
        }
        let (segmenter, frame_max) = (&mut self.split.segmenter, xsk.rules.tx_frame_max);
        let read = |beginning: &mut [u8]| frame.read(&self.chain, memory, beginning);
        let begun = match &request {
            Some(request) => segmenter.begin(self.vring.offloads, request, len, frame_max, read),
            None => segmenter.begin_as_is(len, frame_max, read),
        };
        // What is checked is the segmenter's copy, which is what every segment begins with.
        if let Err(reason) = begun.and_then(|()| self.lock.check(segmenter.ethernet())) {
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
                if let Some(offload) = self.split.segmenter.offload() {
                    counts.offloaded(offload);
                }
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
        behind.take(&self.chain, segmenter.next_payload(), PIECE_BYTES_MAX, pieces);
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
