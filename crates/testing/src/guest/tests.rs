//! The built-in guest against the model device.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;
use crate::driver::Segment;
use crate::eventfd::wait_readable;
use crate::memory::RegionConfig;
use crate::model_device::ModelDevice;
use crate::pattern::Stream;

const MODERN: u64 = features::VIRTIO_F_VERSION_1 | features::VIRTIO_F_EVENT_IDX | features::VIRTIO_NET_F_MRG_RXBUF;
const RX: usize = 0;
const TX: usize = 1;

fn config(features: u64) -> GuestConfig {
    GuestConfig {
        regions: vec![RegionConfig::memfd(0x10_0000, 4 << 20)],
        ring_region: 0,
        queue_pairs: 1,
        queue_size: 16,
        features,
        rx: BufferLayout::default(),
        tx: BufferLayout::default(),
        polling: false,
        canaries: true,
        capture_frames: 0,
    }
}

struct Bench {
    guest: Guest,
    rx: ModelDevice,
    tx: ModelDevice,
}

impl Bench {
    fn new(config: GuestConfig) -> Self {
        let event_idx = config.has(features::VIRTIO_F_EVENT_IDX);
        let guest = Guest::new(config).unwrap();
        let device = |index: usize| ModelDevice::new(&guest.memory, *guest.rings[index].layout(), event_idx);
        Self { rx: device(RX), tx: device(TX), guest }
    }

    fn start(&self, role: RxRole, source: Option<SourceConfig>) {
        self.guest.start(0, role, source, self.guest.config.polling).unwrap();
    }

    /// Gives the guest a frame, once it has a buffer for it.
    fn receive(&mut self, frame: &[u8]) {
        let header_bytes = self.guest.config.header_bytes();
        let (rx, events) = (&mut self.rx, self.guest.events(RX).unwrap());
        let mut call = false;
        eventually(|| match rx.receive(header_bytes, frame) {
            Some(wants_call) => {
                call = wants_call;
                true
            }
            None => false,
        });
        if call {
            events.call.signal();
        }
    }

    /// Takes the next frame that the guest sends, header included.
    fn transmit(&mut self) -> Vec<u8> {
        let mut stream = None;
        let tx = &mut self.tx;
        eventually(|| {
            stream = tx.transmit();
            stream.is_some()
        });
        self.guest.events(TX).unwrap().call.signal();
        stream.unwrap()
    }

    fn counters(&self) -> Counters {
        self.guest.counters(0).unwrap()
    }

    fn assert_clean(&self) {
        assert_eq!(self.guest.violations(0).unwrap(), Violations::default());
        let counters = self.counters();
        assert_eq!((counters.rx_tail_bytes_changed, counters.tx_bytes_changed), (0, 0));
        assert_eq!(self.guest.changed_gap_bytes().unwrap(), 0);
    }
}

fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "the condition was not met in 10 s");
        std::thread::yield_now();
    }
}

fn stream(sizes: &[u16]) -> Stream {
    Stream { seed: 1, destination: [2, 0, 0, 0, 0, 1], source: [2, 0, 0, 0, 0, 2], sizes: sizes.to_vec() }
}

fn frames(stream: &Stream, count: u32) -> Vec<Vec<u8>> {
    let frame = |sequence| {
        let mut frame = vec![0; 65536];
        let length = stream.write(sequence, &mut frame);
        frame.truncate(length);
        frame
    };
    (0..count).map(frame).collect()
}

fn layouts() -> Vec<BufferLayout> {
    let scattered =
        BufferLayout { pieces: vec![12, 33, 7, 1503], stride_bytes: 1601, offset_bytes: 1, ..BufferLayout::default() };
    vec![
        BufferLayout { pieces: vec![1536], stride_bytes: 1536, ..BufferLayout::default() },
        BufferLayout { pieces: vec![12, 1514], ..BufferLayout::default() },
        BufferLayout { indirect: true, ..scattered.clone() },
        scattered,
    ]
}

#[test]
fn test_every_layout_receives_checked_frames() {
    for layout in layouts() {
        for features in [MODERN, features::VIRTIO_F_VERSION_1, 0] {
            let features = features | features::VIRTIO_F_INDIRECT_DESC;
            let mut bench = Bench::new(GuestConfig { rx: layout.clone(), ..config(features) });
            bench.start(RxRole::Check, None);
            let frames = frames(&stream(&[60, 61, 577, 1514]), 200);
            for frame in &frames {
                bench.receive(frame);
            }
            eventually(|| bench.counters().rx_frames == 200);
            bench.guest.park().unwrap();
            assert_eq!(bench.guest.check_counts(), CheckCounts { good: 200, ..CheckCounts::default() });
            assert_eq!(bench.counters().rx_bytes, frames.iter().map(|frame| frame.len() as u64).sum::<u64>());
            bench.assert_clean();
        }
    }
}

#[test]
fn test_every_layout_sends_patterned_frames_in_order() {
    for layout in layouts() {
        for polling in [false, true] {
            let features = MODERN | features::VIRTIO_F_INDIRECT_DESC;
            let mut bench = Bench::new(GuestConfig { tx: layout.clone(), polling, ..config(features) });
            let stream = stream(&[60, 63, 800, 1514]);
            let source = SourceConfig { count: Some(100), ..SourceConfig::new(Payload::Pattern(stream.clone())) };
            bench.start(RxRole::Idle, Some(source));
            for frame in frames(&stream, 100) {
                let sent = bench.transmit();
                assert_eq!(sent[..12], [0; 12]);
                assert_eq!(sent[12..], frame);
            }
            eventually(|| bench.counters().tx_frames == 100);
            assert!(bench.tx.pop_avail().is_none(), "no frame beyond the count");
            bench.assert_clean();
        }
    }
}

#[test]
fn test_frames_over_many_small_buffers_are_put_together() {
    let small = BufferLayout { pieces: vec![200], ..BufferLayout::default() };
    let mut bench = Bench::new(GuestConfig { rx: small, ..config(MODERN) });
    bench.start(RxRole::Check, None);
    for frame in frames(&stream(&[1514, 60, 400]), 60) {
        let mut bytes = vec![0; 12];
        let buffers = (12 + frame.len()).div_ceil(200);
        bytes[10] = buffers as u8;
        bytes.extend_from_slice(&frame);
        let mut chains = Vec::new();
        eventually(|| {
            chains.extend(bench.rx.pop_avail());
            chains.len() == buffers
        });
        let used: Vec<_> = chains.iter().zip(bytes.chunks(200)).collect();
        for (chain, bytes) in &used {
            bench.rx.scatter(&chain.segments, bytes);
        }
        let used: Vec<_> = used.iter().map(|(chain, bytes)| (chain.head, bytes.len() as u32)).collect();
        bench.rx.push_used_together(&used);
        bench.guest.events(RX).unwrap().call.signal();
    }
    eventually(|| bench.counters().rx_frames == 60);
    assert_eq!(bench.guest.check_counts(), CheckCounts { good: 60, ..CheckCounts::default() });
    assert_eq!(bench.counters().rx_multi_buffer_frames, 40);
    bench.assert_clean();
}

#[test]
fn test_echo_sends_the_same_buffer_back_with_addresses_swapped() {
    for layout in layouts() {
        let features = MODERN | features::VIRTIO_F_INDIRECT_DESC;
        let mut bench = Bench::new(GuestConfig { rx: layout.clone(), ..config(features) });
        bench.start(RxRole::Echo, None);
        for mut frame in frames(&stream(&[60, 1514]), 100) {
            bench.receive(&frame);
            let sent = bench.transmit();
            frame[..12].rotate_left(6);
            assert_eq!((&sent[..12], &sent[12..]), (&[0; 12][..], &frame[..]));
        }
        eventually(|| bench.counters().tx_frames == 100);
        bench.assert_clean();
    }
}

#[test]
fn test_echo_reuses_the_address_of_the_received_frame() {
    let mut bench = Bench::new(config(MODERN));
    bench.start(RxRole::Echo, None);
    let mut rx_segment = Segment::writable(GuestPhysAddr(0), 0);
    let chain = bench.rx.pop_avail().unwrap();
    rx_segment.address = chain.segments[0].address;
    bench.rx.scatter(&chain.segments, &[[0; 12], [3; 12]].concat());
    bench.guest.memory.write(rx_segment.address.plus(10), &[1]).unwrap();
    bench.rx.push_used(chain.head, 24);
    bench.guest.events(RX).unwrap().call.signal();
    let mut sent = None;
    eventually(|| {
        sent = bench.tx.pop_avail();
        sent.is_some()
    });
    assert_eq!(sent.unwrap().segments, [Segment::readable(rx_segment.address, 24)]);
}

#[test]
fn test_echo_waits_for_room_in_the_tx_ring() {
    let tx = BufferLayout { count: 16, ..BufferLayout::default() };
    let mut bench = Bench::new(GuestConfig { tx, ..config(MODERN) });
    let source = SourceConfig { count: Some(16), ..SourceConfig::new(Payload::Fixed(vec![vec![9; 60]])) };
    bench.start(RxRole::Echo, Some(source));
    eventually(|| bench.counters().tx_posted == 16);
    let mut frame = frames(&stream(&[100]), 1).remove(0);
    bench.receive(&frame);
    bench.receive(&frame);
    eventually(|| bench.counters().rx_frames == 1);
    for _ in 0..16 {
        assert_eq!(bench.transmit()[12..], [9; 60]);
    }
    frame[..12].rotate_left(6);
    assert_eq!(bench.transmit()[12..], frame);
    assert_eq!(bench.transmit()[12..], frame);
    eventually(|| bench.counters().tx_frames == 18);
    bench.assert_clean();
}

#[test]
fn test_broken_device_is_counted_by_name() {
    let mut bench = Bench::new(config(MODERN));
    let header = |num_buffers: u8| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, num_buffers, 0, 7, 7];
    let mut use_next = |bytes: &[u8], len: u32| {
        let chain = bench.rx.pop_avail().unwrap();
        bench.rx.scatter(&chain.segments, bytes);
        bench.rx.push_used(chain.head, len);
        chain
    };
    use_next(&header(1), 11);
    use_next(&header(1), 0);
    use_next(&header(0), 14);
    let flagged = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 7, 7];
    use_next(&flagged, 14);
    use_next(&[&header(1)[..], &[0xee; 4]].concat(), 14);
    let again = use_next(&header(1), 14);
    bench.rx.push_used(again.head, 14);
    let chain = bench.rx.pop_avail().unwrap();
    bench.rx.scatter(&chain.segments, &header(2));
    bench.rx.push_used(chain.head, 14);
    bench.start(RxRole::Sink, None);
    eventually(|| bench.guest.violations(0).unwrap().num_buffers_not_together > 0);
    bench.guest.park().unwrap();
    let expected = Violations {
        used_length_too_small: 1,
        num_buffers_wrong: 1,
        header_not_negotiated: 1,
        used_twice: 1,
        num_buffers_not_together: 1,
        buffer_not_filled: 1,
        ..Violations::default()
    };
    assert_eq!(bench.guest.violations(0).unwrap(), expected);
    let counters = bench.counters();
    assert_eq!((counters.rx_frames, counters.rx_empty_buffers, counters.rx_tail_bytes_changed), (5, 1, 4 + 14 + 3));
}

#[test]
fn test_writes_outside_buffers_and_into_sent_ones_are_counted() {
    let mut bench = Bench::new(config(MODERN));
    let source = SourceConfig { count: Some(1), ..SourceConfig::new(Payload::Pattern(stream(&[60]))) };
    bench.start(RxRole::Sink, Some(source));
    let mut sent = None;
    eventually(|| {
        sent = bench.tx.pop_avail();
        sent.is_some()
    });
    let sent = sent.unwrap();
    bench.guest.memory.write(sent.segments[0].address.plus(40), &[0, 0]).unwrap();
    let behind = sent.segments[0].address.plus(2048 * 16);
    bench.guest.memory.write(behind, &[0x11]).unwrap();
    bench.tx.push_used(sent.head, 3);
    bench.guest.events(TX).unwrap().call.signal();
    eventually(|| bench.counters().tx_frames == 1 || bench.guest.violations(0).unwrap().tx_used_length_not_zero == 1);
    assert_eq!(bench.guest.violations(0).unwrap().tx_used_length_not_zero, 1);
    assert_eq!(bench.guest.changed_gap_bytes().unwrap(), 1);
}

#[test]
fn test_changed_tx_bytes_are_counted_when_the_buffer_returns() {
    let mut bench = Bench::new(config(MODERN));
    let source = SourceConfig { count: Some(1), ..SourceConfig::new(Payload::Pattern(stream(&[60]))) };
    bench.start(RxRole::Sink, Some(source));
    let mut sent = None;
    eventually(|| {
        sent = bench.tx.pop_avail();
        sent.is_some()
    });
    let sent = sent.unwrap();
    bench.guest.memory.write(sent.segments[0].address.plus(24), &[0xff]).unwrap();
    bench.tx.push_used(sent.head, 0);
    bench.guest.events(TX).unwrap().call.signal();
    eventually(|| bench.counters().tx_frames == 1);
    assert_eq!(bench.counters().tx_bytes_changed, 1);
}

#[test]
fn test_settlement_and_reset_close_the_account() {
    let mut bench = Bench::new(config(MODERN));
    bench.start(RxRole::Sink, None);
    for frame in frames(&stream(&[60]), 20) {
        bench.receive(&frame);
    }
    let lost = bench.rx.pop_avail().unwrap().head;
    assert!(lost < 16);
    bench.guest.settle(&[21, 0]).unwrap();
    assert_eq!(bench.counters().rx_frames, 20);
    assert_eq!(bench.guest.violations(0).unwrap(), Violations { never_returned: 1, ..Violations::default() });
    bench.guest.settle(&[999, 0]).unwrap();
    assert_eq!(bench.guest.violations(0).unwrap().base_impossible, 1);

    bench.guest.reset().unwrap();
    let Bench { guest, .. } = bench;
    let mut rx = ModelDevice::new(&guest.memory, *guest.rings[RX].layout(), true);
    guest.start(0, RxRole::Sink, None, true).unwrap();
    rx.receive(12, &[1; 60]).unwrap();
    eventually(|| guest.counters(0).unwrap().rx_frames == 21);
    guest.settle(&[1, 0]).unwrap();
    assert_eq!(guest.violations(0).unwrap().never_returned, 1, "nothing new");
}

#[test]
fn test_roles_change_without_the_device_noticing() {
    let mut bench = Bench::new(config(MODERN));
    bench.start(RxRole::Idle, None);
    bench.receive(&[1; 60]);
    bench.guest.park().unwrap();
    assert_eq!(bench.counters().rx_frames, 0, "an idle guest leaves used buffers alone");
    bench.start(RxRole::Sink, None);
    eventually(|| bench.counters().rx_frames == 1);
    bench.start(RxRole::Echo, None);
    bench.receive(&[2; 60]);
    assert_eq!(bench.transmit()[12..], [2; 60]);
    bench.guest.settle(&[2, 1]).unwrap();
    bench.assert_clean();
}

#[test]
fn test_headers_are_used_in_turn_with_frames() {
    let mut bench = Bench::new(config(MODERN));
    let headers = vec![vec![1; 12], vec![2; 12]];
    let source = SourceConfig {
        count: Some(3),
        headers: headers.clone(),
        ..SourceConfig::new(Payload::Fixed(vec![vec![7; 60], vec![8; 60]]))
    };
    bench.start(RxRole::Idle, Some(source));
    let sent: Vec<_> = (0..3).map(|_| bench.transmit()).collect();
    assert_eq!(
        sent.iter().map(|chain| chain[..12].to_vec()).collect::<Vec<_>>(),
        [&headers[..], &headers[..1]].concat()
    );
    assert_eq!([sent[0][12], sent[1][12], sent[2][12]], [7, 8, 7]);

    let bench = Bench::new(config(MODERN));
    let too_short = SourceConfig { headers: vec![vec![0; 10]], ..SourceConfig::new(Payload::Fixed(vec![vec![7; 60]])) };
    assert!(bench.guest.start(0, RxRole::Idle, Some(too_short), false).is_err());
}

#[test]
fn test_rate_is_kept() {
    let mut bench = Bench::new(config(MODERN));
    let source = SourceConfig {
        count: Some(100),
        rate_frames_per_s: Some(2000.0),
        ..SourceConfig::new(Payload::Fixed(vec![vec![1; 60]]))
    };
    let started = Instant::now();
    bench.start(RxRole::Idle, Some(source));
    for _ in 0..100 {
        bench.transmit();
    }
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(49), "{took:?}");
    assert!(bench.counters().tx_posted == 100);
}

#[test]
fn test_kick_reaches_the_device_and_frames_are_captured() {
    let mut bench = Bench::new(GuestConfig { capture_frames: 1, ..config(MODERN) });
    bench.tx.set_avail_event(0);
    let source = SourceConfig { count: Some(1), ..SourceConfig::new(Payload::Fixed(vec![vec![1; 60]])) };
    bench.start(RxRole::Sink, Some(source));
    let kick = &bench.guest.events(TX).unwrap().kick;
    wait_readable(&[kick.as_fd()], Some(Duration::from_secs(10))).unwrap();
    assert_eq!(kick.take(), 1);
    bench.receive(&[5; 64]);
    bench.receive(&[6; 64]);
    eventually(|| bench.counters().rx_frames == 2);
    assert_eq!(
        bench.guest.take_captured(),
        [Captured { header: vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame: vec![5; 64] }]
    );
}

#[test]
fn test_senseless_configurations_are_refused() {
    let refused = |change: fn(&mut GuestConfig)| {
        let mut config = config(MODERN);
        change(&mut config);
        Guest::new(config).is_err()
    };
    assert!(refused(|config| config.queue_size = 12));
    assert!(refused(|config| config.rx.region = 1));
    assert!(refused(|config| config.rx.pieces = vec![]));
    assert!(refused(|config| config.rx.stride_bytes = 100));
    assert!(refused(|config| config.rx.count = 17));
    assert!(refused(|config| config.tx.indirect = true));
    assert!(refused(|config| config.tx.pieces = vec![20]));
    assert!(refused(|config| config.rx.pieces = vec![1 << 20]));
    let bench = Bench::new(config(MODERN));
    let too_long = SourceConfig::new(Payload::Fixed(vec![vec![0; 2037]]));
    assert!(bench.guest.start(0, RxRole::Idle, Some(too_long), false).is_err());
    assert!(bench.guest.start(1, RxRole::Idle, None, false).is_err());
}
