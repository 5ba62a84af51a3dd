use proptest::prelude::*;

use super::super::headers::{HEADERS_MAX, NetHeader, Offloads};
use super::super::segment::Segmenter;
use super::packet::{ECN, Ip, NEEDS_CSUM, Packet, Request, Transport, net_header};
use crate::fixture::cases;
use crate::stats::{DropReason, Offload};

const CSUM: u64 = 1;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const HOST_USO: u64 = 1 << 56;
const ALL: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
const SEGMENT_MAX: u32 = 3840;

fn words(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<[u8; 4]>(), 0..=most).prop_map(|words| words.concat())
}

fn ip() -> impl Strategy<Value = Ip> {
    let extension = (prop::sample::select(vec![0u8, 43, 60]), prop::sample::select(vec![6usize, 14, 30]));
    let body = extension.prop_map(|(kind, bytes)| (kind, vec![0; bytes]));
    prop_oneof![
        (any::<u16>(), words(10)).prop_map(|(id, options)| Ip::V4 { id, options }),
        prop::collection::vec(body, 0..4).prop_map(|extensions| Ip::V6 { extensions }),
    ]
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![
        3 => (any::<u32>(), any::<u8>(), words(10))
            .prop_map(|(sequence, flags, options)| Transport::Tcp { sequence, flags, options }),
        1 => Just(Transport::Udp),
    ]
}

/// Payload of few kinds of bytes, so that sums that end in zeros come up.
fn packet() -> impl Strategy<Value = Packet> {
    let byte = prop_oneof![Just(0u8), Just(0xffu8), any::<u8>()];
    let payload = (prop::collection::vec(byte, 0..300), 1usize..30).prop_map(|(bytes, times)| bytes.repeat(times));
    (prop::collection::vec(any::<u16>(), 0..=2), ip(), transport(), payload)
        .prop_map(|(vlans, ip, transport, payload)| Packet { vlans, ip, transport, payload })
}

/// All segments of a frame.
pub(crate) fn segments(frame: &[u8], header: [u8; 10], features: u64) -> Result<(Vec<Vec<u8>>, Offload), DropReason> {
    let mut segmenter = Segmenter::default();
    let len = frame.len() as u32;
    let read = |beginning: &mut [u8]| beginning.copy_from_slice(&frame[..beginning.len()]);
    segmenter.begin(Offloads::of_features(features), &NetHeader::parse(header), len, SEGMENT_MAX, read)?;
    let mut at = segmenter.headers() as usize;
    let mut made = Vec::new();
    loop {
        let payload = &frame[at..at + segmenter.next_payload() as usize];
        at += payload.len();
        let headers = segmenter.make(|sum| sum.add_bytes(payload));
        made.push([headers, payload].concat());
        if segmenter.is_done() {
            return Ok((made, segmenter.offload().unwrap()));
        }
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_segments_are_those_that_one_would_build(packet in packet(), size in 1u16..1500, ecn: bool) {
        let request = packet.request();
        let ecn = if ecn && matches!(packet.transport, Transport::Tcp { .. }) { ECN } else { 0 };
        let header = net_header(NEEDS_CSUM, packet.gso_type() | ecn, size, &request);
        let (made, offload) = segments(&request.frame, header, ALL).unwrap();
        prop_assert_eq!(made, packet.segments(usize::from(size)));
        let expected = match packet.gso_type() { 1 => Offload::Tso4, 4 => Offload::Tso6, _ => Offload::Uso };
        prop_assert_eq!(offload, expected);
    }

    #[test]
    fn test_a_missing_checksum_is_put_in_and_nothing_else_changes(packet in packet()) {
        let mut packet = packet;
        packet.payload.truncate(1200);
        let request = packet.request();
        let (made, offload) = segments(&request.frame, net_header(NEEDS_CSUM, 0, 99, &request), CSUM).unwrap();
        prop_assert_eq!((made, offload), (vec![packet.frame(false)], Offload::Checksum));
    }

    #[test]
    fn test_no_header_of_whatever_bytes_is_a_panic_or_an_endless_frame(
        packet in packet(), cut in any::<prop::sample::Index>(), changes in prop::collection::vec(any::<(u8, u8)>(), 0..4),
        flags: u8, kind in prop_oneof![Just(0u8), Just(1), Just(4), Just(5), any::<u8>()], fields: [u16; 3], which: u8,
    ) {
        let mut request = packet.request();
        for (at, byte) in changes {
            let at = usize::from(at).min(request.frame.len() - 1);
            request.frame[at] = byte;
        }
        request.frame.truncate(14 + cut.index(request.frame.len()));
        let [size, start, offset] = fields;
        request.sum_start = if which & 1 == 0 { start % 700 } else { request.sum_start };
        request.sum_offset = if which & 2 == 0 { offset % 700 } else { request.sum_offset };
        let header = net_header(flags | which & 1, kind, size, &request);
        if let Ok((made, _)) = segments(&request.frame, header, ALL) {
            let headers = made[0].len().min(HEADERS_MAX);
            let bytes: usize = made.iter().map(Vec::len).sum();
            prop_assert!(bytes >= request.frame.len() && made.len() <= request.frame.len() + 1);
            prop_assert!(made.iter().all(|segment| segment.len() <= SEGMENT_MAX as usize), "{headers}");
        }
    }
}

fn tcp4() -> Packet {
    let transport = Transport::Tcp { sequence: 1, flags: 0x18, options: vec![] };
    Packet { vlans: vec![], ip: Ip::V4 { id: 1, options: vec![] }, transport, payload: vec![7; 3000] }
}

/// What becomes of `packet`, with its frame and virtio-net header changed.
fn refused(packet: &Packet, features: u64, change: impl FnOnce(&mut Request, &mut [u8; 10])) -> Option<DropReason> {
    let mut request = packet.request();
    let mut header = net_header(NEEDS_CSUM, packet.gso_type(), 1000, &request);
    change(&mut request, &mut header);
    segments(&request.frame, header, features).err()
}

#[test]
fn test_what_was_not_negotiated_is_refused() {
    let (tcp4, tcp6) = (tcp4(), Packet { ip: Ip::V6 { extensions: vec![] }, ..tcp4() });
    let udp = Packet { transport: Transport::Udp, ..tcp4.clone() };
    for (packet, feature) in [(&tcp4, HOST_TSO4), (&tcp6, HOST_TSO6), (&udp, HOST_USO)] {
        assert_eq!(refused(packet, CSUM | feature, |_, _| {}), None);
        assert_eq!(refused(packet, ALL & !feature, |_, _| {}), Some(DropReason::BadSegmentRequest));
        assert_eq!(refused(packet, ALL & !CSUM, |_, _| {}), Some(DropReason::BadSegmentRequest));
    }
    let with_ecn = |_: &mut Request, header: &mut [u8; 10]| header[1] |= ECN;
    assert_eq!(refused(&tcp4, CSUM | HOST_TSO4 | HOST_ECN, with_ecn), None);
    assert_eq!(refused(&tcp4, CSUM | HOST_TSO4, with_ecn), Some(DropReason::BadSegmentRequest));
    assert_eq!(refused(&udp, ALL, with_ecn), Some(DropReason::BadSegmentRequest));
    assert!(Offloads::of_features(ALL & !CSUM).is_none() && Offloads::of_features(1 << 32).is_none());
}

#[test]
fn test_what_cannot_be_segmented_right_is_refused() {
    type Change = fn(&mut Request, &mut [u8; 10]);
    let cases: [(&str, Change); 14] = [
        ("no payload in a segment", |_, header| header[4..6].fill(0)),
        ("without a checksum", |_, header| header[0] = 0),
        ("UDP fragments", |_, header| header[1] = 3),
        ("ECN alone", |_, header| header[1] = ECN),
        ("another IP version than said", |_, header| header[1] = 4),
        ("another protocol than said", |request, _| request.frame[14 + 9] = 17),
        ("the checksum of another header", |_, header| header[6] += 1),
        ("the checksum in another place", |_, header| header[8] += 2),
        ("a fragment", |request, _| request.frame[14 + 7] = 1),
        ("a first fragment", |request, _| request.frame[14 + 6] = 0x20),
        ("no IP header", |request, _| request.frame[14] = 0x44),
        ("another ethertype", |request, _| request.frame[13] = 6),
        ("no TCP header", |request, _| request.frame[34 + 12] = 0x40),
        ("a TCP header longer than the frame", |request, _| {
            request.frame.truncate(60);
            request.frame[34 + 12] = 0xf0;
        }),
    ];
    for (what, change) in cases {
        assert_eq!(refused(&tcp4(), ALL, change), Some(DropReason::BadSegmentRequest), "{what}");
    }
    let tcp6 = |extensions| Packet { ip: Ip::V6 { extensions }, ..tcp4() };
    let refused = |extensions| refused(&tcp6(extensions), ALL, |_, _| {});
    assert_eq!(refused(vec![(44, vec![0; 6])]), Some(DropReason::BadSegmentRequest), "a fragment header");
    assert_eq!(refused(vec![(60, vec![0; 254]), (60, vec![0; 126])]), None);
    assert_eq!(refused(vec![(60, vec![0; 254]), (60, vec![0; 254])]), Some(DropReason::BadSegmentRequest), "no room");
}

#[test]
fn test_segments_longer_than_a_frame_may_be_are_refused() {
    let with_size = |size: u16| refused(&tcp4(), ALL, |_, header| header[4..6].copy_from_slice(&size.to_le_bytes()));
    let longer = Packet { payload: vec![7; 4000], ..tcp4() };
    assert_eq!(with_size(u16::MAX), None, "all of it fits one segment");
    let size = SEGMENT_MAX as u16 - 54;
    let change =
        |size: u16| move |_: &mut Request, header: &mut [u8; 10]| header[4..6].copy_from_slice(&size.to_le_bytes());
    assert_eq!(refused(&longer, ALL, change(size)), None);
    assert_eq!(refused(&longer, ALL, change(size + 1)), Some(DropReason::Oversize));
    let huge = Packet { payload: vec![7; (512 << 10) + 1000], ..tcp4() };
    assert_eq!(refused(&huge, ALL, |_, _| {}), Some(DropReason::Oversize));
}

#[test]
fn test_checksums_without_a_place_are_refused() {
    let packet = Packet { payload: vec![7; 600], ..tcp4() };
    let at = |start: u16, offset: u16| {
        refused(&packet, ALL, |_, header| {
            header[1] = 0;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        })
    };
    assert_eq!(at(0, 0), Some(DropReason::BadChecksumRequest), "in the addresses");
    assert_eq!(at(13, 0), Some(DropReason::BadChecksumRequest), "in the Ethernet header");
    assert_eq!(at(14, 0), None);
    assert_eq!(at(500, 10), None, "the last place");
    assert_eq!(at(500, 11), Some(DropReason::BadChecksumRequest), "beyond what is looked at");
    assert_eq!(at(u16::MAX, u16::MAX), Some(DropReason::BadChecksumRequest));
    let short = Packet { payload: vec![], ..tcp4() };
    let start = |start: u16| {
        refused(&short, ALL, |_, header| {
            header[1] = 0;
            header[6..8].copy_from_slice(&start.to_le_bytes());
        })
    };
    assert_eq!(start(36), None, "the field is the frame's last");
    assert_eq!(start(37), Some(DropReason::BadChecksumRequest));
}

#[test]
fn test_a_checksum_of_zero_is_that_of_tcp_segments_alone() {
    let tcp = Packet { payload: vec![0; 100], ..tcp4() };
    let udp = Packet { transport: Transport::Udp, ..tcp.clone() };
    for (mut packet, field, of_segment) in [(tcp, 34 + 16, [0, 0]), (udp, 34 + 6, [0xff, 0xff])] {
        // With its checksum as payload a packet adds up to ones.
        let checksum: [u8; 2] = packet.frame(true)[field..field + 2].try_into().unwrap();
        packet.payload[98..].copy_from_slice(&checksum);
        let request = packet.request();
        for (gso_type, expected) in [(packet.gso_type(), of_segment), (0, [0xff, 0xff])] {
            let (made, _) = segments(&request.frame, net_header(NEEDS_CSUM, gso_type, 1000, &request), ALL).unwrap();
            assert_eq!(made[0][field..field + 2], expected);
        }
    }
}
