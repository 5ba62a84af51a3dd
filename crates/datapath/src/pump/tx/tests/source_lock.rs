use std::sync::atomic::{AtomicBool, Ordering};

use super::bench::{Bench, FRAME_MAX};
use crate::fixture::VIRTIO_F_VERSION_1;
use crate::offload::tests::packet::{Ip, NEEDS_CSUM, Packet, Transport, net_header};
use crate::stats::{BounceReason, DropReason};
use crate::xsk::BindMode;

/// CSUM, HOST_TSO4.
const OFFLOADS: u64 = VIRTIO_F_VERSION_1 | 1 | 1 << 11;
const SLOT_BYTES: u64 = 16384;
/// As `Packet` has it.
const MINE: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 3];
const ETHERNET: usize = 14;
const RACED_FRAMES: u32 = 30_000;

fn bench(features: u64, mode: BindMode) -> Bench {
    Bench::with_features(features, FRAME_MAX, mode, SLOT_BYTES).locked(&[[4; 6], MINE])
}

fn frame(source: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
    frame[6..12].copy_from_slice(&source);
    frame
}

fn post(bench: &mut Bench, source: [u8; 6], len: usize, cuts: &[usize]) {
    let frame = frame(source, len);
    assert!(bench.post_frame([0; 10], &frame, cuts, std::slice::from_ref(&frame)));
}

fn tcp4(payload_bytes: usize) -> Packet {
    Packet {
        vlans: vec![],
        ip: Ip::V4 { id: 1, options: vec![] },
        transport: Transport::Tcp { sequence: 7, flags: 0x18, options: vec![] },
        payload: vec![7; payload_bytes],
    }
}

#[test]
fn test_frames_of_the_guests_addresses_leave_with_a_header_of_ours_and_their_payload_in_place() {
    for packed in [false, true] {
        let mut bench = Bench::new(BindMode::Copy).packed(packed).locked(&[MINE]);
        for len in [14, 15, 60, 1514] {
            post(&mut bench, MINE, len, &[2000]);
            post(&mut bench, MINE, len, &[12, 5, 9, 700]);
        }
        bench.settle_down();
        let counts = bench.counts;
        assert_eq!((counts.frames, counts.direct, counts.header_split, bench.used), (8, 8, 8, 8));
        assert_eq!((counts.copied_bytes, counts.header_bytes), (8 * ETHERNET as u64, 8 * ETHERNET as u64));
        assert!(counts.offloaded.iter().all(|&count| count == 0));
        assert_eq!(bench.unsent.values().sum::<u32>(), 0);
    }
}

#[test]
fn test_other_sources_are_dropped_and_counted_and_the_rest_goes_on() {
    for features in [VIRTIO_F_VERSION_1, OFFLOADS] {
        let mut bench = bench(features, BindMode::Copy);
        post(&mut bench, OTHER, 60, &[2000]);
        post(&mut bench, MINE, 61, &[2000]);
        post(&mut bench, [0xff; 6], 62, &[12, 3, 50]);
        post(&mut bench, [4; 6], 63, &[12, 3, 50]);
        bench.settle_down();
        assert_eq!((bench.dropped(DropReason::Spoofed), bench.counts.frames, bench.used), (2, 2, 4));
        assert_eq!(bench.unsent[&frame(OTHER, 60)], 1);
        assert_eq!(bench.unsent[&frame([0xff; 6], 62)], 1);
    }
}

#[test]
fn test_what_is_no_frame_is_dropped_for_what_it_is() {
    let mut bench = bench(VIRTIO_F_VERSION_1, BindMode::Copy);
    post(&mut bench, MINE, 13, &[2000]);
    post(&mut bench, MINE, FRAME_MAX as usize + 1, &[2000]);
    bench.settle_down();
    assert_eq!((bench.dropped(DropReason::Runt), bench.dropped(DropReason::Oversize), bench.used), (1, 1, 2));
    bench.tx.vring.enabled = false;
    post(&mut bench, OTHER, 60, &[2000]);
    bench.settle_down();
    assert_eq!((bench.dropped(DropReason::Disabled), bench.dropped(DropReason::Spoofed)), (1, 0));
}

#[test]
fn test_a_header_that_is_rewritten_behind_the_check_leaves_as_it_was_checked() {
    let mut bench = bench(OFFLOADS, BindMode::Copy);
    let unsummed = tcp4(500);
    let large = tcp4(4000);
    for cuts in [&[2000][..], &[12, 14, 600], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 600]] {
        post(&mut bench, MINE, 600, cuts);
        for (packet, gso) in [(&unsummed, 0), (&large, 1)] {
            let request = packet.request();
            let segments = if gso == 0 { vec![packet.frame(false)] } else { packet.segments(1000) };
            assert!(bench.post_frame(net_header(NEEDS_CSUM, gso, 1000, &request), &request.frame, cuts, &segments));
        }
    }
    bench.burst();
    // The kernel has read nothing yet.
    bench.rewrite(&[0xff; ETHERNET]);
    bench.settle_down();
    assert_eq!(bench.unsent.values().sum::<u32>(), 0, "each frame that was seen is one that was posted");
    assert_eq!(bench.counts.frames, 3 * (1 + 1 + 4));
}

#[test]
fn test_where_the_driver_takes_one_piece_the_frame_is_copied_whole() {
    let mut bench = bench(VIRTIO_F_VERSION_1, BindMode::ZeroCopy);
    bench.xsk.rules.tx_pieces_max = 1;
    post(&mut bench, MINE, 600, &[2000]);
    post(&mut bench, OTHER, 600, &[2000]);
    bench.burst();
    bench.rewrite(&[0xff; 600]);
    bench.settle_down();
    assert_eq!((bench.bounced(BounceReason::TooManyPieces), bench.counts.copied_bytes), (1, 600));
    assert_eq!((bench.dropped(DropReason::Spoofed), bench.used), (1, 2));
}

#[test]
fn test_a_checksum_cannot_be_asked_for_where_addresses_are() {
    let mut bench = bench(OFFLOADS, BindMode::Copy);
    for (start, offset) in [(0u16, 0u16), (0, 6), (13, 20)] {
        let [[s, t], [o, p]] = [start.to_le_bytes(), offset.to_le_bytes()];
        let header = [NEEDS_CSUM, 0, 0, 0, 0, 0, s, t, o, p];
        assert!(bench.post_frame(header, &frame(MINE, 100), &[2000], &[]));
    }
    bench.settle_down();
    assert_eq!((bench.dropped(DropReason::BadChecksumRequest), bench.counts.frames, bench.used), (3, 0, 3));
}

/// A guest that changes its source address all the time, with a kernel that reads late: in place, and copied. Returns how
/// many frames left, and how many of those with another source.
fn race(mut bench: Bench) -> (u32, u32) {
    let (memory, slot) = bench.next_slot();
    // `post_frame` begins one byte into the slot, with a header of twelve.
    let source = slot.plus(1 + 12 + 6);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                memory.write(source, &MINE);
                memory.write(source, &OTHER);
            }
        });
        let (mut left, mut spoofed) = (0, 0);
        for _ in 0..RACED_FRAMES {
            assert!(bench.post_frame([0; 10], &frame(MINE, 60), &[2000], &[]));
            bench.burst();
            bench.kernel.send(usize::MAX);
            while bench.kernel.sending() > 0 {
                let sent = bench.kernel.complete(0);
                left += 1;
                spoofed += u32::from(sent[6..12] != MINE);
            }
            bench.burst();
            bench.take();
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(u64::from(left) + bench.dropped(DropReason::Spoofed), u64::from(RACED_FRAMES));
        (left, spoofed)
    })
}

#[test]
fn test_a_guest_that_rewrites_its_source_all_the_time_sends_what_was_checked() {
    for pieces_max in [1, 18] {
        let mut locked = bench(VIRTIO_F_VERSION_1, BindMode::Copy);
        locked.xsk.rules.tx_pieces_max = pieces_max;
        let (left, spoofed) = race(locked);
        assert!(left > 0 && left < RACED_FRAMES, "{left}: the race was lost and won");
        assert_eq!(spoofed, 0, "of {left}");
    }
    let (left, spoofed) = race(Bench::new(BindMode::Copy));
    assert!(left == RACED_FRAMES && spoofed > 0, "without a lock it does");
}
