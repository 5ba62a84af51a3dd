use std::sync::Arc;

use mpassthru_testing::driver::Segment;
use mpassthru_testing::memory::{GuestPhysAddr, RegionConfig};

use super::bench::{Bench, MEMORY_END};
use crate::fixture::{Guest, VIRTIO_F_VERSION_1, dirty_log, marked, write_log};
use crate::guest_memory::DirtyLog;

const PAGES: u64 = 256;

/// A bench whose writes are logged, and the first page of the slot that is posted next.
fn logged() -> (Bench, Arc<DirtyLog>, u64) {
    let mut bench = Bench::new(true, 1524);
    let log = dirty_log(PAGES * 4096);
    bench.rx.vring.queue.set_log(Some(write_log(&log, 0)));
    let slot = bench.next_slot().0 - bench.umem_start().0;
    (bench, log, slot / 4096)
}

/// Marked pages that are not the used ring's.
fn buffers(log: &DirtyLog) -> Vec<u64> {
    marked(log, PAGES).into_iter().filter(|&page| page > 0).collect()
}

#[test]
fn test_a_frame_in_place_marks_its_buffer_when_it_is_delivered() {
    let (mut bench, log, slot) = logged();
    bench.post_many(1, &[(100, 12 + 1524)]);
    bench.settle_down();
    bench.receive(60, 0);
    assert!(buffers(&log).is_empty(), "the kernel has written, the guest knows nothing of it");
    bench.burst();
    assert_eq!(buffers(&log), [slot]);
    assert_eq!(bench.take().len(), 1);
}

#[test]
fn test_a_header_of_its_own_is_marked_too() {
    let (mut bench, log, slot) = logged();
    bench.post_many(1, &[(4000, 12), (200, 1524)]);
    bench.settle_down();
    bench.receive(60, 0);
    bench.burst();
    assert_eq!(buffers(&log), [slot, slot + 1]);
}

#[test]
fn test_a_header_at_the_end_of_a_region_and_a_frame_at_the_start_of_the_next_are_marked_where_they_are() {
    let far = 0x1000_0000;
    let guest = Guest::new(&[RegionConfig::memfd(0, MEMORY_END), RegionConfig::memfd(far, 4096)]);
    let mut bench = Bench::over(&guest, VIRTIO_F_VERSION_1, 1524);
    let log = dirty_log(far + 4096);
    bench.rx.vring.queue.set_log(Some(write_log(&log, 0)));
    let header = Segment::writable(GuestPhysAddr(MEMORY_END - 12), 12);
    bench.driver.add(&[header, Segment::writable(GuestPhysAddr(far), 1600)]).unwrap();
    bench.driver.publish();
    bench.settle_down();
    bench.receive(60, 0);
    bench.burst();
    let last_page = (MEMORY_END - 1) / 4096;
    assert_eq!(marked(&log, far / 4096 + 1), [0, last_page, far / 4096], "the used ring, the header, the frame");
}

#[test]
fn test_a_copied_frame_marks_only_what_it_fills() {
    let (mut bench, log, slot) = logged();
    bench.post_many(1, &[(0, 1000), (3096, 1000)]);
    bench.settle_down();
    bench.receive(988, 0);
    bench.burst();
    assert_eq!(buffers(&log), [slot], "header and frame fill the first piece");
    assert_eq!(bench.take().len(), 1);
    bench.post_many(1, &[(0, 1000), (3096, 1000)]);
    bench.settle_down();
    bench.receive(989, 0);
    bench.burst();
    assert_eq!(buffers(&log), [slot, slot + 1]);
}

#[test]
fn test_buffers_of_a_closed_socket_are_marked_when_they_go_back() {
    let (mut bench, log, slot) = logged();
    bench.post_many(1, &[(100, 1536)]);
    bench.settle_down();
    // It is in the rx ring when the socket closes.
    bench.receive(1514, 0);
    bench.stop();
    assert_eq!(buffers(&log), [slot]);
}

#[test]
fn test_frames_of_a_disabled_queue_mark_what_they_wrote() {
    let (mut bench, log, slot) = logged();
    bench.post_many(1, &[(100, 1536)]);
    bench.settle_down();
    bench.rx.vring.enabled = false;
    bench.receive(1514, 0);
    bench.burst();
    assert_eq!(buffers(&log), [slot]);
}
