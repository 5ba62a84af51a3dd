//! The tx virtqueue: a source's own buffers, and received buffers on their way back (echo).

use std::time::{Duration, Instant};

use super::buffers::Buffers;
use super::config::{GuestConfig, Payload, SourceConfig};
use super::counters::{Counters, Violations};
use super::rx::{Frame, RxQueue};
use crate::driver::{QueueDriver, RingFull, Segment, Used};

/// The longest chain an echo makes; longer frames are refused by the driver, as Linux does at MAX_SKB_FRAGS + 2.
pub(super) const CHAIN_MAX: usize = 32;

/// Whose buffer a posted head is.
#[derive(Clone, Copy, Debug)]
enum Owner {
    Nobody,
    Slot(u16),
    Echo { first_buffer: u16 },
}

/// What a source last wrote into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Unknown,
    Fixed(usize),
    Sequence(u32),
}

/// Whether an echo was posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Posted,
    RingFull,
    Refused,
}

/// A source at work.
#[derive(Debug)]
struct Source {
    config: SourceConfig,
    left: u64,
    next_fixed: usize,
    pacer: Option<Pacer>,
}

/// Lets `rate` frames a second pass, counted from its start; never saves up more than a burst.
#[derive(Debug)]
struct Pacer {
    interval: Duration,
    next: Instant,
    slack: Duration,
}

impl Pacer {
    fn new(rate_frames_per_s: f64, burst: u16) -> Self {
        let interval = Duration::from_secs_f64(1.0 / rate_frames_per_s);
        Self { interval, next: Instant::now(), slack: interval * u32::from(burst) }
    }

    /// How many frames are due now, at most `most`.
    fn due(&mut self, most: usize) -> usize {
        let now = Instant::now();
        let Some(late) = now.checked_duration_since(self.next) else { return 0 };
        if late > self.slack {
            self.next = now.checked_sub(self.slack).unwrap_or(now);
        }
        let late = now.saturating_duration_since(self.next);
        let due = late.as_nanos() / self.interval.as_nanos().max(1) + 1;
        usize::try_from(due).unwrap_or(most).min(most)
    }

    fn sent(&mut self, count: usize) {
        self.next += self.interval * count as u32;
    }
}

#[derive(Debug)]
pub(super) struct TxQueue {
    pub driver: QueueDriver,
    slots: Buffers,
    free_slots: Vec<u16>,
    contents: Vec<Content>,
    owners: Vec<Owner>,
    frame_bytes: Vec<u32>,
    source: Option<Source>,
    sequence: u32,
    header_bytes: usize,
    is_indirect: bool,
    has_canaries: bool,
    segments: Vec<Segment>,
    /// Header and frame, as a source makes them, and as they are read back.
    made: Vec<u8>,
    read: Vec<u8>,
}

impl TxQueue {
    pub fn new(driver: QueueDriver, slots: Buffers, config: &GuestConfig) -> Self {
        let size = usize::from(config.queue_size);
        Self {
            driver,
            free_slots: (0..slots.count()).rev().collect(),
            contents: vec![Content::Unknown; usize::from(slots.count())],
            owners: vec![Owner::Nobody; size],
            frame_bytes: vec![0; size],
            source: None,
            sequence: 0,
            header_bytes: config.header_bytes(),
            is_indirect: config.tx.indirect,
            has_canaries: config.canaries,
            segments: Vec::with_capacity(CHAIN_MAX),
            made: vec![0; slots.capacity_bytes()],
            read: vec![0; slots.capacity_bytes()],
            slots,
        }
    }

    /// Replaces the source.
    pub fn set_source(&mut self, config: Option<SourceConfig>) {
        // What old sources left in the slots says nothing about the new one's frames. Those still on their way are
        // not compared when they come back.
        self.contents.fill(Content::Unknown);
        self.source = config.map(|config| {
            self.sequence = config.first_sequence.unwrap_or(self.sequence);
            let pacer = config.rate_frames_per_s.map(|rate| Pacer::new(rate, config.burst));
            Source { left: config.count.unwrap_or(u64::MAX), next_fixed: 0, pacer, config }
        });
    }

    /// Adds a burst of the source's frames to the avail ring; returns how many.
    pub fn generate(&mut self, counters: &mut Counters) -> usize {
        let Some(mut source) = self.source.take() else { return 0 };
        let burst = usize::from(source.config.burst).min(self.free_slots.len());
        let burst = burst.min(usize::try_from(source.left).unwrap_or(usize::MAX));
        let burst = source.pacer.as_mut().map_or(burst, |pacer| pacer.due(burst));
        let mut posted = 0;
        while posted < burst && self.post_next(&mut source) {
            posted += 1;
        }
        source.left -= posted as u64;
        if let Some(pacer) = &mut source.pacer {
            pacer.sent(posted);
        }
        counters.tx_posted += posted as u64;
        self.source = Some(source);
        posted
    }

    fn post_next(&mut self, source: &mut Source) -> bool {
        let Some(&slot) = self.free_slots.last() else { return false };
        let content = match &source.config.payload {
            Payload::Fixed(_) => Content::Fixed(source.next_fixed),
            Payload::Pattern(_) => Content::Sequence(self.sequence),
        };
        let stream_bytes = if self.contents[usize::from(slot)] == content {
            self.header_bytes + fixed_bytes(&source.config, source.next_fixed)
        } else {
            let bytes = self.make(&source.config, content);
            self.slots.write(slot, 0, &self.made[..bytes]);
            self.contents[usize::from(slot)] = content;
            bytes
        };
        self.segments.clear();
        self.slots.segments(slot, stream_bytes, false, &mut self.segments);
        if self.add(Owner::Slot(slot), stream_bytes - self.header_bytes).is_err() {
            return false;
        }
        self.free_slots.pop();
        match &source.config.payload {
            Payload::Fixed(frames) => source.next_fixed = (source.next_fixed + 1) % frames.len(),
            Payload::Pattern(_) => self.sequence = self.sequence.wrapping_add(1),
        }
        true
    }

    /// Makes header and frame in `made`; returns their length.
    fn make(&mut self, config: &SourceConfig, content: Content) -> usize {
        let (header, frame) = self.made.split_at_mut(self.header_bytes);
        let number = match content {
            Content::Fixed(which) => which,
            Content::Sequence(sequence) => sequence as usize,
            Content::Unknown => 0,
        };
        match config.headers.get(number % config.headers.len().max(1)) {
            Some(made) => header.copy_from_slice(made),
            None => header.fill(0),
        }
        let frame_bytes = match (&config.payload, content) {
            (Payload::Fixed(frames), Content::Fixed(which)) => {
                frame[..frames[which].len()].copy_from_slice(&frames[which]);
                frames[which].len()
            }
            (Payload::Pattern(stream), Content::Sequence(sequence)) => stream.write(sequence, frame),
            _ => 0,
        };
        self.header_bytes + frame_bytes
    }

    fn add(&mut self, owner: Owner, frame_bytes: usize) -> Result<(), RingFull> {
        let head = if self.is_indirect && self.segments.len() > 1 {
            self.driver.add_indirect(&self.segments)?
        } else {
            self.driver.add(&self.segments)?
        };
        self.owners[usize::from(head)] = owner;
        self.frame_bytes[usize::from(head)] = frame_bytes as u32;
        Ok(())
    }

    /// Sends a received frame back out of the buffers it came in.
    pub fn echo(&mut self, rx: &RxQueue, frame: Frame) -> Echo {
        self.segments.clear();
        rx.frame_segments(frame, &mut self.segments);
        let ring_size = usize::from(self.driver.layout().size);
        if self.segments.len() > CHAIN_MAX.min(ring_size) {
            return Echo::Refused;
        }
        match self.add(Owner::Echo { first_buffer: frame.first_buffer }, frame.bytes) {
            Ok(()) => Echo::Posted,
            Err(RingFull) => Echo::RingFull,
        }
    }

    /// Takes back what the device has sent; buffers of echoes go back to `rx`. Returns how many frames.
    pub fn reclaim(&mut self, rx: &mut RxQueue, counters: &mut Counters, violations: &mut Violations) -> usize {
        let mut reclaimed = 0;
        while let Some(popped) = self.driver.pop_used() {
            reclaimed += 1;
            let Used { head, len } = match popped {
                Ok(used) => used,
                Err(violation) => {
                    self.count_violation(violation, violations);
                    continue;
                }
            };
            violations.tx_used_length_not_zero += u64::from(len != 0);
            let place = usize::from(head);
            counters.tx_frames += 1;
            counters.tx_bytes += u64::from(self.frame_bytes[place]);
            self.driver.release(head);
            match std::mem::replace(&mut self.owners[place], Owner::Nobody) {
                Owner::Slot(slot) => {
                    if self.has_canaries {
                        counters.tx_bytes_changed += self.changed_bytes(slot);
                    }
                    self.free_slots.push(slot);
                }
                Owner::Echo { first_buffer } => rx.give_back(first_buffer),
                Owner::Nobody => {}
            }
        }
        reclaimed
    }

    fn count_violation(&mut self, violation: crate::driver::Violation, violations: &mut Violations) {
        // Any length is impossible for a read-only buffer: one name for it, and the frame did go out.
        if let crate::driver::Violation::UsedLengthTooLarge { head, .. } = violation {
            violations.tx_used_length_not_zero += 1;
            if let Owner::Slot(slot) = std::mem::replace(&mut self.owners[usize::from(head)], Owner::Nobody) {
                self.free_slots.push(slot);
            }
        } else {
            violations.count(violation);
        }
    }

    /// How many bytes of a slot differ from what the source wrote there.
    fn changed_bytes(&mut self, slot: u16) -> u64 {
        let content = self.contents[usize::from(slot)];
        let Some(source) = self.source.take_if(|_| content != Content::Unknown) else { return 0 };
        let bytes = self.make(&source.config, content);
        self.source = Some(source);
        self.slots.read(slot, 0, &mut self.read[..bytes]);
        let pairs = self.made[..bytes].iter().zip(&self.read[..bytes]);
        pairs.filter(|(made, read)| made != read).count() as u64
    }

    /// How long until the source may send again: `None` if only a used buffer can change that.
    pub fn next_due(&self) -> Option<Duration> {
        let source = self.source.as_ref().filter(|source| source.left > 0 && !self.free_slots.is_empty())?;
        let pacer = source.pacer.as_ref()?;
        Some(pacer.next.saturating_duration_since(Instant::now()))
    }
}

fn fixed_bytes(config: &SourceConfig, which: usize) -> usize {
    match &config.payload {
        Payload::Fixed(frames) => frames[which].len(),
        Payload::Pattern(_) => 0,
    }
}
