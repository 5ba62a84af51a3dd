//! Frames of which a checksum or segmentation is asked: mostly in good order, often with something wrong.

use arbitrary::Result;

use super::Case;

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
