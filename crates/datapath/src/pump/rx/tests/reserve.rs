//! A driver that must not run out of buffers: it has enough of them, whatever the guest offers.

use super::bench::{Bench, QUEUE_SIZE};
use crate::stats::{BounceReason, DropReason};
use crate::xsk::DriverRules;
use crate::xsk::test_kernel::Received;

const BUFFERS_MIN: u32 = 8;
/// What the rx ring of such a driver holds, and a burst.
const RX_RING: usize = 64;
const POSTED_MIN: usize = BUFFERS_MIN as usize + 2 * RX_RING;
/// Holds any frame in one piece.
const WHOLE: &[(u64, u32)] = &[(0, 700)];

fn bench() -> Bench {
    let mut bench = Bench::new(true, 600);
    bench.xsk.rules = DriverRules { rx_buffers_min: BUFFERS_MIN, ..DriverRules::copy_mode(600, 18) };
    bench
}

fn receive(bench: &mut Bench, frames: usize) {
    for _ in 0..frames {
        assert!(matches!(bench.receive(100, 0), Received::At(_)));
    }
}

#[test]
fn test_the_driver_never_has_too_few_buffers_even_if_the_guest_posts_none() {
    let mut bench = bench();
    bench.burst();
    assert_eq!(bench.kernel.buffers(), 0, "a driver that never had a buffer does not run out of them");
    bench.post_many(20, WHOLE);
    for _ in 0..10 {
        bench.burst();
        assert!(bench.kernel.buffers() >= POSTED_MIN);
        receive(&mut bench, RX_RING);
        assert!(
            bench.kernel.buffers() >= BUFFERS_MIN as usize + RX_RING,
            "a burst may be taken before the next refill"
        );
    }
    bench.stop();
}

#[test]
fn test_frames_that_arrive_in_our_memory_go_to_the_heads_that_came_meanwhile() {
    let mut bench = bench();
    bench.post_many(1, WHOLE);
    bench.burst();
    bench.post_many(usize::from(QUEUE_SIZE) - 1, WHOLE);
    bench.burst();
    receive(&mut bench, RX_RING);
    bench.burst();
    assert_eq!(bench.take().len(), RX_RING);
    assert_eq!(bench.counts.bounced[BounceReason::FewBuffers as usize], RX_RING as u64 - 1);
    assert_eq!(bench.dropped(DropReason::NoBuffer), 0);
    bench.stop();
}

#[test]
fn test_a_guest_that_always_posts_too_few_gets_its_frames_all_the_same() {
    let mut bench = bench();
    bench.post_many(20, WHOLE);
    bench.burst();
    assert_eq!(bench.rx.posted.len(), 20, "those that are there at first");
    receive(&mut bench, 20);
    bench.burst();
    bench.take();
    assert_eq!((bench.counts.direct, bench.slab.used()), (20, POSTED_MIN));
    for _ in 0..8 {
        bench.post_many(20, WHOLE);
        bench.burst();
        receive(&mut bench, 20);
        bench.burst();
        assert_eq!(bench.take().len(), 20);
    }
    assert_eq!(bench.dropped(DropReason::NoBuffer), 0);
    bench.stop();
}

#[test]
fn test_other_drivers_get_no_more_than_the_guest_offers() {
    let mut bench = Bench::new(true, 600);
    bench.post_many(20, WHOLE);
    bench.burst();
    assert_eq!((bench.kernel.buffers(), bench.slab.used()), (20, 0));
    bench.stop();
}
