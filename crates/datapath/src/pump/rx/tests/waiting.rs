//! Slab frames are promised buffers: never more than there are, and never none while there could be some.

use super::bench::Bench;
use crate::stats::DropReason;

#[test]
fn test_a_long_frame_takes_as_many_buffers_as_it_needs() {
    let mut bench = Bench::new(true, 1524);
    bench.post_many(16, &[(3, 500)]);
    bench.burst();
    assert_eq!(bench.slab.used(), 4, "groups of four: 1536 bytes in buffers of 500");
    for len in [1524, 60, 489, 488] {
        bench.receive(len, 0);
    }
    bench.burst();
    let num_buffers: Vec<_> = bench.take().iter().map(|d| d.num_buffers).collect();
    assert_eq!(num_buffers, [4, 1, 2, 1], "500 bytes hold a header of 12 and 488 of a frame");
}

#[test]
fn test_a_frame_that_no_single_buffer_holds_is_dropped_and_the_buffer_kept() {
    let mut bench = Bench::new(false, 1524);
    bench.post_many(2, &[(0, 500)]);
    bench.burst();
    bench.receive(489, 0);
    bench.receive(488, 0);
    bench.settle_down();
    assert_eq!(bench.dropped(DropReason::BufferTooSmall), 1);
    assert_eq!(bench.take().len(), 1);
}

#[test]
fn test_a_tiny_buffer_among_others_does_not_stop_the_queue() {
    let mut bench = Bench::new(true, 1524);
    bench.post_many(1, &[(0, 12)]);
    bench.post_many(40, &[(0, 1000)]);
    bench.burst();
    assert!(bench.slab.used() > 0, "there is room for a frame: 40000 bytes");
    for _ in 0..100 {
        bench.receive(1524, 0);
        bench.settle_down();
        bench.take();
        bench.post_many(2, &[(0, 1000)]);
        bench.burst();
    }
    assert_eq!(bench.counts.frames, 100);
    assert!(bench.slab.used() > 5, "the tiny buffer is gone, and so is its memory");
}

#[test]
fn test_useless_buffers_come_back_empty_at_once() {
    let mut bench = Bench::new(true, 600);
    bench.post_many(3, &[(0, 11)]);
    bench.post_many(1, &[(0, 0)]);
    bench.post_many(1, &[(0, 700)]);
    bench.burst();
    assert!(bench.take().is_empty());
    assert_eq!((bench.returned_empty, bench.driver.outstanding()), (4, 1));
}

#[test]
fn test_chains_of_many_pieces_wait_within_bounds() {
    let mut bench = Bench::new(true, 600);
    let pieces = vec![(1u64, 1u32); 16];
    for _ in 0..64 {
        assert!(bench.post(&pieces, true));
    }
    bench.driver.publish();
    bench.burst();
    assert_eq!(bench.slab.used(), 1, "612 bytes in buffers of 16");
    bench.receive(600, 0);
    bench.burst();
    assert_eq!(bench.take()[0].num_buffers, 39);
}
