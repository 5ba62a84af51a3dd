//! rx: from the AF_XDP rx ring to the guest.
//!
//! **Direct**: the guest's own buffer is the fill entry. Its frame is in place when the rx descriptor appears; only the
//! virtio-net header is written, and the head is used. A buffer is posted directly only if nothing the kernel may
//! write can pass its end: it holds the header and the longest frame in one piece.
//!
//! **Bounce**: any other head waits; slab frames are posted in its stead, never more than the waiting heads can take,
//! so that a frame that arrives in the slab always finds its buffers. Only a driver that must not run out of buffers gets
//! more; what arrives there may be lost, as it would be without.
//!
//! A frame longer than the UMEM's frames arrives in several pieces, and frames of a flow may be merged: see [`assembly`].
//!
//! Invariant: a head is in exactly one place: `posted`, `waiting`, or used.

mod assembly;

use std::collections::VecDeque;

use self::assembly::{Burst, Rest};
use super::inflight::InFlight;
use super::slab::Slab;
use super::vring::{HEADER_BYTES_MAX, Vring};
use crate::error::{BurstError, QueueFault, UnknownAnswer};
use crate::guest_memory::{Segment, UmemAddr};
use crate::offload::headers::NET_HEADER_BYTES;
use crate::stats::{BounceReason, Counts, DropReason};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction, Taken};
use crate::xsk::{CHUNK_BYTES, DriverRules, RX_RING_DESCS, RxDesc, UmemLayout, XskSocket};

/// Frames handled before the other direction gets its turn.
const BURST: u32 = 64;
/// Heads taken before anybody else gets a turn: a guest can make each of them a long chain.
const REFILL_BURST: u16 = 256;
/// Segments of waiting heads that are remembered; a guest with longer chains has fewer heads waiting.
const WAITING_SEGMENTS_MAX: usize = 4 * RX_RING_DESCS as usize;

/// virtio_net_hdr_v1_hash with num_buffers = 1. No checksum or segmentation was negotiated and no hash is reported
/// (VIRTIO_NET_HASH_REPORT_NONE), so all else is 0.
const HEADER: [u8; HEADER_BYTES_MAX] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Its part without hash report: what most guests have.
const HEADER_12: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
pub(super) const NUM_BUFFERS: std::ops::Range<usize> = 10..12;

/// The header of a packet that is spread over `heads` buffers: `net_header` is all that is in front of their number.
fn header_of(net_header: [u8; NET_HEADER_BYTES], heads: u16) -> [u8; HEADER_BYTES_MAX] {
    let mut header = HEADER;
    header[..NET_HEADER_BYTES].copy_from_slice(&net_header);
    header[NUM_BUFFERS].copy_from_slice(&heads.to_le_bytes());
    header
}

/// A guest buffer in the fill ring.
#[derive(Debug, Clone, Copy, Default)]
struct Posted {
    position: u64,
    header: UmemAddr,
    /// Bytes from the header to the end of its piece of memory.
    room: u32,
    head: u16,
}

impl Posted {
    fn taken(&self) -> Taken {
        Taken { head: self.head, position: self.position }
    }
}

/// A head that a slab frame will be copied to.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    taken: Taken,
    segments: usize,
    capacity_bytes: u32,
    reason: BounceReason,
}

/// How a buffer can take a frame.
enum Fit {
    Direct {
        /// The piece that begins with the header.
        first: Segment,
        frame: UmemAddr,
    },
    Bounce(BounceReason),
    /// Not even the header fits.
    Useless,
}

/// The rx side of a queue pair.
#[derive(Debug)]
pub(super) struct Rx {
    pub vring: Vring,
    posted: InFlight<Posted, { 4 * RX_RING_DESCS as usize }>,
    /// Of the socket that the posted buffers were given to; it is closed when they are recalled.
    socket: Option<(UmemLayout, DriverRules)>,
    waiting: VecDeque<Waiting>,
    waiting_segments: VecDeque<Segment>,
    /// Smallest capacity among waiting heads, or less: it only shrinks while slab frames are posted.
    waiting_min_bytes: u32,
    chain: Vec<Segment>,
    /// Whether packets may take several buffers, of frames in several pieces or of several frames.
    assembles: bool,
    burst: Burst,
}

impl Rx {
    pub fn new(vring: Vring) -> Self {
        Self {
            burst: Burst::new(vring.merging),
            vring,
            posted: InFlight::new(),
            socket: None,
            waiting: VecDeque::with_capacity(RX_RING_DESCS as usize),
            waiting_segments: VecDeque::with_capacity(WAITING_SEGMENTS_MAX),
            waiting_min_bytes: u32::MAX,
            chain: Vec::with_capacity(CHAIN_DESCS_MAX),
            assembles: false,
        }
    }

    /// Whether buffers are in the kernel's hands; only closing the socket gives those back.
    pub fn kernel_has_buffers(&self) -> bool {
        self.posted.len() > 0
    }

    /// Hands received frames to the guest and fresh buffers to the kernel. Returns the number of frames and buffers
    /// moved, 0 if there is nothing to do.
    ///
    /// # Errors
    /// The driver broke the ring protocol, or the kernel answered what it was not asked; what was received before is
    /// delivered.
    pub fn burst(&mut self, xsk: &mut XskSocket, slab: &mut Slab, counts: &mut Counts) -> Result<u32, BurstError> {
        let (received, delivered) = if self.assembles {
            self.receive_packets(xsk, slab, counts)
        } else {
            let received = xsk.rx_peek().min(BURST);
            (received, (0..received).try_for_each(|_| self.deliver(xsk.rx_read(), xsk, slab, counts)))
        };
        if received > 0 {
            xsk.rx_release();
            self.vring.queue.publish_used();
        }
        if let Err(unknown) = delivered {
            self.vring.flush();
            return Err(unknown.into());
        }
        let refilled = self.refill(xsk, slab);
        xsk.fill_submit();
        xsk.rx_wakeup();
        self.vring.flush();
        Ok(received + refilled?)
    }

    /// A frame in one piece. There is a second caller, where frames may have more; the first one shall not pay for that.
    #[inline(always)]
    fn deliver(
        &mut self,
        desc: RxDesc,
        xsk: &mut XskSocket,
        slab: &mut Slab,
        counts: &mut Counts,
    ) -> Result<(), UnknownAnswer> {
        if slab.owns(desc.fill) {
            slab.give_back(desc.fill)?;
            self.deliver_copy(desc, counts);
        } else {
            let Some(posted) = self.posted.remove(desc.fill) else { return Err(UnknownAnswer(desc.fill)) };
            self.deliver_in_place(desc, posted, xsk, counts);
        }
        Ok(())
    }

    /// A frame that the kernel or the NIC put into a guest buffer.
    #[inline(always)]
    fn deliver_in_place(&mut self, desc: RxDesc, posted: Posted, xsk: &mut XskSocket, counts: &mut Counts) {
        if !self.vring.enabled {
            counts.dropped(DropReason::Disabled);
            self.post_again(desc.fill, posted, xsk);
            return;
        }
        let memory = self.vring.queue.memory();
        let expected = desc.fill.plus(xsk.layout.frame_offset());
        if desc.frame == expected {
            counts.direct(desc.len);
        } else {
            // Hardware timestamps or an XDP program moved the start (kernel-facts, section 3).
            memory.copy(desc.frame, expected, desc.len);
            counts.copied_bytes += u64::from(desc.len);
            counts.bounced(desc.len, BounceReason::Shifted);
        }
        let header_len = self.vring.header_len;
        match header_len {
            12 => memory.write_array(posted.header, HEADER_12),
            _ => memory.write(posted.header, &HEADER[..header_len as usize]),
        }
        if self.vring.queue.is_logged() {
            self.log_posted(desc.fill, posted.header);
        }
        self.vring.queue.push_used(posted.head, header_len + desc.len);
    }

    /// Posts a buffer again whose frame nobody gets.
    #[cold]
    fn post_again(&mut self, entry: UmemAddr, posted: Posted, xsk: &mut XskSocket) {
        if self.vring.queue.is_logged() {
            self.log_posted(entry, posted.header);
        }
        self.posted.insert(entry, posted);
        fill(xsk, entry);
    }

    /// A frame in the slab: copied to as many waiting heads as it needs.
    #[inline(always)]
    fn deliver_copy(&mut self, desc: RxDesc, counts: &mut Counts) {
        if !self.vring.enabled {
            counts.dropped(DropReason::Disabled);
            return;
        }
        let total = self.vring.header_len + desc.len;
        let heads = match self.heads_for(total) {
            Ok(heads) => heads,
            Err(reason) => {
                counts.dropped(reason);
                return;
            }
        };
        counts.bounced(desc.len, self.waiting[0].reason);
        let header = header_of([0; NET_HEADER_BYTES], heads as u16);
        let piece = std::iter::once(Segment { addr: desc.frame, len: desc.len });
        let mut left = Rest::new(&header[..self.vring.header_len as usize], piece);
        for _ in 0..heads {
            self.fill_waiting(&mut left, counts);
        }
    }

    /// Copies as much of a frame as the next waiting head takes, and uses it. Returns its capacity.
    #[inline(always)]
    fn fill_waiting(&mut self, left: &mut Rest<'_, impl Iterator<Item = Segment>>, counts: &mut Counts) -> u32 {
        let Some(head) = self.waiting.pop_front() else { return u32::MAX };
        let mut used = 0;
        for _ in 0..head.segments {
            let Some(segment) = self.waiting_segments.pop_front() else { break };
            let written = left.copy_into(self.vring.queue.memory(), segment, counts);
            self.vring.queue.log_buffer(segment.addr, u64::from(written));
            used += written;
        }
        self.vring.queue.push_used(head.taken.head, used);
        head.capacity_bytes
    }

    /// Number of waiting heads that hold `total_bytes`.
    fn heads_for(&self, total_bytes: u32) -> Result<usize, DropReason> {
        let mut room = 0u64;
        for (index, head) in self.waiting.iter().enumerate() {
            room += u64::from(head.capacity_bytes);
            if room >= u64::from(total_bytes) {
                return Ok(index + 1);
            }
            if !self.vring.mergeable {
                return Err(DropReason::BufferTooSmall);
            }
        }
        Err(DropReason::NoBuffer)
    }

    /// Takes fresh heads from the guest and posts them, or slab frames in their stead. Returns their number.
    fn refill(&mut self, xsk: &mut XskSocket, slab: &mut Slab) -> Result<u32, QueueFault> {
        let available = self.vring.queue.available()?.min(REFILL_BURST);
        if available > 0 {
            self.socket = Some((xsk.layout, xsk.rules));
            self.assembles = xsk.is_multi_buffer() || self.burst.merges();
        }
        let surplus = slab.used() > self.waiting.len();
        let plain_min = if surplus { u32::MAX } else { self.plain_buffer_min(&xsk.rules) };
        let mut count = 0;
        // Each head is posted or waits.
        let room = RX_RING_DESCS as usize - self.posted.len() - self.waiting.len().max(slab.used());
        for _ in 0..usize::from(available).min(room) {
            let taken = match self.vring.queue.take_single(Direction::DeviceWrites)? {
                Some((taken, buffer)) => {
                    if let Some(frame) = self.plain(xsk, buffer, plain_min) {
                        self.post(xsk, taken, buffer, frame);
                        count += 1;
                        continue;
                    }
                    self.chain.clear();
                    self.chain.push(buffer);
                    taken
                }
                None => {
                    self.chain.clear();
                    let Some(taken) = self.vring.queue.take(Direction::DeviceWrites, &mut self.chain)? else { break };
                    taken
                }
            };
            let can_wait = self.waiting_segments.len() + self.chain.len() <= WAITING_SEGMENTS_MAX;
            match self.fit(xsk) {
                // What arrives in slab frames that no head waits for is not lost, if one does from now on.
                Fit::Direct { .. } if can_wait && slab.used() > self.waiting.len() => {
                    self.wait(taken, BounceReason::FewBuffers);
                }
                Fit::Direct { first, frame } => self.post(xsk, taken, first, frame),
                Fit::Bounce(reason) if can_wait => self.wait(taken, reason),
                Fit::Bounce(_) => {
                    self.vring.queue.untake(taken);
                    break;
                }
                Fit::Useless => self.vring.queue.push_used(taken.head, 0),
            }
            count += 1;
        }
        self.post_slab_frames(xsk, slab);
        self.keep_reserve(xsk, slab);
        Ok(count)
    }

    #[inline]
    fn post(&mut self, xsk: &mut XskSocket, taken: Taken, first: Segment, frame: UmemAddr) {
        let entry = xsk.layout.fill_address(frame);
        let posted = Posted { position: taken.position, header: first.addr, room: first.len, head: taken.head };
        self.posted.insert(entry, posted);
        fill(xsk, entry);
    }

    /// Length from which on a buffer in one piece takes every frame, wherever it starts: in most queues all do.
    fn plain_buffer_min(&self, rules: &DriverRules) -> u32 {
        let header_len = self.vring.header_len;
        if !rules.direct || rules.rx_write_before > header_len || (self.assembles && !self.vring.mergeable) {
            return u32::MAX;
        }
        header_len.saturating_add(rules.rx_write_max).saturating_add(rules.rx_write_align - 1)
    }

    /// Where a frame goes in a buffer that takes it for certain; [`fit`](Self::fit) knows more about others.
    #[inline]
    fn plain(&self, xsk: &XskSocket, buffer: Segment, plain_min: u32) -> Option<UmemAddr> {
        let frame = buffer.addr.plus(u64::from(self.vring.header_len));
        (buffer.len >= plain_min && frame < xsk.umem_end && self.is_contiguous(xsk, frame)).then_some(frame)
    }

    /// Whether the device sees one range in what a fill entry for `frame` claims.
    #[inline]
    fn is_contiguous(&self, xsk: &XskSocket, frame: UmemAddr) -> bool {
        let (queue, entry) = (&self.vring.queue, xsk.layout.fill_address(frame));
        xsk.rules.is_contiguous(queue.memory(), entry, CHUNK_BYTES, frame, queue.region_hint())
    }

    /// Decides whether a frame, or any piece of one, can land in the guest's own memory (kernel-facts, section 10). A frame
    /// that needs several buffers is for those that can be merged, and are one piece of memory each.
    fn fit(&self, xsk: &XskSocket) -> Fit {
        match self.fit_for_one(xsk) {
            Fit::Direct { .. } if self.assembles && !self.vring.mergeable => Fit::Bounce(BounceReason::LongFrame),
            Fit::Direct { .. } if self.assembles && self.chain.len() > 1 => Fit::Bounce(BounceReason::SplitBuffer),
            fit => fit,
        }
    }

    #[inline]
    fn fit_for_one(&self, xsk: &XskSocket) -> Fit {
        let header_len = self.vring.header_len;
        let Some(first) = self.chain.first().filter(|_| capacity_bytes(&self.chain) >= header_len) else {
            return Fit::Useless;
        };
        if first.len > header_len {
            let frame = first.addr.plus(u64::from(header_len));
            match self.takes(xsk, frame, first.len - header_len) {
                Ok(()) => return Fit::Direct { first: *first, frame },
                Err(reason) if self.chain.len() == 1 => return Fit::Bounce(reason),
                Err(_) => return Fit::Bounce(BounceReason::SplitBuffer),
            }
        }
        match self.chain.get(1) {
            // The header has a descriptor of its own (legacy drivers, big mode): nothing may be written before the frame.
            Some(second) if first.len == header_len && xsk.rules.rx_write_before == 0 => {
                match self.takes(xsk, second.addr, second.len) {
                    Ok(()) => Fit::Direct { first: *first, frame: second.addr },
                    Err(reason) => Fit::Bounce(reason),
                }
            }
            Some(_) => Fit::Bounce(BounceReason::SplitBuffer),
            None => Fit::Bounce(BounceReason::ShortBuffer),
        }
    }

    /// Whether `room` bytes at `frame` can be given to the kernel, or why not.
    #[inline]
    fn takes(&self, xsk: &XskSocket, frame: UmemAddr, room: u32) -> Result<(), BounceReason> {
        let rules = &xsk.rules;
        if !rules.direct || rules.rx_write_before > self.vring.header_len {
            return Err(BounceReason::DriverUnproven);
        }
        if frame >= xsk.umem_end {
            return Err(BounceReason::Unregistered);
        }
        if !rules.write_stays_inside(frame, room) {
            return Err(BounceReason::ShortBuffer);
        }
        if !self.is_contiguous(xsk, frame) {
            return Err(BounceReason::NotContiguous);
        }
        Ok(())
    }

    fn wait(&mut self, taken: Taken, reason: BounceReason) {
        let capacity = capacity_bytes(&self.chain);
        self.waiting_min_bytes = self.waiting_min_bytes.min(capacity);
        self.waiting_segments.extend(&self.chain);
        self.waiting.push_back(Waiting { taken, segments: self.chain.len(), capacity_bytes: capacity, reason });
    }

    /// Posts slab frames: one for each group of waiting heads that is sure to hold the longest frame. The first is
    /// promised exactly what it needs, so that one tiny buffer among many does not make every group too large.
    fn post_slab_frames(&mut self, xsk: &mut XskSocket, slab: &mut Slab) {
        if self.waiting.is_empty() {
            return;
        }
        let longest = self.vring.header_len + xsk.layout.frame_max;
        if slab.used() == 0 {
            self.waiting_min_bytes = self.waiting.iter().map(|head| head.capacity_bytes).min().unwrap_or(u32::MAX);
        }
        let group = if self.vring.mergeable { longest.div_ceil(self.waiting_min_bytes).max(1) as usize } else { 1 };
        let is_held = |used| (used + 1) * group <= self.waiting.len() || (used == 0 && self.heads_for(longest).is_ok());
        while is_held(slab.used()) && self.posted.len() + slab.used() < RX_RING_DESCS as usize {
            let Some(frame) = slab.take() else { break };
            fill(xsk, frame);
        }
    }

    /// Posts slab frames where the driver would have fewer buffers than it must always have, from its first one on: without
    /// any it receives nothing. So a guest that begins with a full ring has its first frames in place.
    fn keep_reserve(&self, xsk: &mut XskSocket, slab: &mut Slab) {
        let posted = self.posted.len() + slab.used();
        let wanted = if posted > 0 { posted_min(&xsk.rules) } else { 0 };
        for _ in posted..wanted {
            let Some(frame) = slab.take() else { break };
            fill(xsk, frame);
        }
    }

    /// Marks a posted buffer in the log, its header and all that the kernel or the NIC may have written to it: more than
    /// the frame that is delivered, where an earlier one was dropped after it was written.
    #[cold]
    fn log_posted(&self, fill: UmemAddr, header: UmemAddr) {
        let Some((layout, rules)) = self.socket else { return };
        let frame = fill.plus(layout.frame_offset());
        // Apart, even where they are neighbours in the UMEM: the regions that they lie in need not be in the guest.
        self.vring.queue.log_buffer(header, u64::from(self.vring.header_len));
        self.vring.queue.log_buffer(frame, rules.written_end(frame).0 - frame.0);
    }

    /// Gives every head back to the guest. The socket is closed: nothing can arrive any more.
    pub fn recall(&mut self, slab: &mut Slab) {
        if self.vring.queue.is_logged() {
            // They may have been written: by frames that nobody read from the rx ring, or that were dropped. A driver
            // may expect nothing of a buffer that comes back unused, but every write is to be logged, and only so can
            // anybody check that memory is the same at both ends of a migration.
            self.posted.entries().for_each(|(fill, posted)| self.log_posted(fill, posted.header));
        }
        let mut heads: Vec<_> = self.posted.values().map(|posted| posted.taken()).collect();
        heads.extend(self.waiting.iter().map(|waiting| waiting.taken));
        self.posted.clear();
        self.waiting.clear();
        self.waiting_segments.clear();
        self.waiting_min_bytes = u32::MAX;
        slab.reset();
        self.vring.give_back(&mut heads);
    }
}

/// Buffers that are posted after every burst, whatever the guest offers: as many as the driver must have, with the rx ring
/// full of frames, and a burst taken from it whose buffers are not posted again yet.
fn posted_min(rules: &DriverRules) -> usize {
    if rules.rx_buffers_min == 0 { 0 } else { (rules.rx_buffers_min + rules.rx_ring_descs() + BURST) as usize }
}

/// Writes a fill entry. No more is posted than the ring holds, so there is room.
#[inline]
fn fill(xsk: &mut XskSocket, entry: UmemAddr) {
    debug_assert!(xsk.fill_free(1) > 0, "no more is posted than the ring holds");
    xsk.fill_write(entry);
}

/// What a chain holds; beyond 32 bits nothing is gained by counting on.
#[inline]
fn capacity_bytes(chain: &[Segment]) -> u32 {
    chain.iter().fold(0u32, |sum, segment| sum.saturating_add(segment.len))
}

#[cfg(test)]
mod tests;
