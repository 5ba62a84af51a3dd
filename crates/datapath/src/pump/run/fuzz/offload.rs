//! Frames of which a checksum or segmentation is asked, and frames that can be merged: mostly in good order, often with
//! something wrong.

use arbitrary::Result;

use super::Case;
use crate::offload::checksum::Sum;

const NEEDS_CSUM: u8 = 1;
const GSO_TYPES: [u8; 6] = [0, 1, 4, 5, 0x81, 3];
/// Payload of a segment: one byte, a few, as Ethernet has it, more than a frame may have.
const SIZES: [u16; 8] = [1, 7, 100, 536, 1448, 1460, 4000, 0];
/// The source of most frames: what a lock allows.
pub(super) const SOURCE: [u8; 6] = [2; 6];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

impl Case<'_> {
    /// Posts a request, its payload in odd buffers.
    pub(super) fn ask(&mut self) -> Result<()> {
        let Some(ring) = self.ring(true) else { return Ok(()) };
        let header_len = self.vring(true).map_or(12, |vring| vring.header_len as usize);
        let kind = self.byte()?;
        let (is_ipv4, is_tcp) = (kind & 1 == 0, kind & 6 != 0);
        let frame = self.headers(is_ipv4, is_tcp)?;
        let transport = if is_tcp { 20 } else { 8 };
        let (start, offset) = ((frame.len() - transport) as u16, if is_tcp { 16u16 } else { 6 });
        let gso_type = match kind >> 3 & 7 {
            0..=1 => 0,
            2..=5 => [[5, 5], [4, 1]][usize::from(is_tcp)][usize::from(is_ipv4)],
            6 => GSO_TYPES[usize::from(self.byte()?) % GSO_TYPES.len()],
            _ => self.byte()?,
        };
        let size = SIZES[usize::from(self.byte()?) % SIZES.len()];
        let mut bytes = vec![NEEDS_CSUM, gso_type, 0, 0];
        bytes.extend([size, start, offset].iter().flat_map(|field| field.to_le_bytes()));
        bytes.resize(header_len, 0);
        bytes.extend(frame);
        if self.rarely(3)? {
            let place = usize::from(self.byte()?) % bytes.len();
            bytes[place] ^= self.byte()?;
        }
        let at = self.world.plan.buffers_at() + u64::from(self.bytes.arbitrary::<u16>()? % 0x3f00);
        self.world.write(at, &bytes);
        // In one piece, or in two that are cut anywhere.
        let len = bytes.len() as u32;
        let cut = if self.rarely(2)? { u32::from(self.byte()?) % len } else { 0 };
        self.post_behind(true, &ring, &[(at, cut), (at + u64::from(cut), len - cut)])
    }

    /// Segments of a stream arrive.
    pub(super) fn receive_stream(&mut self) -> Result<()> {
        let kind = self.byte()?;
        let (is_ipv4, is_tcp) = (kind & 1 == 0, kind & 6 != 0);
        let mut headers = self.headers(is_ipv4, is_tcp)?;
        let transport = headers.len() - if is_tcp { 20 } else { 8 };
        let size = usize::from(SIZES[usize::from(self.byte()?) % SIZES.len()].min(1400));
        let mut frames = Vec::new();
        for number in 0..self.byte()? % 24 + 1 {
            if is_tcp {
                // Mostly plain payload.
                headers[transport + 13] = if self.rarely(8)? { self.byte()? } else { 0x10 };
                let sequence = 0xffff_ff00u32.wrapping_add(u32::from(number) * size as u32);
                headers[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            }
            let len = if self.rarely(16)? { usize::from(self.byte()?) } else { size };
            let mut frame = [&headers[..], &vec![number; len]].concat();
            complete(&mut frame, is_ipv4, transport, u16::from(number));
            if self.rarely(16)? {
                let place = usize::from(self.byte()?) % frame.len();
                frame[place] ^= self.byte()?;
            }
            frames.push(frame);
        }
        self.arrive(&frames, 0);
        Ok(())
    }

    /// Ethernet, tags, IP and transport header, without lengths and checksums.
    fn headers(&mut self, is_ipv4: bool, is_tcp: bool) -> Result<Vec<u8>> {
        let shape = self.byte()?;
        let mut bytes = [SOURCE; 2].concat();
        for _ in 0..shape % 4 {
            bytes.extend([0x81, 0, 0, 7]);
        }
        let protocol = if is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        if is_ipv4 {
            let options = 4 * usize::from(shape >> 2 & 3);
            bytes.extend([8, 0, 0x45 + options as u8 / 4, 0, 0, 0, 0xff, 0xfe, 0, 0, 64, protocol]);
            bytes.resize(bytes.len() + 10 + options, 1);
        } else {
            let extensions = shape >> 2 & 3;
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0]);
            bytes.extend([if extensions > 0 { 60 } else { protocol }, 64]);
            bytes.resize(bytes.len() + 32, 9);
            for left in (0..extensions).rev() {
                bytes.extend([if left > 0 { 60 } else { protocol }, 0, 1, 4, 0, 0, 0, 0]);
            }
        }
        let transport = bytes.len();
        bytes.resize(transport + if is_tcp { 20 } else { 8 }, 3);
        if is_tcp {
            bytes[transport + 12] = 0x50;
            bytes[transport + 13] = shape;
        }
        Ok(bytes)
    }
}

/// Puts in lengths, the IPv4 identification and checksums. Headers that are longer than those of other frames stay wrong.
fn complete(frame: &mut [u8], is_ipv4: bool, transport: usize, number: u16) {
    let ip = if is_ipv4 { transport - 20 } else { transport - 40 };
    let is_tcp = frame[if is_ipv4 { ip + 9 } else { ip + 6 }] == PROTOCOL_TCP;
    let len = (frame.len() - transport) as u16;
    if is_ipv4 {
        frame[ip + 2..ip + 4].copy_from_slice(&(len + 20).to_be_bytes());
        frame[ip + 4..ip + 6].copy_from_slice(&number.to_be_bytes());
        frame[ip + 6..ip + 8].copy_from_slice(&[0x40, 0]);
        frame[ip + 10..ip + 12].fill(0);
        let mut sum = Sum::default();
        sum.add_bytes(&frame[ip..transport]);
        frame[ip + 10..ip + 12].copy_from_slice(&sum.checksum());
    } else {
        frame[ip + 4..ip + 6].copy_from_slice(&len.to_be_bytes());
    }
    if !is_tcp {
        frame[transport + 4..transport + 6].copy_from_slice(&len.to_be_bytes());
    }
    let at = transport + if is_tcp { 16 } else { 6 };
    frame[at..at + 2].fill(0);
    let mut sum = Sum::default();
    sum.add_bytes(&frame[if is_ipv4 { ip + 12 } else { ip + 8 }..]);
    sum.add_bytes(&u32::from(len).to_be_bytes());
    sum.add_bytes(&[0, 0, 0, if is_tcp { PROTOCOL_TCP } else { PROTOCOL_UDP }]);
    frame[at..at + 2].copy_from_slice(&sum.checksum_not_zero());
}
