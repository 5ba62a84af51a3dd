use proptest::prelude::*;
use proptest::sample::Index;

use super::super::gro::{Fate, Gro, Merging};
use super::packet::{Ip, Packet, Transport};
use super::segment::segments;
use crate::fixture::{Guest, cases};
use crate::guest_memory::Segment;

const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const MRG_RXBUF: u64 = 1 << 15;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;
const ALL: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | MRG_RXBUF | GUEST_USO4 | GUEST_USO6;
/// Of a driver that cuts what was merged.
const CUT: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 56;
const BURST: usize = 64;
const FRAGMENT_AT: usize = 14 + 6;

/// What the guest gets of a burst: frames as they were, or large packets with their virtio-net header.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Got {
    frame: Vec<u8>,
    net_header: Option<[u8; 10]>,
    /// Frames of the burst that are in it.
    count: usize,
}

/// Merges a burst; each frame lies in pieces of `piece` bytes.
fn merge(features: u64, frames: &[Vec<u8>], piece: usize) -> Vec<Got> {
    let guest = Guest::of_pages(frames.iter().map(|frame| frame.len() as u64 / 4096 + 1).sum::<u64>() + 1);
    let (mut gro, mut pieces, mut at) = (Gro::new(Merging::of_features(features), BURST), Vec::new(), 0);
    gro.begin();
    let mut bounds = Vec::new();
    for frame in frames {
        let first = pieces.len();
        for part in frame.chunks(piece) {
            guest.memory.write(guest.umem(at), part);
            pieces.push(Segment { addr: guest.umem(at), len: part.len() as u32 });
            at += part.len() as u64;
        }
        gro.add(&guest.memory, &pieces, first);
        bounds.push((first, pieces.len()));
    }
    let mut got = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        match gro.fate(index) {
            Fate::Merged => {}
            Fate::Alone => got.push(Got { frame: frame.clone(), net_header: None, count: 1 }),
            Fate::First => {
                let large = gro.large(index).unwrap();
                let mut bytes = large.headers().to_vec();
                let mut count = 0;
                for (pieces, headers) in gro.packet(index) {
                    let part = bounds.iter().position(|&bounds| bounds == pieces).unwrap();
                    bytes.extend(&frames[part][headers..]);
                    count += 1;
                }
                got.push(Got { frame: bytes, net_header: Some(large.net_header), count });
            }
        }
    }
    got
}

/// Cuts a large packet as the tx offloads do, which are proven against the kernel's.
fn cut(got: &Got) -> Vec<Vec<u8>> {
    got.net_header.map_or_else(|| vec![got.frame.clone()], |header| segments(&got.frame, header, CUT).unwrap().0)
}

fn tcp(sequence: u32) -> Packet {
    let transport = Transport::Tcp { sequence, flags: 0x10, options: vec![] };
    Packet { vlans: vec![], ip: Ip::V4 { id: 7, options: vec![] }, transport, payload: vec![3; 3000] }
}

fn udp() -> Packet {
    Packet { transport: Transport::Udp, ..tcp(0) }
}

/// A TCP flow whose frames may be merged, whatever its options and tags are, or a stream of datagrams.
fn flow() -> impl Strategy<Value = Packet> {
    let words = |most| prop::collection::vec(any::<[u8; 4]>(), 0..=most).prop_map(|words| words.concat());
    let ip =
        prop_oneof![any::<u16>().prop_map(|id| Ip::V4 { id, options: vec![] }), Just(Ip::V6 { extensions: vec![] })];
    let flags = prop::sample::select(vec![0x10u8, 0x18, 0x11, 0x50, 0x59]);
    let transport = prop_oneof![
        3 => (any::<u32>(), flags, words(10))
            .prop_map(|(sequence, flags, options)| Transport::Tcp { sequence, flags, options }),
        1 => Just(Transport::Udp),
    ];
    let payload = prop::collection::vec(any::<u8>(), 1..200)
        .prop_flat_map(|bytes| (1usize..80).prop_map(move |times| bytes.repeat(times)));
    (prop::collection::vec(any::<u16>(), 0..=2), ip, transport, payload)
        .prop_map(|(vlans, ip, transport, payload)| Packet { vlans, ip, transport, payload })
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_what_was_merged_is_cut_into_the_very_same_frames(
        flow in flow(), size in 400usize..1448, piece in prop_oneof![Just(65536usize), 200usize..600],
    ) {
        let frames = flow.segments(size);
        let frames = &frames[..frames.len().min(BURST)];
        let got = merge(ALL, frames, piece);
        prop_assert_eq!(got.iter().flat_map(cut).collect::<Vec<_>>(), frames);
        prop_assert_eq!(got.len(), 1, "of {} frames", frames.len());
    }

    #[test]
    fn test_frames_of_several_flows_keep_their_order_in_each_flow(
        flows in prop::collection::vec((flow(), 400usize..1448), 1..12), order in prop::collection::vec(any::<Index>(), BURST),
    ) {
        let mut streams: Vec<_> = flows.iter().enumerate().map(|(number, (flow, size))| {
            let vlans = vec![number as u16];
            Packet { vlans, ..flow.clone() }.segments(*size).into_iter()
        }).collect();
        let frames: Vec<_> = order.iter().filter_map(|which| which.get_mut(&mut streams).next()).collect();
        let got = merge(ALL, &frames, 1 << 16);
        let tag = |frame: &Vec<u8>| frame[14..16].to_vec();
        for number in 0..flows.len() as u16 {
            let of_flow = |frames: Vec<Vec<u8>>| -> Vec<Vec<u8>> {
                frames.into_iter().filter(|frame| tag(frame) == number.to_be_bytes()).collect()
            };
            prop_assert_eq!(of_flow(got.iter().flat_map(cut).collect()), of_flow(frames.clone()));
        }
        prop_assert_eq!(got.iter().map(|got| got.count).sum::<usize>(), frames.len());
    }

    #[test]
    fn test_frames_of_whatever_bytes_come_out_as_they_went_in(
        flow in flow(), size in 400usize..1448, changes in prop::collection::vec((any::<Index>(), 0usize..100, any::<u8>()), 0..6),
        cuts in prop::collection::vec((any::<Index>(), 0usize..1500), 0..3), features: u64,
    ) {
        let mut frames = flow.segments(size);
        frames.truncate(BURST);
        for (which, at, byte) in changes {
            let frame = which.get_mut(&mut frames);
            let at = at.min(frame.len() - 1);
            frame[at] = byte;
        }
        for (which, len) in cuts {
            which.get_mut(&mut frames).truncate(len.max(14));
        }
        let mut came: Vec<_> = merge(features | GUEST_CSUM, &frames, 1 << 16).iter().flat_map(cut).collect();
        // A flow that was changed into another one may come in front of it.
        came.sort();
        frames.sort();
        prop_assert_eq!(came, frames);
    }
}

/// Number of frames in each packet that the guest gets of `frames`.
fn counts(frames: &[Vec<u8>]) -> Vec<usize> {
    merge(ALL, frames, 1 << 16).iter().map(|got| got.count).collect()
}

/// Three segments, the second of them changed and its checksums made anew.
fn with_second(change: impl FnOnce(&mut Packet)) -> Vec<Vec<u8>> {
    let mut frames = tcp(1).segments(1000);
    let mut second = tcp(1001);
    second.payload.truncate(1000);
    if let Ip::V4 { id, .. } = &mut second.ip {
        *id += 1;
    }
    change(&mut second);
    frames[1] = second.frame(true);
    frames
}

/// As [`with_second`], with a byte of the frame changed and all checksums right.
fn with_byte(at: usize, byte: u8) -> Vec<Vec<u8>> {
    let mut frames = with_second(|_| {});
    frames[1][at] = byte;
    for sum_at in [24, 50] {
        frames[1][sum_at..sum_at + 2].fill(0);
    }
    let ip = super::checksum::reference(&frames[1][14..34]);
    frames[1][24..26].copy_from_slice(&ip);
    let len = (frames[1].len() - 34) as u16;
    let pseudo = [&frames[1][26..34], &[0, frames[1][23]], &len.to_be_bytes(), &frames[1][34..]].concat();
    let tcp = super::checksum::reference(&pseudo);
    frames[1][50..52].copy_from_slice(&tcp);
    frames
}

fn flags_of(packet: &mut Packet, set: u8) {
    if let Transport::Tcp { flags, .. } = &mut packet.transport {
        *flags = set;
    }
}

#[test]
fn test_segments_that_follow_one_another_are_merged() {
    assert_eq!(counts(&with_second(|_| {})), [3]);
    assert_eq!(counts(&with_byte(0, 2)), [3], "the byte that is there already");
}

#[test]
fn test_the_guest_is_told_how_to_cut_and_that_the_checksum_is_unfinished() {
    let got = &merge(ALL, &tcp(1).segments(1000), 1 << 16)[0];
    let request = tcp(1).request();
    assert_eq!(got.frame, request.frame, "as a guest would leave it to us");
    // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
    assert_eq!(got.net_header, Some([1, 1, 54, 0, 232, 3, 34, 0, 16, 0]));
    let udp = Packet { ip: Ip::V6 { extensions: vec![] }, ..udp() };
    let got = &merge(ALL, &udp.segments(1000), 1 << 16)[0];
    assert_eq!((&got.frame, got.net_header), (&udp.request().frame, Some([1, 5, 62, 0, 232, 3, 54, 0, 6, 0])));
}

#[test]
fn test_only_what_was_negotiated_is_merged() {
    let tcp6 = Packet { ip: Ip::V6 { extensions: vec![] }, ..tcp(1) };
    let udp6 = Packet { ip: Ip::V6 { extensions: vec![] }, ..udp() };
    for (packet, feature) in [(tcp(1), GUEST_TSO4), (tcp6, GUEST_TSO6), (udp(), GUEST_USO4), (udp6, GUEST_USO6)] {
        let packets = |features| merge(features, &packet.segments(1000), 1 << 16).len();
        assert_eq!(packets(GUEST_CSUM | MRG_RXBUF | feature), 1);
        for lacking in [GUEST_CSUM, MRG_RXBUF, feature] {
            assert_eq!(packets(ALL & !lacking), 3, "without {lacking:#x}");
        }
    }
    assert!(Merging::of_features(GUEST_CSUM | MRG_RXBUF).is_none() && !Merging::of_features(ALL).is_none());
}

#[test]
fn test_what_differs_between_segments_keeps_them_apart() {
    let cases: [(&str, Vec<Vec<u8>>); 14] = [
        (
            "a gap",
            with_second(|packet| packet.transport = Transport::Tcp { sequence: 1002, flags: 0x10, options: vec![] }),
        ),
        (
            "an option",
            with_second(|packet| {
                packet.transport = Transport::Tcp { sequence: 1001, flags: 0x10, options: vec![1, 1, 1, 1] }
            }),
        ),
        ("another VLAN", with_second(|packet| packet.vlans = vec![5])),
        ("an identification that skips one", with_byte(19, 200)),
        ("the source's MAC address", with_byte(11, 9)),
        ("TOS", with_byte(15, 3)),
        ("no DF", with_byte(20, 0)),
        ("TTL", with_byte(22, 63)),
        ("an address", with_byte(29, 9)),
        ("a port", with_byte(35, 9)),
        ("what is acknowledged", with_byte(45, 9)),
        ("a reserved bit of the TCP header", with_byte(46, 0x51)),
        ("the window", with_byte(49, 9)),
        ("the urgent pointer", with_byte(53, 9)),
    ];
    for (what, frames) in cases {
        assert_eq!(counts(&frames), [1, 1, 1], "{what}");
    }
}

#[test]
fn test_what_no_segment_may_have_is_never_merged() {
    for flags in [0x00, 0x12, 0x14, 0x30, 0x90] {
        assert_eq!(counts(&with_second(|packet| flags_of(packet, flags))), [1, 1, 1], "flags {flags:#x}");
    }
    for (what, at, byte) in
        [("more fragments", FRAGMENT_AT, 0x60), ("a reserved flag", FRAGMENT_AT, 0xc0), ("an offset", 21, 1)]
    {
        assert_eq!(counts(&with_byte(at, byte)), [1, 1, 1], "{what}");
    }
    let options = with_second(|packet| packet.ip = Ip::V4 { id: 8, options: vec![1; 4] });
    assert_eq!(counts(&options), [1, 1, 1], "IPv4 options");
    let empty = with_second(|packet| packet.payload.clear());
    assert_eq!(counts(&empty), [1, 1, 1], "an acknowledgement alone");
    let mut padded = with_second(|_| {});
    padded[1].push(0);
    assert_eq!(counts(&padded), [1, 1, 1], "a byte behind the packet");
}

#[test]
fn test_a_wrong_checksum_is_not_made_right() {
    for frame in 0..3 {
        for at in [24, 50, 700] {
            let mut frames = with_second(|_| {});
            frames[frame][at] ^= 1;
            let got = merge(ALL, &frames, 1 << 16);
            let wrong = got.iter().position(|got| got.frame == frames[frame]);
            assert_eq!(got[wrong.unwrap()].net_header, None, "byte {at} of frame {frame}");
        }
    }
    let mut datagrams = udp().segments(1000);
    datagrams[1][40..42].fill(0);
    assert_eq!(counts(&datagrams), [1, 1, 1], "a datagram without checksum");
}

#[test]
fn test_a_shorter_segment_a_push_and_an_end_end_a_packet() {
    let short = with_second(|packet| packet.payload.truncate(999));
    assert_eq!(counts(&short), [2, 1]);
    for flags in [0x18, 0x11] {
        assert_eq!(counts(&with_second(|packet| flags_of(packet, flags))), [2, 1], "flags {flags:#x}");
    }
    let longer = with_second(|packet| packet.payload.push(3));
    assert_eq!(counts(&longer), [1, 1, 1], "a longer one begins another, which the third does not fit");
    let mut datagrams = udp().segments(900);
    let extra = datagrams[0].clone();
    datagrams.push(extra);
    assert_eq!(counts(&datagrams), [4, 1], "the last of them was short");
}

#[test]
fn test_identifications_count_up_or_stay_the_same_where_nobody_may_look_at_them() {
    let ids = |ids: [u16; 3]| -> Vec<usize> {
        let mut frames = with_second(|_| {});
        for (frame, id) in frames.iter_mut().zip(ids) {
            frame[18..20].copy_from_slice(&id.to_be_bytes());
            frame[24..26].fill(0);
            let sum = super::checksum::reference(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum);
        }
        counts(&frames)
    };
    assert_eq!(ids([65534, 65535, 0]), [3]);
    assert_eq!(ids([5, 5, 5]), [3], "these may not be fragmented");
    assert_eq!(ids([5, 5, 6]), [2, 1]);
    assert_eq!(ids([5, 6, 6]), [2, 1]);
    assert_eq!(ids([5, 7, 8]), [1, 2]);
}

#[test]
fn test_no_packet_is_longer_than_its_length_field_says() {
    let long = Packet { payload: vec![1; 64 * 1400], ..tcp(1) };
    let got = merge(ALL, &long.segments(1400), 1 << 16);
    assert_eq!(got.iter().map(|got| got.count).collect::<Vec<_>>(), [46, 18]);
    assert!(got.iter().all(|got| got.frame.len() - 14 <= 0xffff));
}

#[test]
fn test_a_frame_of_no_known_flow_ends_all_packets() {
    let frames = tcp(1).segments(1000);
    let arp = [&[0xff; 12][..], &[8, 6], &[0; 46]].concat();
    assert_eq!(counts(&[frames[0].clone(), arp, frames[1].clone(), frames[2].clone()]), [1, 1, 2]);
}

#[test]
fn test_as_many_flows_as_there_is_room_for_are_merged_at_once() {
    let streams: Vec<_> = (0..9).map(|vlan| Packet { vlans: vec![vlan], ..tcp(1) }.segments(1500)).collect();
    let interleaved = |flows: usize| -> Vec<Vec<u8>> {
        (0..2).flat_map(|i| streams[..flows].iter().map(move |frames| frames[i].clone())).collect()
    };
    assert_eq!(counts(&interleaved(8)), [2; 8]);
    assert_eq!(counts(&interleaved(9)), [1; 18], "the oldest makes room for the ninth, and so on");
}
