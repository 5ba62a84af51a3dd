//! The rx virtqueue: buffers posted for the device to fill, and the frames that come back in them.

use super::buffers::Buffers;
use super::config::{GuestConfig, HEADER_BYTES_MAX, features};
use super::counters::{Counters, Violations};
use crate::driver::{QueueDriver, Segment, Used, Violation};
use crate::error::{Error, Result};

const NO_BUFFER: u16 = u16::MAX;

/// What the negotiated features say about received headers.
#[derive(Clone, Copy, Debug)]
struct HeaderRules {
    header_bytes: usize,
    is_mergeable: bool,
    flags_allowed: bool,
    gso_allowed: bool,
}

impl HeaderRules {
    fn of(config: &GuestConfig) -> Self {
        let tso = features::VIRTIO_NET_F_GUEST_TSO4 | features::VIRTIO_NET_F_GUEST_TSO6;
        let uso = features::VIRTIO_NET_F_GUEST_USO4 | features::VIRTIO_NET_F_GUEST_USO6;
        let gso = tso | uso | features::VIRTIO_NET_F_GUEST_UFO;
        Self {
            header_bytes: config.header_bytes(),
            is_mergeable: config.has(features::VIRTIO_NET_F_MRG_RXBUF),
            flags_allowed: config.has(features::VIRTIO_NET_F_GUEST_CSUM),
            gso_allowed: config.has(gso),
        }
    }
}

/// A received frame: a list of buffers, the driver's until [`RxQueue::give_back`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub first_buffer: u16,
    /// Without the virtio-net header.
    pub bytes: usize,
}

#[derive(Debug)]
pub(super) struct RxQueue {
    pub driver: QueueDriver,
    buffers: Buffers,
    rules: HeaderRules,
    has_canaries: bool,
    buffer_of_head: Vec<u16>,
    head_of_buffer: Vec<u16>,
    /// Used length of each buffer, header included.
    used_bytes: Vec<u32>,
    /// The frame's next buffer, by buffer.
    next_part: Vec<u16>,
}

impl RxQueue {
    /// Adds every buffer to the avail ring and publishes them.
    pub fn new(mut driver: QueueDriver, buffers: Buffers, config: &GuestConfig) -> Result<Self> {
        let count = usize::from(buffers.count());
        let mut buffer_of_head = vec![NO_BUFFER; usize::from(config.queue_size)];
        let mut head_of_buffer = vec![0; count];
        let mut segments: Vec<Segment> = Vec::new();
        for buffer in 0..buffers.count() {
            segments.clear();
            buffers.segments(buffer, buffers.capacity_bytes(), true, &mut segments);
            let added = if config.rx.indirect { driver.add_indirect(&segments) } else { driver.add(&segments) };
            let head = added.map_err(|error| Error::config(format!("rx buffer {buffer}: {error}")))?;
            buffer_of_head[usize::from(head)] = buffer;
            head_of_buffer[usize::from(buffer)] = head;
            if config.canaries {
                buffers.fill_canaries(buffer, 0, buffers.capacity_bytes());
            }
        }
        driver.publish();
        Ok(Self {
            driver,
            buffers,
            rules: HeaderRules::of(config),
            has_canaries: config.canaries,
            buffer_of_head,
            head_of_buffer,
            used_bytes: vec![0; count],
            next_part: vec![NO_BUFFER; count],
        })
    }

    /// Takes the next frame out of the used ring. Broken entries are counted and skipped.
    pub fn pop_frame(&mut self, counters: &mut Counters, violations: &mut Violations) -> Option<Frame> {
        let (first_buffer, first_bytes) = loop {
            let (buffer, bytes) = self.pop_buffer(counters, violations)?;
            if bytes >= self.rules.header_bytes {
                break (buffer, bytes);
            }
            if bytes == 0 {
                counters.rx_empty_buffers += 1
            } else {
                violations.used_length_too_small += 1
            }
            self.give_back(buffer);
        };
        let mut stream_bytes = first_bytes;
        let (mut last, mut last_bytes) = (first_buffer, first_bytes);
        for _ in 1..self.read_header(first_buffer, violations) {
            violations.buffer_not_filled += u64::from(last_bytes != self.buffers.capacity_bytes());
            let Some((buffer, bytes)) = self.pop_buffer(counters, violations) else {
                violations.num_buffers_not_together += 1;
                break;
            };
            self.next_part[usize::from(last)] = buffer;
            stream_bytes += bytes;
            (last, last_bytes) = (buffer, bytes);
        }
        let frame = Frame { first_buffer, bytes: stream_bytes - self.rules.header_bytes };
        counters.rx_frames += 1;
        counters.rx_bytes += frame.bytes as u64;
        counters.rx_multi_buffer_frames += u64::from(last != first_buffer);
        Some(frame)
    }

    /// Takes the next buffer out of the used ring: its number and the bytes written to it.
    fn pop_buffer(&mut self, counters: &mut Counters, violations: &mut Violations) -> Option<(u16, usize)> {
        loop {
            let Used { head, len } = match self.driver.pop_used()? {
                Ok(used) => used,
                Err(violation) => {
                    violations.count(violation);
                    continue;
                }
            };
            let buffer = self.buffer_of_head[usize::from(head)];
            self.used_bytes[usize::from(buffer)] = len;
            self.next_part[usize::from(buffer)] = NO_BUFFER;
            if self.has_canaries {
                counters.rx_tail_bytes_changed += self.buffers.changed_canaries(buffer, len as usize);
            }
            return Some((buffer, len as usize));
        }
    }

    /// A frame's virtio-net header.
    pub fn header(&self, frame: Frame) -> Vec<u8> {
        let mut header = vec![0; self.rules.header_bytes];
        self.buffers.read(frame.first_buffer, 0, &mut header);
        header
    }

    /// Judges a frame's virtio-net header (VIRTIO 1.3 section 5.1.6.4); returns how many buffers the frame has.
    fn read_header(&self, buffer: u16, violations: &mut Violations) -> u16 {
        let mut header = [0; HEADER_BYTES_MAX];
        let header = &mut header[..self.rules.header_bytes];
        self.buffers.read(buffer, 0, header);
        let is_unasked = (header[0] != 0 && !self.rules.flags_allowed) || (header[1] != 0 && !self.rules.gso_allowed);
        violations.header_not_negotiated += u64::from(is_unasked);
        if header.len() < 12 {
            return 1;
        }
        let num_buffers = u16::from_le_bytes([header[10], header[11]]);
        if num_buffers == 0 || (num_buffers != 1 && !self.rules.is_mergeable) {
            violations.num_buffers_wrong += 1;
            return 1;
        }
        num_buffers
    }

    /// The numbers of a frame's buffers, and the bytes used in each, header included.
    fn parts(&self, first_buffer: u16) -> impl Iterator<Item = (u16, usize)> {
        let known = |buffer: u16| (buffer != NO_BUFFER).then_some(buffer);
        std::iter::successors(Some(first_buffer), move |&buffer| known(self.next_part[usize::from(buffer)]))
            .map(|buffer| (buffer, self.used_bytes[usize::from(buffer)] as usize))
    }

    /// Copies a frame, without its header, to the front of `scratch`; returns it. What exceeds `scratch` is cut off.
    pub fn read_frame<'s>(&self, frame: Frame, scratch: &'s mut [u8]) -> &'s [u8] {
        let (mut done, mut skip) = (0, self.rules.header_bytes);
        for (buffer, bytes) in self.parts(frame.first_buffer) {
            let count = (bytes - skip).min(scratch.len() - done);
            self.buffers.read(buffer, skip, &mut scratch[done..done + count]);
            done += count;
            skip = 0;
        }
        &scratch[..done]
    }

    /// Makes a frame fit to be sent as it lies: header zeroed, MAC addresses swapped.
    pub fn turn_round(&self, frame: Frame) {
        let header_bytes = self.rules.header_bytes;
        self.buffers.write(frame.first_buffer, 0, &[0; HEADER_BYTES_MAX][..header_bytes]);
        // The addresses are in the first buffer unless buffers are tiny; such frames go back as they are.
        if self.used_bytes[usize::from(frame.first_buffer)] as usize >= header_bytes + 12 {
            let mut addresses = [0; 12];
            self.buffers.read(frame.first_buffer, header_bytes, &mut addresses);
            addresses.rotate_left(6);
            self.buffers.write(frame.first_buffer, header_bytes, &addresses);
        }
    }

    /// Appends the segments in which a frame and its header lie, for the device to read.
    pub fn frame_segments(&self, frame: Frame, into: &mut Vec<Segment>) {
        for (buffer, bytes) in self.parts(frame.first_buffer) {
            self.buffers.segments(buffer, bytes, false, into);
        }
    }

    /// Posts a frame's buffers again; [`QueueDriver::publish`] is the caller's.
    pub fn give_back(&mut self, first_buffer: u16) {
        let mut next = first_buffer;
        while next != NO_BUFFER {
            let place = usize::from(next);
            if self.has_canaries {
                self.buffers.fill_canaries(next, 0, self.used_bytes[place] as usize);
            }
            self.driver.repost(self.head_of_buffer[place]);
            next = std::mem::replace(&mut self.next_part[place], NO_BUFFER);
        }
    }
}

impl Violations {
    pub(super) fn count(&mut self, violation: Violation) {
        match violation {
            Violation::UsedIndexJump { .. } => self.used_index_jump += 1,
            Violation::UsedIdOutOfRange { .. } => self.used_id_out_of_range += 1,
            Violation::UsedTwice { .. } => self.used_twice += 1,
            Violation::UsedLengthTooLarge { .. } => self.used_length_too_large += 1,
        }
    }
}
