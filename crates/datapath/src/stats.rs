//! Counters of one queue pair, by name and reason.
//!
//! The pump thread adds to plain fields and publishes them once per burst; any thread may take a snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a frame did not stay where the guest or the wire put it, or was lost. Names are part of the JSON report.
macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// The names, in the order of the variants.
            pub const NAMES: &'static [&'static str] = &[$($text,)*];
        }
    };
}

reasons! {
    /// Why a frame was copied once in user space.
    BounceReason {
        /// rx: the guest's buffer is shorter than the longest frame that may arrive.
        ShortBuffer => "short_buffer",
        /// rx: the buffer's first piece is too short, the rest lies elsewhere.
        SplitBuffer => "split_buffer",
        /// The memory is not contiguous for the device (zero-copy mode).
        NotContiguous => "not_contiguous",
        /// The memory was added while virtqueues ran, and is not in the socket's UMEM yet.
        Unregistered => "unregistered",
        /// The driver's rules do not allow guest memory (zero-copy mode).
        DriverUnproven => "driver_unproven",
        /// rx: the guest had posted fewer buffers than the driver must always have (zero-copy mode).
        FewBuffers => "few_buffers",
        /// rx: longer than the UMEM's frames: it came in several pieces, and what was behind the first was moved.
        LongFrame => "long_frame",
        /// rx: it became part of a large packet, and its payload was moved behind that of the one before.
        Merged => "merged",
        /// rx: the kernel placed the frame at an unexpected offset.
        Shifted => "shifted",
        /// tx: shorter than the driver takes; padded.
        ShortFrame => "short_frame",
        /// tx: the chain has more pieces than a packet may have descriptors.
        TooManyPieces => "too_many_pieces",
        /// tx: another frame in flight has an address that its completion could be mistaken for.
        AddressAlias => "address_alias",
        /// The port's mode has no AF_XDP (rx: copied out of the packet socket's ring; tx: by the kernel).
        PacketMode => "packet_mode",
    }
}

reasons! {
    /// Why a frame was lost.
    DropReason {
        /// rx: the guest had no buffer (kernel: fill ring empty).
        NoBuffer => "no_buffer",
        /// Longer than the interface's MTU allows.
        Oversize => "oversize",
        /// rx: the kernel's rx ring was full.
        RingFull => "rx_ring_full",
        /// rx: longer than the guest's buffer, and buffers cannot be merged.
        BufferTooSmall => "buffer_too_small",
        /// The virtqueue was disabled (SET_VRING_ENABLE 0).
        Disabled => "disabled",
        /// tx: shorter than an Ethernet header.
        Runt => "runt",
        /// tx: there was no socket to send it by, for longer than a frame waits.
        NoLink => "no_link",
        /// The kernel answered with a buffer that it did not have (rx), or completed what was not sent (tx): its socket
        /// is not believed any more, and closed.
        UnknownAnswer => "unknown_answer",
        /// tx: a checksum is asked for where there is no place for it.
        BadChecksumRequest => "bad_checksum_request",
        /// tx: segmentation is asked for of what cannot be segmented, or was not negotiated.
        BadSegmentRequest => "bad_segment_request",
        /// tx: the source address is none that the guest may have.
        Spoofed => "spoofed",
    }
}

reasons! {
    /// What was done to a frame of the guest, or for it.
    Offload {
        /// tx: its checksum was made.
        Checksum => "checksum",
        /// tx: it was cut into TCP segments over IPv4.
        Tso4 => "tso4",
        /// tx: over IPv6.
        Tso6 => "tso6",
        /// tx: it was cut into UDP datagrams.
        Uso => "uso",
        /// rx: frames of a flow were merged into one packet.
        Gro => "gro",
    }
}

const BOUNCE: usize = BounceReason::NAMES.len();
const DROP: usize = DropReason::NAMES.len();
const OFFLOAD: usize = Offload::NAMES.len();

/// One direction's figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames handed to the guest (rx) or to the kernel (tx).
    pub frames: u64,
    /// Their bytes, without virtio-net header and FCS.
    pub bytes: u64,
    /// Frames whose payload no one copied in user space.
    pub direct: u64,
    /// tx: those of them whose headers were made here, for their checksum or as segments of a larger frame.
    pub header_split: u64,
    /// Frames copied once, by [`BounceReason`].
    pub bounced: [u64; BOUNCE],
    /// Frames lost, by [`DropReason`].
    pub dropped: [u64; DROP],
    /// Frames of the guest by what was done to them, by [`Offload`]; each may be many of `frames`.
    pub offloaded: [u64; OFFLOAD],
    /// Bytes copied in user space; added where the copy is made.
    pub copied_bytes: u64,
    /// Those of them that are headers of `header_split` frames.
    pub header_bytes: u64,
}

impl Counts {
    /// Counts a frame that stayed in place.
    #[inline]
    pub fn direct(&mut self, len_bytes: u32) {
        self.frames += 1;
        self.bytes += u64::from(len_bytes);
        self.direct += 1;
    }

    /// Counts a frame whose payload stayed in place, and whose headers were made here.
    #[inline]
    pub fn header_split(&mut self, len_bytes: u32, header_bytes: u32) {
        self.direct(len_bytes);
        self.header_split += 1;
        self.header_bytes += u64::from(header_bytes);
        self.copied_bytes += u64::from(header_bytes);
    }

    /// Counts a frame of the guest of which something was asked for.
    #[inline]
    pub fn offloaded(&mut self, offload: Offload) {
        self.offloaded[offload as usize] += 1;
    }

    /// Counts a copied frame.
    #[inline]
    pub fn bounced(&mut self, len_bytes: u32, reason: BounceReason) {
        self.frames += 1;
        self.bytes += u64::from(len_bytes);
        self.bounced[reason as usize] += 1;
    }

    /// Counts a lost frame.
    #[inline]
    pub fn dropped(&mut self, reason: DropReason) {
        self.dropped[reason as usize] += 1;
    }

    /// Adds another thread's or an earlier life's figures.
    pub fn add(&mut self, other: &Self) {
        let mut words = self.words();
        for (to, from) in words.iter_mut().zip(other.words()) {
            *to += from;
        }
        *self = Self::from_words(&words);
    }

    fn words(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let (plain, by_name) = words.split_at_mut(PLAIN);
        plain.copy_from_slice(&[
            self.frames,
            self.bytes,
            self.direct,
            self.header_split,
            self.copied_bytes,
            self.header_bytes,
        ]);
        let (bounced, by_name) = by_name.split_at_mut(BOUNCE);
        let (dropped, offloaded) = by_name.split_at_mut(DROP);
        bounced.copy_from_slice(&self.bounced);
        dropped.copy_from_slice(&self.dropped);
        offloaded.copy_from_slice(&self.offloaded);
        words
    }

    fn from_words(words: &[u64; WORDS]) -> Self {
        let (plain, by_name) = words.split_at(PLAIN);
        let (bounced, by_name) = by_name.split_at(BOUNCE);
        let (dropped, offloaded) = by_name.split_at(DROP);
        let &[frames, bytes, direct, header_split, copied_bytes, header_bytes] = plain else {
            unreachable!("the length is that of the split");
        };
        let mut counts = Self { frames, bytes, direct, header_split, copied_bytes, header_bytes, ..Self::default() };
        counts.bounced.copy_from_slice(bounced);
        counts.dropped.copy_from_slice(dropped);
        counts.offloaded.copy_from_slice(offloaded);
        counts
    }
}

/// Figures without a name of their own in a list.
const PLAIN: usize = 6;
const WORDS: usize = PLAIN + BOUNCE + DROP + OFFLOAD;

/// What one thread publishes and others read. Each figure is exact; a snapshot may be torn between figures.
#[derive(Debug)]
pub struct Published {
    words: [AtomicU64; WORDS],
}

impl Default for Published {
    fn default() -> Self {
        Self { words: [const { AtomicU64::new(0) }; WORDS] }
    }
}

impl Published {
    /// Shows the owner's figures.
    #[inline]
    pub fn publish(&self, counts: &Counts) {
        for (to, from) in self.words.iter().zip(counts.words()) {
            // Relaxed: counters order nothing.
            to.store(from, Ordering::Relaxed);
        }
    }

    /// The figures published last.
    pub fn snapshot(&self) -> Counts {
        let mut words = [0; WORDS];
        for (to, from) in words.iter_mut().zip(&self.words) {
            // Relaxed: counters order nothing.
            *to = from.load(Ordering::Relaxed);
        }
        Counts::from_words(&words)
    }
}

#[cfg(test)]
mod tests;
