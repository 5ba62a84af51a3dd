//! The simplest device that can answer a driver in this crate's tests: it walks chains and writes the used ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::driver::{RingLayout, Segment, flags};
use crate::memory::{GuestMemory, GuestPhysAddr};

pub(crate) struct Chain {
    pub head: u16,
    pub segments: Vec<Segment>,
}

pub(crate) struct ModelDevice {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    event_idx: bool,
    next_avail: u16,
    used_idx: u16,
}

impl ModelDevice {
    pub fn new(memory: &Arc<GuestMemory>, layout: RingLayout, event_idx: bool) -> Self {
        Self { memory: Arc::clone(memory), layout, event_idx, next_avail: 0, used_idx: 0 }
    }

    fn read<const N: usize>(&self, address: GuestPhysAddr) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(address, &mut bytes).unwrap();
        bytes
    }

    fn read_u16(&self, address: GuestPhysAddr) -> u16 {
        u16::from_le_bytes(self.read(address))
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index % self.layout.size)
    }

    pub fn pop_avail(&mut self) -> Option<Chain> {
        if self.read_u16(self.layout.avail.plus(2)) == self.next_avail {
            return None;
        }
        fence(Ordering::Acquire);
        let head = self.read_u16(self.layout.avail.plus(4 + 2 * self.slot(self.next_avail)));
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(Chain { head, segments: self.walk(self.layout.desc, head) })
    }

    fn walk(&self, table: GuestPhysAddr, mut index: u16) -> Vec<Segment> {
        let mut segments = Vec::new();
        loop {
            let bytes: [u8; 16] = self.read(table.plus(16 * u64::from(index)));
            let address = GuestPhysAddr(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
            let bits = u16::from_le_bytes([bytes[12], bytes[13]]);
            if bits & flags::VIRTQ_DESC_F_INDIRECT != 0 {
                return self.walk(address, 0);
            }
            let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            segments.push(Segment { address, len, writable: bits & flags::VIRTQ_DESC_F_WRITE != 0 });
            if bits & flags::VIRTQ_DESC_F_NEXT == 0 {
                return segments;
            }
            index = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
    }

    /// Writes a used entry and publishes it; returns whether the driver wants a notification.
    pub fn push_used(&mut self, head: u16, len: u32) -> bool {
        self.push_used_id(u32::from(head), len)
    }

    /// Writes used entries and publishes them at once.
    pub fn push_used_together(&mut self, used: &[(u16, u32)]) {
        let first = self.used_idx;
        for (offset, &(head, len)) in used.iter().enumerate() {
            self.write_used(first.wrapping_add(offset as u16), u32::from(head), len);
        }
        fence(Ordering::Release);
        self.set_used_idx(first.wrapping_add(used.len() as u16));
    }

    fn write_used(&self, index: u16, id: u32, len: u32) {
        let entry = self.layout.used.plus(4 + 8 * self.slot(index));
        self.memory.write(entry, &id.to_le_bytes()).unwrap();
        self.memory.write(entry.plus(4), &len.to_le_bytes()).unwrap();
    }

    pub fn push_used_id(&mut self, id: u32, len: u32) -> bool {
        let entry = self.layout.used.plus(4 + 8 * self.slot(self.used_idx));
        self.memory.write(entry, &id.to_le_bytes()).unwrap();
        self.memory.write(entry.plus(4), &len.to_le_bytes()).unwrap();
        fence(Ordering::Release);
        let old = self.used_idx;
        self.set_used_idx(old.wrapping_add(1));
        fence(Ordering::SeqCst);
        if self.event_idx {
            self.read_u16(self.layout.avail.plus(4 + 2 * u64::from(self.layout.size))) == old
        } else {
            self.read_u16(self.layout.avail) & flags::VIRTQ_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    pub fn set_used_idx(&mut self, index: u16) {
        self.used_idx = index;
        self.memory.write(self.layout.used.plus(2), &index.to_le_bytes()).unwrap();
    }

    pub fn set_used_flags(&mut self, bits: u16) {
        self.memory.write(self.layout.used, &bits.to_le_bytes()).unwrap();
    }

    pub fn set_avail_event(&mut self, index: u16) {
        let field = self.layout.used.plus(4 + 8 * u64::from(self.layout.size));
        self.memory.write(field, &index.to_le_bytes()).unwrap();
    }

    /// Writes a frame behind a zero header of `header_bytes` (with `num_buffers` 1 if there is room) into the next
    /// available chain, and uses it. Returns `None` if no chain is available.
    pub fn receive(&mut self, header_bytes: usize, frame: &[u8]) -> Option<bool> {
        let chain = self.pop_avail()?;
        let mut stream = vec![0; header_bytes];
        if header_bytes == 12 {
            stream[10] = 1;
        }
        stream.extend_from_slice(frame);
        self.scatter(&chain.segments, &stream);
        Some(self.push_used(chain.head, stream.len() as u32))
    }

    pub fn scatter(&self, segments: &[Segment], mut bytes: &[u8]) {
        for segment in segments {
            let count = bytes.len().min(segment.len as usize);
            self.memory.write(segment.address, &bytes[..count]).unwrap();
            bytes = &bytes[count..];
        }
        assert!(bytes.is_empty(), "the frame fits its chain");
    }

    /// Takes the next chain that the driver sends; returns its bytes, header included.
    pub fn transmit(&mut self) -> Option<Vec<u8>> {
        let chain = self.pop_avail()?;
        let mut stream = Vec::new();
        for segment in &chain.segments {
            assert!(!segment.writable, "tx chains are read-only");
            let mut bytes = vec![0; segment.len as usize];
            self.memory.read(segment.address, &mut bytes).unwrap();
            stream.extend_from_slice(&bytes);
        }
        self.push_used(chain.head, 0);
        Some(stream)
    }
}
