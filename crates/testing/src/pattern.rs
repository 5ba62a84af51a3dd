//! Frames that prove their own content.
//!
//! ```text
//! 0        6        12      14         18        20     22
//! | dst MAC | src MAC | 88b5 | sequence | length | seed | pattern of (seed, sequence) … |
//! ```
//!
//! Numbers are big-endian; `length` is the frame's, in bytes without FCS. A receiver recomputes the pattern from the
//! frame's own header, so any changed, missing or foreign byte shows. MAC addresses are not part of the pattern: an
//! echo swaps them. Sequences are counted per seed, so that several senders can share a wire.

/// IEEE 802 local experimental ethertype 1.
pub const ETHERTYPE: u16 = 0x88b5;
/// The shortest frame that carries the header.
pub const FRAME_MIN_BYTES: usize = HEADER_BYTES;

const HEADER_BYTES: usize = 22;
/// Sequences per lazily made piece of the bitmap.
const LEAF_SEQUENCES: usize = 1 << 15;
/// More streams than this on one wire are nonsense, and would cost a bitmap each.
const STREAMS_MAX: usize = 64;

/// A MAC address.
pub type Mac = [u8; 6];

/// What a checked frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Byte for byte what `seed` and `sequence` promise.
    Good {
        /// The stream it belongs to.
        seed: u16,
        /// Its place in the stream.
        sequence: u32,
    },
    /// Our ethertype, but other bytes or another length than promised.
    Corrupt,
    /// Another ethertype: not ours.
    Foreign,
}

/// A stream of pattern frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Tells streams apart and varies the pattern.
    pub seed: u16,
    /// Where frames go.
    pub destination: Mac,
    /// Where they come from.
    pub source: Mac,
    /// Frame sizes in bytes without FCS, used in turn.
    pub sizes: Vec<u16>,
}

impl Stream {
    /// The length in bytes of frame `sequence`.
    #[must_use]
    pub fn frame_bytes(&self, sequence: u32) -> usize {
        usize::from(self.sizes[sequence as usize % self.sizes.len()])
    }

    /// The longest frame of the stream, in bytes.
    #[must_use]
    pub fn frame_max_bytes(&self) -> usize {
        self.sizes.iter().copied().max().map_or(0, usize::from)
    }

    /// Whether every size can carry the header.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        !self.sizes.is_empty() && self.sizes.iter().all(|&size| usize::from(size) >= FRAME_MIN_BYTES)
    }

    /// Writes frame `sequence` to the front of `frame`; returns its length in bytes.
    pub fn write(&self, sequence: u32, frame: &mut [u8]) -> usize {
        let length = self.frame_bytes(sequence);
        let frame = &mut frame[..length];
        frame[..6].copy_from_slice(&self.destination);
        frame[6..12].copy_from_slice(&self.source);
        frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
        frame[14..18].copy_from_slice(&sequence.to_be_bytes());
        frame[18..20].copy_from_slice(&(length as u16).to_be_bytes());
        frame[20..22].copy_from_slice(&self.seed.to_be_bytes());
        let mut words = Words::new(self.seed, sequence);
        let (chunks, rest) = frame[HEADER_BYTES..].as_chunks_mut::<8>();
        for chunk in chunks {
            *chunk = words.next_word();
        }
        let last = words.next_word();
        rest.copy_from_slice(&last[..rest.len()]);
        length
    }
}

/// Compares a frame with what its own header promises.
#[must_use]
pub fn verify(frame: &[u8]) -> Verdict {
    if frame.len() < 14 || frame[12..14] != ETHERTYPE.to_be_bytes() {
        return Verdict::Foreign;
    }
    if frame.len() < HEADER_BYTES {
        return Verdict::Corrupt;
    }
    let sequence = u32::from_be_bytes([frame[14], frame[15], frame[16], frame[17]]);
    let length = u16::from_be_bytes([frame[18], frame[19]]);
    let seed = u16::from_be_bytes([frame[20], frame[21]]);
    if usize::from(length) != frame.len() {
        return Verdict::Corrupt;
    }
    let mut words = Words::new(seed, sequence);
    let (chunks, rest) = frame[HEADER_BYTES..].as_chunks::<8>();
    // No early exit: the sum of differences vectorizes, and nearly every frame is good.
    let mut difference = 0;
    for chunk in chunks {
        difference |= u64::from_ne_bytes(*chunk) ^ u64::from_ne_bytes(words.next_word());
    }
    let last = words.next_word();
    if difference == 0 && *rest == last[..rest.len()] { Verdict::Good { seed, sequence } } else { Verdict::Corrupt }
}

/// The pattern's words: a counter from a mixed start, each word mixed once more so that shifted bytes do not match.
struct Words {
    state: u64,
}

impl Words {
    fn new(seed: u16, sequence: u32) -> Self {
        let start = u64::from(seed) << 32 | u64::from(sequence);
        let mixed = (start ^ 0x5851_F42D_4C95_7F2D).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        Self { state: mixed ^ mixed >> 31 }
    }

    fn next_word(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        (self.state ^ self.state >> 29).to_le_bytes()
    }
}

/// Counts of a [`Checker`], in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounts {
    /// Good frames, each sequence counted once.
    pub good: u64,
    /// Frames of our ethertype whose bytes or length are wrong.
    pub corrupt: u64,
    /// Good frames whose sequence had been seen before.
    pub duplicate: u64,
    /// Good frames that came after one with a higher sequence.
    pub reordered: u64,
    /// Frames of other ethertypes.
    pub foreign: u64,
    /// Sequences below the highest seen that never came.
    pub missing: u64,
}

/// Checks received frames and keeps account of every sequence of every stream.
#[derive(Debug, Default)]
pub struct Checker {
    counts: CheckCounts,
    streams: Vec<(u16, Sequences)>,
}

impl Checker {
    /// Checks and counts one frame.
    pub fn check(&mut self, frame: &[u8]) -> Verdict {
        let verdict = verify(frame);
        match verdict {
            Verdict::Foreign => self.counts.foreign += 1,
            Verdict::Corrupt => self.counts.corrupt += 1,
            Verdict::Good { seed, sequence } => self.account(seed, sequence),
        }
        verdict
    }

    fn account(&mut self, seed: u16, sequence: u32) {
        let place = match self.streams.iter().position(|(known, _)| *known == seed) {
            Some(place) => place,
            None if self.streams.len() == STREAMS_MAX => {
                self.counts.corrupt += 1;
                return;
            }
            None => {
                self.streams.push((seed, Sequences::new()));
                self.streams.len() - 1
            }
        };
        let sequences = &mut self.streams[place].1;
        let is_late = u64::from(sequence) < sequences.end;
        if !sequences.insert(sequence) {
            self.counts.duplicate += 1;
        } else {
            self.counts.good += 1;
            self.counts.reordered += u64::from(is_late);
        }
    }

    /// What has been counted so far.
    #[must_use]
    pub fn counts(&self) -> CheckCounts {
        let missing = self.streams.iter().map(|(_, sequences)| sequences.end - sequences.unique).sum();
        CheckCounts { missing, ..self.counts }
    }
}

/// A set of sequences, exact over all of u32: a bitmap in pieces that are made when first touched.
#[derive(Debug)]
struct Sequences {
    leaves: Vec<Option<Box<[u64; LEAF_SEQUENCES / 64]>>>,
    unique: u64,
    /// One past the highest sequence.
    end: u64,
}

impl Sequences {
    fn new() -> Self {
        Self { leaves: Vec::new(), unique: 0, end: 0 }
    }

    /// Adds `sequence`; returns whether it is new.
    fn insert(&mut self, sequence: u32) -> bool {
        let leaf = sequence as usize / LEAF_SEQUENCES;
        if leaf >= self.leaves.len() {
            self.leaves.resize(leaf + 1, None);
        }
        let leaf = self.leaves[leaf].get_or_insert_with(|| Box::new([0; LEAF_SEQUENCES / 64]));
        let word = &mut leaf[sequence as usize % LEAF_SEQUENCES / 64];
        let bit = 1 << (sequence % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.unique += 1;
        self.end = self.end.max(u64::from(sequence) + 1);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(sizes: &[u16]) -> Stream {
        Stream { seed: 7, destination: [2, 0, 0, 0, 0, 1], source: [2, 0, 0, 0, 0, 2], sizes: sizes.to_vec() }
    }

    fn frame(stream: &Stream, sequence: u32) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        let length = stream.write(sequence, &mut frame);
        frame.truncate(length);
        frame
    }

    #[test]
    fn test_every_size_verifies_and_every_changed_byte_shows() {
        for size in 22..=1514u16 {
            let stream = stream(&[size]);
            let mut good = frame(&stream, u32::from(size));
            assert_eq!(verify(&good), Verdict::Good { seed: 7, sequence: u32::from(size) });
            let place = 14 + usize::from(size) * 31 % (usize::from(size) - 14);
            good[place] ^= 0x10;
            // A frame too short for a pattern cannot tell another sequence or seed from its own.
            assert!(size < 30 || verify(&good) == Verdict::Corrupt, "size {size}, byte {place}");
        }
    }

    #[test]
    fn test_truncated_and_foreign_frames_are_told_apart() {
        let good = frame(&stream(&[64]), 1);
        assert_eq!(verify(&good[..63]), Verdict::Corrupt);
        assert_eq!(verify(&good[..20]), Verdict::Corrupt);
        assert_eq!(verify(&good[..13]), Verdict::Foreign);
        let mut other = good;
        other[12] = 0x08;
        assert_eq!(verify(&other), Verdict::Foreign);
    }

    #[test]
    fn test_sizes_are_used_in_turn() {
        let stream = stream(&[60, 61, 1514]);
        let lengths: Vec<_> = (0..4).map(|sequence| frame(&stream, sequence).len()).collect();
        assert_eq!(lengths, [60, 61, 1514, 60]);
        assert!(stream.is_valid() && !self::stream(&[21]).is_valid() && !self::stream(&[]).is_valid());
    }

    #[test]
    fn test_checker_accounts_for_every_sequence() {
        let stream = stream(&[60]);
        let mut checker = Checker::default();
        for sequence in [0, 1, 3, 2, 3, 40_000] {
            checker.check(&frame(&stream, sequence));
        }
        checker.check(&[0; 60]);
        let mut bad = frame(&stream, 4);
        bad[59] ^= 1;
        checker.check(&bad);
        let expected = CheckCounts { good: 5, corrupt: 1, duplicate: 1, reordered: 1, foreign: 1, missing: 40_001 - 5 };
        assert_eq!(checker.counts(), expected);
    }

    #[test]
    fn test_streams_are_counted_apart() {
        let (one, two) = (stream(&[60]), Stream { seed: 8, ..stream(&[60]) });
        let mut checker = Checker::default();
        for sequence in 0..3 {
            checker.check(&frame(&one, sequence));
            checker.check(&frame(&two, sequence));
        }
        assert_eq!(checker.counts(), CheckCounts { good: 6, ..CheckCounts::default() });
    }
}
