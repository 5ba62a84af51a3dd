//! What rx and tx virtqueues share: the ring, its eventfds, its header format, and giving heads back.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::error::{Error, QueueFault};
use crate::fd::EventFd;
use crate::guest_memory::{GuestMemory, Segment};
use crate::offload::gro::Merging;
use crate::offload::headers::Offloads;
use crate::virtqueue::{InflightRecord, QueueConfig, Taken, Virtqueue, WriteLog};

const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_F_RING_PACKED: u64 = 1 << 34;
const VIRTIO_NET_F_HASH_REPORT: u64 = 1 << 57;

/// A station's address, in the order of the wire.
pub type MacAddress = [u8; 6];

/// Longest virtio-net header: with a hash report.
pub(super) const HEADER_BYTES_MAX: usize = 20;

/// Length of the virtio-net header that these features make (VIRTIO 1.3 §5.1.6): the hash is the last part, and
/// num_buffers is there with MRG_RXBUF, or always from VIRTIO 1.0 on.
fn header_len(features: u64) -> u32 {
    let has = |bits| features & bits != 0;
    match () {
        () if has(VIRTIO_NET_F_HASH_REPORT) => HEADER_BYTES_MAX as u32,
        () if has(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF) => 12,
        () => 10,
    }
}

/// A virtqueue as vhost-user hands it over.
#[derive(Debug)]
pub struct VringConfig {
    /// The rings. What the driver negotiated about them is taken from `features`.
    pub queue: QueueConfig,
    /// Negotiated virtio features.
    pub features: u64,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// Driver → device notifications.
    pub kick: EventFd,
    /// Device → driver notifications.
    pub call: Option<EventFd>,
    /// Signalled when the queue is stopped by a fault.
    pub err: Option<EventFd>,
    /// What is in flight, for whoever comes after this process, and from whoever was before.
    pub record: Option<InflightRecord>,
    /// Where writes to guest memory are logged, if they are.
    pub log: Option<WriteLog>,
}

/// A running virtqueue.
#[derive(Debug)]
pub(super) struct Vring {
    pub queue: Virtqueue,
    pub enabled: bool,
    /// Stopped by a fault until the front-end stops and starts it.
    pub faulted: bool,
    pub kick: EventFd,
    pub call: Option<EventFd>,
    pub err: Option<EventFd>,
    /// virtio_net_hdr in front of each frame, in bytes (VIRTIO 1.3 §5.1.6).
    pub header_len: u32,
    pub mergeable: bool,
    /// What the guest takes merged.
    pub merging: Merging,
    /// What frames from the guest may ask for.
    pub offloads: Offloads,
    /// Heads that were in flight when an earlier back-end ended.
    pub resumed: usize,
    /// tx: the address that the guest's first frame came from, all zeros if none of a station's; `None` before it.
    pub source: Option<MacAddress>,
}

impl Vring {
    pub fn new(memory: Arc<GuestMemory>, config: VringConfig) -> Result<Self, Error> {
        let event_idx = config.features & VIRTIO_RING_F_EVENT_IDX != 0;
        let packed = config.features & VIRTIO_F_RING_PACKED != 0;
        let mergeable = config.features & VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut queue = Virtqueue::new(memory, &QueueConfig { event_idx, packed, ..config.queue })?;
        queue.set_log(config.log);
        let resumed = config.record.map_or(0, |record| queue.resume(record));
        Ok(Self {
            queue,
            enabled: config.enabled,
            faulted: false,
            kick: config.kick,
            call: config.call,
            err: config.err,
            header_len: header_len(config.features),
            mergeable,
            merging: Merging::of_features(config.features),
            offloads: Offloads::of_features(config.features),
            resumed,
            source: None,
        })
    }

    /// Learns the guest's address from its first frame: a switch that the port moves to has to be told.
    #[inline]
    pub fn learn_source(&mut self, chain: &[Segment]) {
        if self.source.is_none() {
            self.source = Some(source_of(self.queue.memory(), chain, self.header_len).unwrap_or_default());
        }
    }

    /// Shows used entries to the driver and notifies it, once.
    #[inline]
    pub fn flush(&mut self) {
        self.queue.publish_used();
        if self.queue.should_call()
            && let Some(call) = &self.call
        {
            call.signal();
        }
    }

    /// Stops the queue for good.
    pub fn fault(&mut self) {
        self.faulted = true;
        if let Some(err) = &self.err {
            err.signal();
        }
    }

    /// Gives heads back that were taken and not used. Those taken last stay in the avail ring, by rewinding it; one that
    /// was taken before a head that is used already cannot, and returns used with length 0.
    pub fn give_back(&mut self, heads: &mut [Taken]) {
        let next = self.queue.position();
        heads.sort_unstable_by_key(|taken| Reverse(taken.position));
        let rewound = heads.iter().zip(1u64..).take_while(|(taken, back)| taken.position + back == next).count();
        for &taken in &heads[..rewound] {
            self.queue.untake(taken);
        }
        for taken in heads[rewound..].iter().rev() {
            self.queue.push_used(taken.head, 0);
        }
        self.queue.give_up_resumed();
        self.flush();
    }

    /// The queue has stopped, and all was given back. Returns its base.
    pub fn stopped(&mut self) -> u64 {
        self.queue.stopped();
        u64::from(self.queue.base())
    }

    /// Whether the queue may be worked on.
    #[inline]
    pub fn runs(&self) -> bool {
        !self.faulted
    }

    /// Asks for kicks; whether there is something to do already.
    pub fn arm(&mut self) -> Result<bool, QueueFault> {
        if self.faulted { Ok(false) } else { self.queue.enable_kicks() }
    }
}

/// The address that a frame behind its virtio-net header comes from; `None` if that is none of a station's, or cut in two.
#[cold]
fn source_of(memory: &GuestMemory, chain: &[Segment], header_len: u32) -> Option<MacAddress> {
    let bytes = size_of::<MacAddress>() as u32;
    let mut skip = header_len + bytes;
    let piece = chain.iter().find(|piece| {
        let there = piece.len > skip;
        skip -= if there { 0 } else { piece.len };
        there
    })?;
    if piece.len - skip < bytes {
        return None;
    }
    let mut source = MacAddress::default();
    memory.read_bytes(piece.addr.plus(u64::from(skip)), &mut source);
    (source[0] & 1 == 0 && source != MacAddress::default()).then_some(source)
}

#[cfg(test)]
mod tests;
