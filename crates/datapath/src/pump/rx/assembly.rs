//! rx of packets that take several buffers: frames that arrive in several pieces (XDP_USE_SG), and frames of a flow that are
//! merged. Each piece is where a frame of its own would be.
//!
//! The first is in place, behind its buffer's virtio-net header. The others are not: in further buffers of a packet there
//! is no header, and all buffers but the last are full (VIRTIO 1.3 §5.1.6.4). So their bytes move forward, each once, to
//! the end of the buffer before and the start of their own. Buffers that are not needed then are posted again.
//!
//! Invariant: a byte is moved before anything is written over it. Pieces are taken in their order, each buffer holds
//! more than the piece that came with it, so what is written to a buffer is never further back in the packet than what
//! lies there still.

use super::{BURST, Posted, Rx, header_of};
use crate::error::UnknownAnswer;
use crate::guest_memory::{GuestMemory, Segment, UmemAddr};
use crate::offload::gro::{Fate, Gro, Merging};
use crate::offload::headers::NET_HEADER_BYTES;
use crate::pump::slab::Slab;
use crate::stats::{BounceReason, Counts, DropReason, Offload};
use crate::xsk::{RX_RING_DESCS, RxDesc, XskSocket};

/// After so many bursts of which nothing was merged, one in as many is looked at: where nothing is to be had, nothing is
/// spent, and a stream that begins is found soon.
const PATIENCE_BURSTS: u32 = 16;

/// The frames of a burst, and the packet of them that is being delivered. Made once for each queue.
#[derive(Debug, Default)]
pub(super) struct Burst {
    descs: Vec<RxDesc>,
    /// Where the bytes of each are.
    pieces: Vec<Segment>,
    /// Pieces of each frame: the first, and the first of the next frame.
    frames: Vec<(usize, usize)>,
    gro: Option<Gro>,
    /// Bursts of several frames since something was merged.
    unmerged: u32,
    /// Of the packet, in order: fill entries, each with the guest's buffer that it is; none in the slab.
    homes: Vec<(UmemAddr, Option<Posted>)>,
    /// What the guest gets of it.
    bytes: Vec<Segment>,
    /// Length of each frame that it was.
    frame_bytes: Vec<u32>,
}

impl Burst {
    pub fn new(merging: Merging) -> Self {
        // The last frame may have as many pieces as there are descriptors.
        let capacity = (BURST + RX_RING_DESCS) as usize;
        Self {
            descs: Vec::with_capacity(capacity),
            pieces: Vec::with_capacity(capacity),
            frames: Vec::with_capacity(BURST as usize),
            gro: (!merging.is_none()).then(|| Gro::new(merging, BURST as usize)),
            unmerged: 0,
            homes: Vec::with_capacity(capacity),
            bytes: Vec::with_capacity(capacity),
            frame_bytes: Vec::with_capacity(BURST as usize),
        }
    }

    /// Whether frames are merged.
    pub fn merges(&self) -> bool {
        self.gro.is_some()
    }

    /// Reads whole frames off the rx ring, up to a burst of descriptors or a little more. Returns their number.
    fn read(&mut self, xsk: &mut XskSocket) -> u32 {
        self.descs.clear();
        self.pieces.clear();
        self.frames.clear();
        let present = xsk.rx_peek() as usize;
        while self.descs.len() < present.min(BURST as usize) {
            let first = self.descs.len();
            let mut more = true;
            // The kernel shows all of a frame at once.
            while more && self.descs.len() < present {
                let desc = xsk.rx_read();
                self.descs.push(desc);
                self.pieces.push(Segment { addr: desc.frame, len: desc.len });
                more = desc.more;
            }
            self.frames.push((first, self.descs.len()));
        }
        self.descs.len() as u32
    }

    /// Decides which frames make one packet. Those of more than `frame_max` bytes are left alone, and those with a piece
    /// that is not sure.
    fn plan(&mut self, memory: &GuestMemory, frame_max: u32, is_sure: impl Fn(&RxDesc) -> bool) {
        let Some(gro) = &mut self.gro else { return };
        gro.begin();
        if self.frames.len() < 2 {
            return;
        }
        self.unmerged = self.unmerged.wrapping_add(1);
        if self.unmerged > PATIENCE_BURSTS && !self.unmerged.is_multiple_of(PATIENCE_BURSTS) {
            return;
        }
        for &(first, end) in &self.frames {
            if self.descs[first..end].iter().all(&is_sure) && len_bytes(&self.pieces[first..end]) <= frame_max {
                gro.add(memory, &self.pieces[..end], first);
            } else {
                gro.add_unknown();
            }
        }
        if gro.has_merged() {
            self.unmerged = 0;
        }
    }
}

fn len_bytes(pieces: &[Segment]) -> u32 {
    pieces.iter().map(|piece| piece.len).sum()
}

impl Rx {
    /// Reads a burst and delivers it. Returns the number of descriptors, and whether the kernel answered only what it was
    /// asked.
    #[inline(never)]
    pub(super) fn receive_packets(
        &mut self,
        xsk: &mut XskSocket,
        slab: &mut Slab,
        counts: &mut Counts,
    ) -> (u32, Result<(), UnknownAnswer>) {
        // Taken out meanwhile: nothing is allocated for what stands in for it.
        let mut burst = std::mem::take(&mut self.burst);
        let read = burst.read(xsk);
        burst.plan(self.vring.queue.memory(), xsk.frame_max, |desc| self.is_sure(desc, xsk, slab));
        let mut frames = 0..burst.frames.len();
        let delivered = frames.try_for_each(|frame| self.deliver_frame(frame, &mut burst, xsk, slab, counts));
        self.burst = burst;
        (read, delivered)
    }

    /// Whether a piece is where it was asked for, and will be delivered: frames in a driver's reserve find perhaps no head.
    fn is_sure(&self, desc: &RxDesc, xsk: &XskSocket, slab: &Slab) -> bool {
        let has_head = match slab.owns(desc.fill) {
            true => xsk.rules.rx_buffers_min == 0,
            false => self.posted.get(desc.fill).is_some(),
        };
        let is_in_place = desc.frame == desc.fill.plus(xsk.layout.frame_offset()) && desc.len <= xsk.layout.frame_max;
        has_head && is_in_place
    }

    fn deliver_frame(
        &mut self,
        frame: usize,
        burst: &mut Burst,
        xsk: &mut XskSocket,
        slab: &mut Slab,
        counts: &mut Counts,
    ) -> Result<(), UnknownAnswer> {
        let (first, end) = burst.frames[frame];
        let large = match burst.gro.as_ref().map_or(Fate::Alone, |gro| gro.fate(frame)) {
            Fate::Merged => return Ok(()),
            Fate::Alone if end - first == 1 => return self.deliver(burst.descs[first], xsk, slab, counts),
            Fate::Alone => None,
            Fate::First => burst.gro.as_ref().and_then(|gro| gro.large(frame)),
        };
        self.collect(frame, large.is_some(), burst, slab)?;
        match self.heads_for_packet(burst, xsk) {
            Ok(heads) => {
                let reason = if large.is_some() { BounceReason::Merged } else { self.reason_to_assemble(burst) };
                burst.frame_bytes.iter().for_each(|&bytes| counts.bounced(bytes, reason));
                if let Some(large) = &large {
                    counts.offloaded(Offload::Gro);
                    self.vring.queue.memory().write(burst.bytes[0].addr, large.headers());
                }
                let net_header = large.map_or([0; NET_HEADER_BYTES], |large| large.net_header);
                self.assemble(&header_of(net_header, heads), burst, xsk, counts);
            }
            Err(reason) => {
                burst.frame_bytes.iter().for_each(|_| counts.dropped(reason));
                self.post_homes_again(&burst.homes, xsk);
            }
        }
        Ok(())
    }

    /// Takes the buffers of a frame, or of all frames of the packet that it begins, out of the kernel's hands. Slab frames
    /// are free at once: nothing is posted before the packet is delivered.
    fn collect(
        &mut self,
        frame: usize,
        is_large: bool,
        burst: &mut Burst,
        slab: &mut Slab,
    ) -> Result<(), UnknownAnswer> {
        let Burst { descs, pieces, frames, gro, homes, bytes, frame_bytes, unmerged: _ } = burst;
        homes.clear();
        bytes.clear();
        frame_bytes.clear();
        let merged = gro.iter().filter(|_| is_large).flat_map(|gro| gro.packet(frame));
        let alone = (!is_large).then_some((frames[frame], 0));
        for ((first, end), headers) in merged.chain(alone) {
            frame_bytes.push(len_bytes(&pieces[first..end]));
            let mut skip = if bytes.is_empty() { 0 } else { headers as u32 };
            for (desc, piece) in descs[first..end].iter().zip(&pieces[first..end]) {
                let home = self.take_home(desc.fill, slab).inspect_err(|_| {
                    // Nothing comes of this socket any more; heads go back when it is closed.
                    for &(entry, home) in &*homes {
                        home.inspect(|posted| self.posted.insert(entry, *posted));
                    }
                })?;
                homes.push((desc.fill, home));
                let mut payload = *piece;
                skip -= payload.take(skip).len;
                if payload.len > 0 {
                    bytes.push(payload);
                }
            }
        }
        Ok(())
    }

    fn take_home(&mut self, entry: UmemAddr, slab: &mut Slab) -> Result<Option<Posted>, UnknownAnswer> {
        if slab.owns(entry) {
            return slab.give_back(entry).map(|()| None);
        }
        self.posted.remove(entry).ok_or(UnknownAnswer(entry)).map(Some)
    }

    /// What the waiting heads of each slab frame hold together, or more.
    fn group_bytes(&self, xsk: &XskSocket) -> u64 {
        u64::from(self.vring.header_len + xsk.layout.frame_max)
    }

    /// A frame with a piece in the guest's memory was copied because it is long; else, why its heads waited.
    fn reason_to_assemble(&self, burst: &Burst) -> BounceReason {
        match self.waiting.front() {
            Some(waiting) if burst.homes.iter().all(|(_, home)| home.is_none()) => waiting.reason,
            _ => BounceReason::LongFrame,
        }
    }

    /// Number of heads that hold the packet, in the order of its pieces: a piece's own, or those that wait for it.
    fn heads_for_packet(&self, burst: &Burst, xsk: &XskSocket) -> Result<u16, DropReason> {
        let total = u64::from(self.vring.header_len + len_bytes(&burst.bytes));
        if !self.vring.enabled {
            return Err(DropReason::Disabled);
        }
        if burst.frame_bytes.iter().any(|&bytes| bytes > xsk.frame_max) {
            return Err(DropReason::Oversize);
        }
        if !self.vring.mergeable {
            return self.heads_for(total as u32).map(|heads| heads as u16);
        }
        let (mut room, mut heads) = (0, 0);
        let mut waiting = self.waiting.iter();
        for (_, home) in &burst.homes {
            let mut group = 0;
            while room < total && group < self.group_bytes(xsk) {
                let bytes = match home {
                    Some(posted) => posted.room,
                    None => waiting.next().ok_or(DropReason::NoBuffer)?.capacity_bytes,
                };
                (room, group, heads) = (room + u64::from(bytes), group + u64::from(bytes), heads + 1);
            }
        }
        if room < total { Err(DropReason::NoBuffer) } else { Ok(heads) }
    }

    /// Moves the packet to where it belongs, behind its virtio-net header, and uses its heads.
    fn assemble(&mut self, header: &[u8], burst: &Burst, xsk: &mut XskSocket, counts: &mut Counts) {
        let group_bytes = self.group_bytes(xsk);
        let mut left = Rest::new(&header[..self.vring.header_len as usize], burst.bytes.iter().copied());
        for (index, (entry, home)) in burst.homes.iter().enumerate() {
            if left.is_empty() {
                self.post_homes_again(&burst.homes[index..], xsk);
                break;
            }
            if let Some(posted) = home {
                let room = Segment { addr: posted.header, len: posted.room };
                let written = left.copy_into(self.vring.queue.memory(), room, counts);
                if self.vring.queue.is_logged() {
                    self.log_posted(*entry, posted.header);
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
    }

    /// Posts buffers once more of which the guest gets nothing now.
    fn post_homes_again(&mut self, homes: &[(UmemAddr, Option<Posted>)], xsk: &mut XskSocket) {
        for &(entry, home) in homes {
            if let Some(posted) = home {
                self.post_again(entry, posted, xsk);
            }
        }
    }
}

/// The part of a packet that is not in its place yet: header bytes of ours, then pieces of memory, none of them empty.
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
