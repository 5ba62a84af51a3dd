//! Packets built from nothing, field by field: what a large frame of the guest and each of its segments should be.

use super::checksum::reference;

#[derive(Debug, Clone)]
pub enum Ip {
    V4 { id: u16, options: Vec<u8> },
    V6 { extensions: Vec<(u8, Vec<u8>)> },
}

#[derive(Debug, Clone)]
pub enum Transport {
    Tcp { sequence: u32, flags: u8, options: Vec<u8> },
    Udp,
}

#[derive(Debug, Clone)]
pub struct Packet {
    pub vlans: Vec<u16>,
    pub ip: Ip,
    pub transport: Transport,
    pub payload: Vec<u8>,
}

/// A frame of a guest: with its virtio-net header's fields.
pub struct Request {
    pub frame: Vec<u8>,
    pub sum_start: u16,
    pub sum_offset: u16,
}

pub const NEEDS_CSUM: u8 = 1;
pub const ECN: u8 = 0x80;
const FIN_PSH: u8 = 9;
const CWR: u8 = 0x80;
/// Of which the pseudo header is made.
const ADDRESSES: [u8; 32] = *b"from this station..to that one..";

impl Packet {
    pub fn gso_type(&self) -> u8 {
        match (&self.transport, &self.ip) {
            (Transport::Udp, _) => 5,
            (_, Ip::V4 { .. }) => 1,
            (_, Ip::V6 { .. }) => 4,
        }
    }

    fn protocol(&self) -> u8 {
        if matches!(self.transport, Transport::Udp) { 17 } else { 6 }
    }

    fn ethernet(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for (i, tag) in self.vlans.iter().rev().enumerate().rev() {
            bytes.extend(if i == 0 { [0x81, 0] } else { [0x88, 0xa8] });
            bytes.extend(tag.to_be_bytes());
        }
        bytes.extend(if matches!(self.ip, Ip::V4 { .. }) { [8, 0] } else { [0x86, 0xdd] });
        bytes
    }

    fn ip(&self, len_behind: usize) -> Vec<u8> {
        match &self.ip {
            Ip::V4 { id, options } => {
                let header_bytes = 20 + options.len();
                let mut bytes = vec![0x40 | (header_bytes / 4) as u8, 2];
                bytes.extend(((header_bytes + len_behind) as u16).to_be_bytes());
                bytes.extend(id.to_be_bytes());
                bytes.extend([0x40, 0, 64, self.protocol(), 0, 0]);
                bytes.extend(&ADDRESSES[..8]);
                bytes.extend(options);
                let checksum = reference(&bytes);
                bytes[10..12].copy_from_slice(&checksum);
                bytes
            }
            Ip::V6 { extensions } => {
                let kinds = extensions.iter().map(|(kind, _)| *kind).chain([self.protocol()]);
                let mut kinds = kinds.collect::<Vec<_>>().into_iter();
                let extension_bytes: usize = extensions.iter().map(|(_, body)| body.len() + 2).sum();
                let mut bytes = vec![0x60, 1, 2, 3];
                bytes.extend(((extension_bytes + len_behind) as u16).to_be_bytes());
                bytes.extend([kinds.next().unwrap(), 64]);
                bytes.extend(ADDRESSES);
                for ((_, body), next) in extensions.iter().zip(kinds) {
                    bytes.extend([next, (body.len() / 8) as u8]);
                    bytes.extend(body);
                }
                bytes
            }
        }
    }

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let addresses = if matches!(self.ip, Ip::V4 { .. }) { &ADDRESSES[..8] } else { &ADDRESSES[..] };
        let mut bytes = addresses.to_vec();
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([0, self.protocol()]);
        bytes
    }

    /// The transport header, its checksum zero.
    fn transport(&self, payload_bytes: usize) -> Vec<u8> {
        match &self.transport {
            Transport::Tcp { sequence, flags, options } => {
                let mut bytes = vec![0x12, 0x34, 0x56, 0x78];
                bytes.extend(sequence.to_be_bytes());
                bytes.extend([9, 8, 7, 6, ((20 + options.len()) / 4 * 16) as u8, *flags, 1, 0, 0, 0, 0, 0]);
                bytes.extend(options);
                bytes
            }
            Transport::Udp => {
                let mut bytes = vec![0x12, 0x34, 0x56, 0x78];
                bytes.extend(((8 + payload_bytes) as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes
            }
        }
    }

    fn sum_offset(&self) -> usize {
        if matches!(self.transport, Transport::Udp) { 6 } else { 16 }
    }

    /// The frame that is sent for this packet alone; the checksum that TCP segments have may be zero.
    pub fn frame(&self, is_segment: bool) -> Vec<u8> {
        let mut transport = self.transport(self.payload.len());
        transport.extend(&self.payload);
        let mut covered = self.pseudo_header(transport.len());
        covered.extend(&transport);
        let mut checksum = reference(&covered);
        if checksum == [0, 0] && !(is_segment && self.protocol() == 6) {
            checksum = [0xff, 0xff];
        }
        let at = self.sum_offset();
        transport[at..at + 2].copy_from_slice(&checksum);
        [self.ethernet(), self.ip(transport.len()), transport].concat()
    }

    /// The same, from a driver that leaves the checksum to us: the field has the pseudo header's sum.
    pub fn request(&self) -> Request {
        let mut transport = self.transport(self.payload.len());
        transport.extend(&self.payload);
        let at = self.sum_offset();
        let sum = reference(&self.pseudo_header(transport.len())).map(|byte| !byte);
        transport[at..at + 2].copy_from_slice(&sum);
        let [ethernet, ip] = [self.ethernet(), self.ip(transport.len())];
        let sum_start = (ethernet.len() + ip.len()) as u16;
        Request { frame: [ethernet, ip, transport].concat(), sum_start, sum_offset: at as u16 }
    }

    /// What it is cut into.
    pub fn segments(&self, payload_max: usize) -> Vec<Vec<u8>> {
        let parts: Vec<&[u8]> =
            if self.payload.is_empty() { vec![&[]] } else { self.payload.chunks(payload_max).collect() };
        let last = parts.len() - 1;
        let segment = |(i, part): (usize, &&[u8])| {
            let mut packet = Self { payload: part.to_vec(), ..self.clone() };
            if let Ip::V4 { id, .. } = &mut packet.ip {
                *id = id.wrapping_add(i as u16);
            }
            if let Transport::Tcp { sequence, flags, .. } = &mut packet.transport {
                *sequence = sequence.wrapping_add((i * payload_max) as u32);
                *flags &= if i == last { 0xff } else { !FIN_PSH } & if i == 0 { 0xff } else { !CWR };
            }
            packet.frame(true)
        };
        parts.iter().enumerate().map(segment).collect()
    }
}

/// A virtio-net header, without num_buffers.
pub fn net_header(flags: u8, gso_type: u8, gso_size: u16, request: &Request) -> [u8; 10] {
    let [[size_low, size_high], [start_low, start_high], [offset_low, offset_high]] =
        [gso_size, request.sum_start, request.sum_offset].map(u16::to_le_bytes);
    // hdr_len is a hint, and a wrong one here.
    [flags, gso_type, 7, 0, size_low, size_high, start_low, start_high, offset_low, offset_high]
}
