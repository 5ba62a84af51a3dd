use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
use mpassthru_testing::memory::{self as vmm, GuestPhysAddr, RegionConfig};

use super::{Engine, PollMode, QUEUE_PAIRS_MAX};
use crate::error::Error;
use crate::fixture::{Guest, VIRTIO_F_VERSION_1, memfd, specs};
use crate::guest_memory::LogSpec;
use crate::pump::{Completion, Event, VringConfig};
use crate::virtqueue::Logged;
use crate::xsk::{BindMode, SocketParams, UmemLayout};

const PARAMS: SocketParams = SocketParams {
    ifindex: 1,
    queue_id: 0,
    mode: BindMode::Copy,
    layout: UmemLayout { frame_max: 1536 },
    zero_copy_rules: None,
};

fn engine(pairs: usize) -> Engine {
    Engine::new(pairs, PollMode::Adaptive).unwrap()
}

fn layout(index: usize) -> RingLayout {
    RingLayout::contiguous(GuestPhysAddr(0x4000 * index as u64), 8)
}

/// Waits for the end of a command.
fn completed(engine: &Engine, token: u64) -> Result<u64, Error> {
    let mut polled = libc::pollfd { fd: engine.events().ready_fd(), events: libc::POLLIN, revents: 0 };
    let deadline = Duration::from_secs(10).as_millis() as i32;
    // SAFETY: one valid entry.
    assert_eq!(unsafe { libc::poll(&raw mut polled, 1, deadline) }, 1, "the pump does not answer");
    let mut events = engine.events().drain();
    match (events.pop(), events.pop()) {
        (Some(Event::Completed(Completion { token: ended, result })), None) if ended == token => result,
        other => panic!("other events than the end of {token}: {other:?}"),
    }
}

fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.expect_err("this is refused").to_string()
}

/// Memory that an engine has mapped too; the guest's own mapping only helps to make configurations.
fn mapped(engine: &Engine) -> Guest {
    let guest = Guest::new(&[RegionConfig::memfd(0, 1 << 17)]);
    engine.map_memory(&specs(&guest.vmm)).unwrap();
    guest
}

fn config(guest: &Guest, index: usize, base: u16) -> VringConfig {
    let mut config = guest.vring_config(&layout(index), VIRTIO_F_VERSION_1);
    config.queue.base = base;
    config
}

#[test]
fn test_only_sensible_numbers_of_queue_pairs_are_possible() {
    for pairs in [0, QUEUE_PAIRS_MAX + 1] {
        assert!(message(Engine::new(pairs, PollMode::Busy).map(|_| ())).contains("1 to 64 are possible"));
    }
    assert_eq!(engine(3).queue_pairs(), 3);
}

#[test]
fn test_without_memory_nothing_starts() {
    let engine = engine(1);
    let guest = Guest::of_pages(32);
    assert!(
        message(engine.start_vring(0, config(&guest, 0, 0), Logged::default())).contains("not sent any guest memory")
    );
    assert!(message(engine.attach_socket(0, 0, PARAMS)).contains("not sent any guest memory"));
}

#[test]
fn test_queues_that_do_not_exist_are_refused() {
    let engine = engine(2);
    let guest = mapped(&engine);
    let none = "there is no queue pair 2: this port has 2";
    assert_eq!(message(engine.start_vring(4, config(&guest, 0, 0), Logged::default())), none);
    assert_eq!(message(engine.stop_vring(5)), none);
    assert_eq!(message(engine.detach_socket(2)), none);
    assert_eq!(message(engine.send_frame(2, vec![0; 60])), none);
    assert_eq!(message(engine.socket_attached(2)), none);
    assert!(!engine.socket_attached(1).unwrap());
}

#[test]
fn test_a_queue_stops_at_the_base_that_it_was_started_with_while_there_is_no_socket() {
    let engine = engine(2);
    let guest = mapped(&engine);
    for (index, base) in [(0, 0), (1, 65535), (2, 7), (3, 32768)] {
        let mut driver = SplitDriver::new(&guest.vmm, layout(index), false).unwrap();
        driver.add(&[Segment::readable(GuestPhysAddr(0x1_0000), 72)]).unwrap();
        driver.publish();
        driver.ring().set_avail_idx(u16::wrapping_add(base, 1));
        guest.vmm.write(layout(index).used.plus(2), &base.to_le_bytes()).unwrap();
        let token = engine.start_vring(index, config(&guest, index, base), Logged::default()).unwrap();
        completed(&engine, token).unwrap();
        let token = engine.stop_vring(index).unwrap();
        assert_eq!(completed(&engine, token).unwrap(), u64::from(base));
    }
}

#[test]
fn test_broken_rings_end_the_start_and_nothing_else() {
    let engine = engine(1);
    let guest = mapped(&engine);
    let mut broken = config(&guest, 0, 0);
    broken.queue.size = 7;
    let token = engine.start_vring(0, broken, Logged::default()).unwrap();
    assert!(matches!(completed(&engine, token), Err(Error::Fault(_))));
    let token = engine.start_vring(0, config(&guest, 0, 0), Logged::default()).unwrap();
    completed(&engine, token).unwrap();
}

#[test]
fn test_memory_in_use_is_not_replaced() {
    let engine = engine(1);
    let guest = mapped(&engine);
    let token = engine.start_vring(1, config(&guest, 1, 0), Logged::default()).unwrap();
    completed(&engine, token).unwrap();
    let other = vmm::GuestMemory::new(&[RegionConfig::memfd(0, 4096)]).unwrap();
    for regions in [specs(&other), Vec::new()] {
        assert!(message(engine.map_memory(&regions)).contains("while a virtqueue or socket uses it"));
    }
    let token = engine.stop_vring(1).unwrap();
    assert_eq!(completed(&engine, token).unwrap(), 0, "the old memory is still there");
    engine.map_memory(&specs(&other)).unwrap();
    engine.map_memory(&[]).unwrap();
    assert!(engine.start_vring(1, config(&guest, 1, 0), Logged::default()).is_err(), "none is mapped");
}

#[test]
fn test_a_socket_that_is_none_is_refused_with_what_was_attempted() {
    let engine = engine(1);
    let _guest = mapped(&engine);
    let (socket, _peer) = UnixDatagram::pair().unwrap();
    let token = engine.attach_socket(0, socket.as_raw_fd(), PARAMS).unwrap();
    match completed(&engine, token) {
        Err(Error::Host(error)) => assert!(error.attempted.contains("as a UMEM"), "{error}"),
        other => panic!("{other:?}"),
    }
    assert!(!engine.socket_attached(0).unwrap());
    assert!(matches!(engine.attach_socket(0, -1, PARAMS), Err(Error::Host(error)) if error.errno == libc::EBADF));
    engine.map_memory(&[]).unwrap();
}

#[test]
fn test_an_engine_closes_twice_and_lets_go_of_its_memory() {
    let file = crate::fixture::memfd("closed-engine", 4096);
    let engine = engine(2);
    let region = crate::guest_memory::RegionSpec {
        guest_phys: crate::guest_memory::GuestPhysAddr(0),
        size_bytes: 4096,
        user: crate::guest_memory::UserAddr(0),
        mmap_offset: 0,
        fd: file.as_raw_fd(),
    };
    engine.map_memory(&[region]).unwrap();
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps().contains("memfd:closed-engine"));
    engine.close();
    engine.close();
    assert!(!maps().contains("memfd:closed-engine"));
    assert_eq!(engine.counts(), Default::default());
}

#[test]
fn test_a_log_without_room_for_all_memory_is_refused_where_it_would_be_used() {
    let engine = engine(1);
    let guest = mapped(&engine);
    let file = memfd("log", 4096);
    let log = |size_bytes| LogSpec { fd: file.as_raw_fd(), offset: 0, size_bytes };
    let all = Logged { buffers: true, used_ring: None };
    engine.map_log(Some(&log(1))).unwrap();
    let token = engine.start_vring(0, config(&guest, 0, 0), Logged::default()).unwrap();
    completed(&engine, token).unwrap();
    let refused = "the migration log has no room for all of guest memory";
    assert_eq!(message(engine.set_vring_log(0, all)), refused);
    assert_eq!(message(engine.start_vring(1, config(&guest, 1, 0), all)), refused);

    engine.map_log(Some(&log(64))).unwrap();
    let token = engine.set_vring_log(0, all).unwrap();
    completed(&engine, token).unwrap();
    let token = engine.start_vring(1, config(&guest, 1, 0), all).unwrap();
    completed(&engine, token).unwrap();
    let token = engine.set_vring_log(2, all);
    assert!(message(token).starts_with("there is no queue pair 1"));
}

#[test]
fn test_all_of_memory_is_marked_only_where_there_is_memory_and_a_log() {
    let engine = engine(1);
    let file = memfd("log", 4096);
    engine.map_log(Some(&LogSpec { fd: file.as_raw_fd(), offset: 0, size_bytes: 64 })).unwrap();
    assert!(message(engine.mark_all()).contains("has not sent any guest memory"));
    let _guest = mapped(&engine);
    engine.mark_all().unwrap();
    assert!(engine.map_log(Some(&LogSpec { fd: file.as_raw_fd(), offset: 0, size_bytes: 4097 })).is_err());
    engine.mark_all().unwrap();
    engine.map_log(None).unwrap();
    assert!(message(engine.mark_all()).contains("has not sent a migration log"));
}
