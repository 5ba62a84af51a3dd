//! How a built-in guest is set up, and what its queue pairs are told to do.

use crate::error::{Error, Result};
use crate::memory::RegionConfig;
use crate::pattern::Stream;

/// Feature bits that change what the driver does, spelled as in the specification.
#[allow(missing_docs)]
pub mod features {
    pub const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
    pub const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
    pub const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
    pub const VIRTIO_NET_F_GUEST_UFO: u64 = 1 << 10;
    pub const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
    pub const VIRTIO_F_INDIRECT_DESC: u64 = 1 << 28;
    pub const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;
    pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
    pub const VIRTIO_F_RING_PACKED: u64 = 1 << 34;
    pub const VIRTIO_NET_F_GUEST_USO4: u64 = 1 << 54;
    pub const VIRTIO_NET_F_GUEST_USO6: u64 = 1 << 55;
    pub const VIRTIO_NET_F_HASH_REPORT: u64 = 1 << 57;
}

/// The longest virtio-net header: with a hash report.
pub(super) const HEADER_BYTES_MAX: usize = 20;

/// Where a queue's buffers lie, and how each is cut into descriptors.
///
/// Piece k of buffer n begins `offset_bytes + (n * pieces + k) * stride_bytes` into the queue's share of its region;
/// nothing is aligned, so that any offset and stride, odd ones too, can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferLayout {
    /// Buffers; 0 for as many as the ring can hold.
    pub count: u16,
    /// Bytes of each descriptor of a buffer, the virtio-net header's room included: `[1536]`, or `[12, 2048]`.
    pub pieces: Vec<u32>,
    /// Distance in bytes between the starts of pieces; 0 for the longest piece's length rounded up to 64.
    pub stride_bytes: u32,
    /// Distance in bytes of the first piece from the (page-aligned) start of the queue's share.
    pub offset_bytes: u32,
    /// Index of the region they lie in.
    pub region: usize,
    /// Whether chains of several descriptors go by indirect tables (needs VIRTIO_F_INDIRECT_DESC).
    pub indirect: bool,
}

impl Default for BufferLayout {
    fn default() -> Self {
        Self { count: 0, pieces: vec![2048], stride_bytes: 0, offset_bytes: 0, region: 0, indirect: false }
    }
}

impl BufferLayout {
    /// The distance between pieces that is used.
    #[must_use]
    pub fn stride(&self) -> u32 {
        let longest = self.pieces.iter().copied().max().unwrap_or(0);
        if self.stride_bytes == 0 { longest.next_multiple_of(64) } else { self.stride_bytes }
    }

    /// Bytes that a buffer holds, header included.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.pieces.iter().map(|&bytes| bytes as usize).sum()
    }

    /// How many buffers there are on a ring of `size`.
    #[must_use]
    pub fn buffers(&self, size: u16) -> u16 {
        let each = if self.indirect { 1 } else { self.pieces.len().max(1) as u16 };
        if self.count == 0 { size / each } else { self.count }
    }

    pub(super) fn check(&self, queue: &str, size: u16, header_bytes: usize, features: u64) -> Result<()> {
        let fail = |why: String| Err(Error::config(format!("{queue} buffers: {why}")));
        if self.pieces.is_empty() || self.pieces.contains(&0) {
            return fail("every buffer needs pieces, none of them empty".to_string());
        }
        if self.stride() < self.pieces.iter().copied().max().unwrap_or(0) {
            return fail(format!("a stride of {} bytes makes them overlap", self.stride_bytes));
        }
        if self.capacity_bytes() < header_bytes + 14 {
            return fail(format!("{} bytes hold no frame", self.capacity_bytes()));
        }
        if self.indirect && features & features::VIRTIO_F_INDIRECT_DESC == 0 {
            return fail("indirect tables were not negotiated".to_string());
        }
        let each = if self.indirect { 1 } else { self.pieces.len() };
        if usize::from(self.buffers(size)) * each > usize::from(size) {
            return fail(format!("{} of {each} descriptors do not fit a ring of {size}", self.count));
        }
        Ok(())
    }
}

/// How a guest is set up. `features` are those negotiated, not those wished for.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Guest memory.
    pub regions: Vec<RegionConfig>,
    /// Index of the region in which rings and indirect tables lie.
    pub ring_region: usize,
    /// Queue pairs, each with a thread of its own.
    pub queue_pairs: u16,
    /// Descriptors of each ring: a power of two, but for packed ones.
    pub queue_size: u16,
    /// Negotiated feature bits.
    pub features: u64,
    /// Receive buffers.
    pub rx: BufferLayout,
    /// Transmit buffers.
    pub tx: BufferLayout,
    /// Poll the used rings instead of sleeping on the call eventfds.
    pub polling: bool,
    /// Fill all memory that is not a ring or posted buffer with canaries, and check sent and received buffers too.
    pub canaries: bool,
    /// Keep copies of this many of the first frames received by each queue pair.
    pub capture_frames: usize,
}

impl GuestConfig {
    /// Bytes of the virtio-net header (VIRTIO 1.3 section 5.1.6): 10 for a legacy device without mergeable buffers, 20
    /// with a hash report, else 12.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        match () {
            () if self.has(features::VIRTIO_NET_F_HASH_REPORT) => HEADER_BYTES_MAX,
            () if self.has(features::VIRTIO_F_VERSION_1 | features::VIRTIO_NET_F_MRG_RXBUF) => 12,
            () => 10,
        }
    }

    /// Whether virtqueues are packed.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.has(features::VIRTIO_F_RING_PACKED)
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub(super) fn check(&self) -> Result<()> {
        for region in [self.ring_region, self.rx.region, self.tx.region] {
            if region >= self.regions.len() {
                return Err(Error::config(format!(
                    "there is no region {region}: {} are configured",
                    self.regions.len()
                )));
            }
        }
        if self.queue_pairs == 0 || !(self.queue_size.is_power_of_two() || self.is_packed()) {
            return Err(Error::config("a guest needs queue pairs, and a split queue a size that is a power of two"));
        }
        self.rx.check("rx", self.queue_size, self.header_bytes(), self.features)?;
        self.tx.check("tx", self.queue_size, self.header_bytes(), self.features)
    }
}

/// What is done with received frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RxRole {
    /// Nothing: used buffers stay in the used ring, as in a guest that gets no CPU.
    #[default]
    Idle,
    /// Counted.
    Sink,
    /// Sent back out of the same buffer, MAC addresses swapped.
    Echo,
    /// Compared with what their own header promises (see [`crate::pattern`]).
    Check,
}

/// What a source sends.
#[derive(Clone, Debug)]
pub enum Payload {
    /// These frames in turn, as they are.
    Fixed(Vec<Vec<u8>>),
    /// Frames that prove their own content.
    Pattern(Stream),
}

/// A source of frames.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// What is sent.
    pub payload: Payload,
    /// How many frames; `None` for no end.
    pub count: Option<u64>,
    /// At most this many a second.
    pub rate_frames_per_s: Option<f64>,
    /// At most this many are published at once.
    pub burst: u16,
    /// Sequence of the first pattern frame; `None` goes on where this queue's last source ended.
    pub first_sequence: Option<u32>,
    /// Virtio-net headers, for frames in turn; none for zeros.
    pub headers: Vec<Vec<u8>>,
}

impl SourceConfig {
    /// An unlimited source.
    #[must_use]
    pub fn new(payload: Payload) -> Self {
        Self { payload, count: None, rate_frames_per_s: None, burst: 64, first_sequence: None, headers: Vec::new() }
    }

    pub(super) fn check(&self, header_bytes: usize, capacity_bytes: usize) -> Result<()> {
        let longest = match &self.payload {
            Payload::Fixed(frames) => {
                if frames.is_empty() || frames.iter().any(Vec::is_empty) {
                    return Err(Error::config("a source needs frames, none of them empty"));
                }
                frames.iter().map(Vec::len).max().unwrap_or(0)
            }
            Payload::Pattern(stream) if !stream.is_valid() => {
                return Err(Error::config("pattern frames are at least 22 bytes long"));
            }
            Payload::Pattern(stream) => stream.frame_max_bytes(),
        };
        if header_bytes + longest > capacity_bytes {
            return Err(Error::config(format!(
                "frames of {longest} bytes and a header of {header_bytes} exceed tx buffers of {capacity_bytes} bytes"
            )));
        }
        if self.headers.iter().any(|header| header.len() != header_bytes) {
            return Err(Error::config(format!("a virtio-net header has {header_bytes} bytes")));
        }
        if self.burst == 0 || self.rate_frames_per_s.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            return Err(Error::config("burst and rate of a source must be above zero"));
        }
        Ok(())
    }
}
