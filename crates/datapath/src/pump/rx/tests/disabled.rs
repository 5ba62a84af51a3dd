use super::bench::{Bench, QUEUE_SIZE};
use crate::stats::DropReason;

#[test]
fn test_a_disabled_queue_drops_frames_and_keeps_its_buffers() {
    let mut bench = Bench::new(true, 600);
    bench.post_many(8, &[(0, 700)]);
    bench.post_many(8, &[(0, 400)]);
    bench.rx.vring.enabled = false;
    // More frames than the fill ring has entries: each buffer is used again and again.
    for _ in 0..3000 {
        bench.burst();
        bench.receive(60, 0);
    }
    bench.burst();
    assert_eq!((bench.dropped(DropReason::Disabled), bench.counts.frames), (3000, 0));
    assert!(bench.take().is_empty());
    bench.rx.vring.enabled = true;
    bench.receive(60, 0);
    bench.burst();
    assert_eq!(bench.take().len(), 1);
    bench.stop();
    assert_eq!(bench.driver.outstanding(), 15);
}

#[test]
fn test_buffers_go_back_to_a_fill_ring_that_was_full() {
    let mut bench = Bench::new(false, 600);
    bench.rx.vring.enabled = false;
    bench.post_many(usize::from(QUEUE_SIZE), &[(0, 700)]);
    bench.burst();
    // The pump's view of the fill ring is as old as possible when the entries come back.
    for _ in 0..40 {
        for _ in 0..QUEUE_SIZE {
            bench.receive(60, 0);
        }
        bench.burst();
    }
    assert_eq!(bench.dropped(DropReason::Disabled), 40 * u64::from(QUEUE_SIZE));
}
