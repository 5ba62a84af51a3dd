//! Both directions of a queue pair over a packet socket. Nothing of the guest is in the kernel's hands between bursts:
//! frames are copied out of the socket's ring, and sent inside one system call.
//!
//! Where sources are checked, each frame begins with the header that was checked, a copy of ours.
//!
//! All frames count as bounced (`packet_mode`). `copied_bytes` has those of rx alone: on tx it is the kernel that copies.

use super::position::Position;
use super::source_lock::SourceLock;
use super::vring::{HEADER_BYTES_MAX, Vring};
use crate::error::QueueFault;
use crate::guest_memory::Segment;
use crate::offload::headers::ETHERNET_HEADER_BYTES;
use crate::packet::{PacketSocket, Received};
use crate::stats::{BounceReason, Counts, DropReason};
use crate::virtqueue::{CHAIN_DESCS_MAX, Direction, Taken};

/// Frames handled before the other direction gets its turn.
const BURST: usize = 64;
/// Room for a burst of ordinary chains beside the longest one.
const VECTORS_MAX: usize = CHAIN_DESCS_MAX + 4 * BURST;

/// What became of a received frame.
enum Delivery {
    Done,
    /// The guest's buffers do not hold it yet.
    Starved,
    Dropped(DropReason),
}

/// A queue pair's socket, and what a burst needs.
#[derive(Debug)]
pub(super) struct PacketPump {
    pub socket: PacketSocket,
    frame_max: u32,
    lock: SourceLock,
    chain: Vec<Segment>,
    /// Heads of one received frame, each with the number of its segments.
    heads: Vec<(Taken, usize)>,
    segments: Vec<Segment>,
    vectors: Vec<libc::iovec>,
    /// Headers that were checked, to which vectors point.
    checked: Vec<[u8; ETHERNET_HEADER_BYTES]>,
    messages: Vec<libc::mmsghdr>,
    /// Heads of the messages, each with its frame's length.
    sending: Vec<(Taken, u32)>,
    /// A frame waits for buffers of the guest.
    pub starved: bool,
    /// Why the first frame that waits could not be sent.
    pub send_errno: Option<i32>,
}

// SAFETY: the raw pointers in `vectors` and `messages` are used only within the call that wrote them.
unsafe impl Send for PacketPump {}

impl PacketPump {
    pub fn new(socket: PacketSocket, frame_max: u32, lock: SourceLock) -> Self {
        Self {
            socket,
            frame_max,
            lock,
            chain: Vec::with_capacity(CHAIN_DESCS_MAX),
            heads: Vec::with_capacity(usize::from(u16::MAX)),
            // A frame's heads have at most as many segments as it has bytes, and the last one goes on behind it.
            segments: Vec::with_capacity(frame_max as usize + HEADER_BYTES_MAX + CHAIN_DESCS_MAX),
            vectors: Vec::with_capacity(VECTORS_MAX),
            checked: Vec::with_capacity(BURST),
            messages: Vec::with_capacity(BURST),
            sending: Vec::with_capacity(BURST),
            starved: false,
            send_errno: None,
        }
    }

    /// Copies received frames to the guest. Returns their number.
    ///
    /// # Errors
    /// The driver broke the ring protocol; the frame stays in the ring.
    pub fn receive(&mut self, vring: &mut Vring, counts: &mut Counts) -> Result<u32, QueueFault> {
        let mut received = 0;
        let mut fault = None;
        self.starved = false;
        while received < BURST as u32 {
            let Some(frame) = self.socket.peek() else { break };
            let mut place = Place { chain: &mut self.chain, heads: &mut self.heads, segments: &mut self.segments };
            let delivery = if !vring.enabled {
                Ok(Delivery::Dropped(DropReason::Disabled))
            } else if frame.truncated || frame.len() > self.frame_max {
                Ok(Delivery::Dropped(DropReason::Oversize))
            } else {
                place.deliver(&frame, vring, counts)
            };
            match delivery {
                Ok(Delivery::Done) => {}
                Ok(Delivery::Dropped(reason)) => counts.dropped(reason),
                Ok(Delivery::Starved) => {
                    self.starved = true;
                    break;
                }
                Err(broken) => {
                    fault = Some(broken);
                    break;
                }
            }
            self.socket.release();
            received += 1;
        }
        vring.flush();
        fault.map_or(Ok(received), Err)
    }

    /// Sends frames of the guest. Returns the number of heads used.
    ///
    /// # Errors
    /// The driver broke the ring protocol; what was taken before is sent.
    pub fn transmit(&mut self, vring: &mut Vring, counts: &mut Counts) -> Result<u32, QueueFault> {
        self.vectors.clear();
        self.checked.clear();
        self.sending.clear();
        self.send_errno = None;
        let gathered = self.gather(vring, counts);
        let sent = self.send(vring, counts);
        vring.flush();
        gathered.map(|dropped| dropped + sent)
    }

    /// Takes chains until the burst is full; returns how many were dropped. One that is dropped is used at once, which
    /// only the first may be: those before it could no longer be given back.
    fn gather(&mut self, vring: &mut Vring, counts: &mut Counts) -> Result<u32, QueueFault> {
        self.messages.clear();
        let mut dropped = 0;
        for _ in 0..usize::from(vring.queue.available()?).min(BURST) {
            self.chain.clear();
            let Some(head) = vring.queue.take(Direction::DeviceReads, &mut self.chain)? else { break };
            vring.learn_source(&self.chain);
            let memory = vring.queue.memory();
            let mut frame = Position::default();
            frame.skip(&self.chain, vring.header_len);
            let len = frame.bytes_behind(&self.chain);
            let mut ethernet = [0; ETHERNET_HEADER_BYTES];
            let judged = reason_to_drop(vring.enabled, len, self.frame_max).map_or(Ok(()), Err).and_then(|()| {
                if !self.lock.is_open() {
                    frame.read(&self.chain, memory, &mut ethernet);
                }
                self.lock.check(ethernet)
            });
            if let Err(reason) = judged {
                if !self.sending.is_empty() {
                    vring.queue.untake(head);
                    break;
                }
                counts.dropped(reason);
                vring.queue.push_used(head.head, 0);
                dropped += 1;
                continue;
            }
            if self.vectors.len() + 1 + self.chain.len() > VECTORS_MAX {
                vring.queue.untake(head);
                break;
            }
            let first = self.vectors.len();
            if !self.lock.is_open() {
                frame.skip(&self.chain, ETHERNET_HEADER_BYTES as u32);
                let slot = self.checked.len();
                self.checked.push(ethernet);
                self.vectors
                    .push(libc::iovec { iov_base: self.checked[slot].as_mut_ptr().cast(), iov_len: ethernet.len() });
            }
            frame.walk(&self.chain, len, |piece| {
                let iov_base = memory.ptr(piece.addr).cast();
                self.vectors.push(libc::iovec { iov_base, iov_len: piece.len as usize });
            });
            self.messages.push(message(&mut self.vectors[first..]));
            self.sending.push((head, len));
        }
        Ok(dropped)
    }

    /// Sends what was gathered; what the kernel does not take now stays in the avail ring.
    fn send(&mut self, vring: &mut Vring, counts: &mut Counts) -> u32 {
        if self.sending.is_empty() {
            return 0;
        }
        // SAFETY: the vectors are ranges of guest memory that walk() checked, mapped as long as the queue has it, and entries
        // of `checked`; neither that nor `vectors` has grown since, for their capacities were not passed.
        let sent = unsafe { self.socket.send(&mut self.messages) };
        let mut used = 0;
        match sent {
            Ok(sent) => {
                for (head, len) in &self.sending[..sent] {
                    counts.bounced(*len, BounceReason::PacketMode);
                    vring.queue.push_used(head.head, 0);
                }
                used = sent;
            }
            // About this frame, whenever it is sent.
            Err(libc::EMSGSIZE | libc::EINVAL) => {
                self.untake_from(1, vring);
                counts.dropped(DropReason::Oversize);
                vring.queue.push_used(self.sending[0].0.head, 0);
                return 1;
            }
            Err(errno) => self.send_errno = Some(errno),
        }
        self.untake_from(used, vring);
        used as u32
    }

    fn untake_from(&self, first: usize, vring: &mut Vring) {
        for (head, _) in self.sending[first..].iter().rev() {
            vring.queue.untake(*head);
        }
    }

    /// Sends a frame of our own.
    pub fn inject(&mut self, frame: &[u8]) -> Result<(), i32> {
        let mut vector = [libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() }];
        // SAFETY: the vector is `frame`, which the kernel reads within the call.
        unsafe { self.socket.send(&mut [message(&mut vector)]) }.map(|_| ())
    }
}

/// Where a frame goes to.
struct Place<'a> {
    chain: &'a mut Vec<Segment>,
    heads: &'a mut Vec<(Taken, usize)>,
    segments: &'a mut Vec<Segment>,
}

impl Place<'_> {
    /// Takes as many heads as the frame needs and copies it there.
    fn deliver(
        &mut self,
        frame: &Received<'_>,
        vring: &mut Vring,
        counts: &mut Counts,
    ) -> Result<Delivery, QueueFault> {
        self.heads.clear();
        self.segments.clear();
        match self.take_heads(vring.header_len + frame.len(), vring) {
            Ok(Delivery::Done) => {}
            other => {
                for (head, _) in self.heads.iter().rev() {
                    vring.queue.untake(*head);
                }
                return other;
            }
        }
        let mut header = [0u8; HEADER_BYTES_MAX];
        header[super::rx::NUM_BUFFERS].copy_from_slice(&(self.heads.len() as u16).to_le_bytes());
        let [first, second, third] = frame.parts();
        let mut sources = [&header[..vring.header_len as usize], first, second, third].into_iter();
        let mut source = sources.next().unwrap_or_default();
        let mut segments = self.segments.iter();
        for (head, count) in self.heads.iter() {
            let mut written = 0;
            for segment in segments.by_ref().take(*count) {
                let (mut at, mut room) = (segment.addr, segment.len as usize);
                while room > 0 {
                    if source.is_empty() {
                        let Some(next) = sources.next() else { break };
                        source = next;
                        continue;
                    }
                    let bytes = source.len().min(room);
                    vring.queue.memory().write(at, &source[..bytes]);
                    vring.queue.log_buffer(at, bytes as u64);
                    source = &source[bytes..];
                    at = at.plus(bytes as u64);
                    room -= bytes;
                    written += bytes as u32;
                }
            }
            vring.queue.push_used(head.head, written);
        }
        counts.copied_bytes += u64::from(frame.len());
        counts.bounced(frame.len(), BounceReason::PacketMode);
        Ok(Delivery::Done)
    }

    /// Takes heads that together hold `total` bytes. If that fails, what was taken is in `heads`.
    fn take_heads(&mut self, total: u32, vring: &mut Vring) -> Result<Delivery, QueueFault> {
        let available = usize::from(vring.queue.available()?);
        let mut room = 0u32;
        while room < total {
            self.chain.clear();
            let head = match self.heads.len() < available {
                true => vring.queue.take(Direction::DeviceWrites, self.chain)?,
                false => None,
            };
            let Some(head) = head else {
                let all = self.has_whole_ring(vring);
                return Ok(if all { Delivery::Dropped(DropReason::BufferTooSmall) } else { Delivery::Starved });
            };
            self.heads.push((head, self.chain.len()));
            self.segments.extend_from_slice(self.chain);
            room = self.chain.iter().fold(room, |sum, segment| sum.saturating_add(segment.len));
            if !vring.mergeable && room < total {
                return Ok(Delivery::Dropped(DropReason::BufferTooSmall));
            }
        }
        Ok(Delivery::Done)
    }

    /// Whether the driver cannot post one more buffer like these.
    #[cold]
    fn has_whole_ring(&self, vring: &Vring) -> bool {
        let descs = self.heads.iter().map(|(head, _)| usize::from(vring.queue.descs_of(*head)));
        descs.clone().min().is_some_and(|shortest| descs.sum::<usize>() + shortest > usize::from(vring.queue.size()))
    }
}

fn reason_to_drop(enabled: bool, len: u32, frame_max: u32) -> Option<DropReason> {
    if !enabled {
        Some(DropReason::Disabled)
    } else if len < ETHERNET_HEADER_BYTES as u32 {
        Some(DropReason::Runt)
    } else if len > frame_max {
        Some(DropReason::Oversize)
    } else {
        None
    }
}

/// A message of these vectors, to whatever the socket is bound to.
fn message(vectors: &mut [libc::iovec]) -> libc::mmsghdr {
    // SAFETY: zeros are a valid msghdr: no name, no vectors, no control data.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = vectors.as_mut_ptr();
    message.msg_hdr.msg_iovlen = vectors.len() as _;
    message
}
