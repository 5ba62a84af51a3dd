use super::bench::{Bench, Chain, Piece};
use crate::stats::BounceReason;
use crate::xsk::{BindMode, TX_RING_DESCS};

fn shared(offset: u64, len: u32) -> Chain {
    Chain::of(&[Piece::Shared(offset, len)])
}

#[test]
fn test_a_head_is_used_when_the_last_of_its_pieces_is_done() {
    let mut bench = Bench::new(BindMode::Copy);
    let pieces = [Piece::Own(1, 20), Piece::Own(2, 30), Piece::Shared(7, 40)];
    bench.post_all(&[Chain::of(&pieces), Chain::of(&[Piece::Own(0, 60)])]);
    assert_eq!(bench.burst(), 2);
    assert_eq!(bench.kernel.send(256), 2);
    bench.burst();
    bench.take();
    assert_eq!(bench.used, 0, "taken is not sent");
    bench.complete(1);
    bench.burst();
    bench.take();
    assert_eq!((bench.used, bench.flight.is_empty()), (1, false), "out of order");
    bench.settle_down();
    assert_eq!((bench.used, bench.counts.direct), (2, 2));
}

#[test]
fn test_addresses_that_one_completion_could_stand_for_are_not_in_flight_together() {
    let mut bench = Bench::new(BindMode::Copy);
    bench.post_all(&[shared(6, 60), shared(7, 60), shared(8, 60), shared(9, 61)]);
    bench.burst();
    assert_eq!((bench.counts.direct, bench.bounced(BounceReason::AddressAlias)), (2, 2), "6 and 7, 8 and 9");
    bench.settle_down();
    bench.post_all(&[shared(7, 60)]);
    bench.burst();
    assert_eq!(bench.counts.direct, 3, "no longer in flight");

    let mut exact = Bench::new(BindMode::ZeroCopy);
    exact.post_all(&[shared(6, 60), shared(7, 60)]);
    exact.burst();
    assert_eq!(exact.counts.direct, 2, "zero-copy mode completes exact addresses");
}

#[test]
fn test_buffers_that_begin_alike_are_in_flight_together_only_if_they_end_alike() {
    for mode in [BindMode::Copy, BindMode::ZeroCopy] {
        let mut bench = Bench::new(mode);
        bench.post_all(&[shared(6, 60), shared(6, 600), shared(6, 60)]);
        bench.burst();
        assert_eq!((bench.counts.direct, bench.bounced(BounceReason::AddressAlias)), (2, 1));
        bench.kernel.send(3);
        bench.complete(0);
        bench.burst();
        bench.take();
        assert_eq!(bench.used, 2, "the copied one and one of two that are the same");
    }
}

#[test]
fn test_the_same_buffer_may_be_in_flight_many_times() {
    let mut bench = Bench::new(BindMode::Copy);
    bench.post_all(&vec![shared(5, 60); 50]);
    bench.burst();
    bench.kernel.send(usize::MAX);
    for done in 1..=50 {
        bench.complete((50 - done) / 2);
        bench.burst();
        bench.take();
        assert_eq!(bench.used, done as u64);
    }
    assert_eq!(bench.counts.direct, 50);
}

#[test]
fn test_full_rings_hold_frames_back_and_lose_none() {
    let mut bench = Bench::new(BindMode::Copy);
    let long = Chain::of(&[Piece::Own(2, 4); 18]);
    let room = TX_RING_DESCS as usize / 18;
    bench.post_all(&vec![long; 128]);
    while bench.burst() > 0 {}
    assert_eq!(bench.counts.frames as usize, room);
    assert_eq!(bench.tx.vring.queue.base() as usize, room, "the next head was not taken");
    bench.kernel.send(18);
    assert_eq!(bench.burst(), 0, "room in the tx ring, none in the completion ring");
    bench.complete(0);
    assert_eq!(bench.burst(), 18 + 1, "18 completions, one frame");
    bench.settle_down();
    assert_eq!((bench.counts.frames, bench.driver.outstanding()), (128, 0));
}

#[test]
fn test_bounced_frames_wait_for_slab_frames() {
    let mut bench = Bench::new(BindMode::Copy);
    let many = Chain::of(&[Piece::Own(1, 2); 19]);
    let mut posted = 0u64;
    while bench.counts.frames == posted {
        bench.post_all(std::slice::from_ref(&many));
        bench.burst();
        bench.take();
        posted += 1;
    }
    assert_eq!(bench.counts.frames, 512, "as many as there are slab frames");
    assert_eq!(bench.driver.outstanding(), 1);
    bench.settle_down();
    assert_eq!((bench.counts.frames, bench.sent.0), (513, 513));
    assert_eq!(bench.counts.copied_bytes, 513 * 38);
}
