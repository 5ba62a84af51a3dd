use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mpassthru_testing::driver::{RingLayout, Segment, SplitDriver};
use mpassthru_testing::memory::{self as vmm, RegionConfig};
use proptest::prelude::*;

use super::{Engine, PollMode, QUEUE_PAIRS_MAX};
use crate::error::Error;
use crate::fixture::{Guest, VIRTIO_F_VERSION_1, cases, memfd, specs};
use crate::guest_memory::{FileSpec, GuestPhysAddr, PAGE_BYTES, RegionSpec, UserAddr};
use crate::pump::{Completion, Event, SourceLock, VringConfig};
use crate::virtqueue::Logged;
use crate::xsk::{BindMode, SocketParams, UmemLayout};

const PARAMS: SocketParams = SocketParams {
    ifindex: 1,
    queue_id: 0,
    mode: BindMode::Copy,
    layout: UmemLayout { frame_max: 1536 },
    frame_max: 1536,
    zero_copy_rules: None,
};

fn engine(pairs: usize) -> Engine {
    Engine::new(pairs, PollMode::Adaptive, &SourceLock::open()).unwrap()
}

fn layout(index: usize) -> RingLayout {
    RingLayout::contiguous(vmm::GuestPhysAddr(0x4000 * index as u64), 8)
}

/// Waits for the end of a command.
fn completed(engine: &Engine, token: u64) -> Result<u64, Error> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut polled = libc::pollfd { fd: engine.events().ready_fd(), events: libc::POLLIN, revents: 0 };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
        // SAFETY: one valid entry.
        assert_eq!(unsafe { libc::poll(&raw mut polled, 1, left) }, 1, "the pump does not answer");
        let mut events = engine.events().drain();
        match (events.pop(), events.pop()) {
            (Some(Event::Completed(Completion { token: ended, result })), None) if ended == token => return result,
            // Somebody took the event between its being there and its being announced.
            (None, None) => {}
            other => panic!("other events than the end of {token}: {other:?}"),
        }
    }
}

/// Adds memory, and waits until every pump has it. `None` if it has to be mapped anew.
fn added(engine: &Engine, specs: &[RegionSpec]) -> Result<Option<()>, Error> {
    let Some(mut tokens) = engine.add_memory(specs)? else { return Ok(None) };
    let deadline = Instant::now() + Duration::from_secs(10);
    while !tokens.is_empty() && Instant::now() < deadline {
        for event in engine.events().drain() {
            let Event::Completed(Completion { token, result: Ok(0) }) = event else { panic!("{event:?}") };
            tokens.retain(|&expected| expected != token);
        }
        std::thread::yield_now();
    }
    assert!(tokens.is_empty(), "the pumps do not answer");
    Ok(Some(()))
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

fn config(guest: &Guest, index: usize, base: u32) -> VringConfig {
    let mut config = guest.vring_config(&layout(index), VIRTIO_F_VERSION_1);
    config.queue.base = base;
    config
}

#[test]
fn test_only_sensible_numbers_of_queue_pairs_are_possible() {
    for pairs in [0, QUEUE_PAIRS_MAX + 1] {
        assert!(
            message(Engine::new(pairs, PollMode::Busy, &SourceLock::open()).map(|_| ()))
                .contains("1 to 64 are possible")
        );
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
    for (index, base) in [(0, 0u16), (1, 65535), (2, 7), (3, 32768)] {
        let mut driver = SplitDriver::new(&guest.vmm, layout(index), false).unwrap();
        driver.add(&[Segment::readable(vmm::GuestPhysAddr(0x1_0000), 72)]).unwrap();
        driver.publish();
        driver.ring().set_avail_idx(base.wrapping_add(1));
        // Not where the base is: a queue that starts at its used index would be found out.
        guest.vmm.write(layout(index).used.plus(2), &base.wrapping_sub(3).to_le_bytes()).unwrap();
        let token = engine.start_vring(index, config(&guest, index, base.into()), Logged::default()).unwrap();
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
    let file = memfd("closed-engine", 4096);
    let engine = engine(2);
    let region = RegionSpec {
        guest_phys: GuestPhysAddr(0),
        size_bytes: 4096,
        user: UserAddr(0),
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
    let log = |size_bytes| FileSpec { fd: file.as_raw_fd(), offset: 0, size_bytes };
    let all = Logged { buffers: true, used_ring: None };
    // There are 32 pages, a bit each.
    engine.map_log(Some(&log(3))).unwrap();
    let token = engine.start_vring(0, config(&guest, 0, 0), Logged::default()).unwrap();
    completed(&engine, token).unwrap();
    let refused = "the migration log has no room for all of guest memory";
    assert_eq!(message(engine.set_vring_log(0, all)), refused);
    assert_eq!(message(engine.start_vring(1, config(&guest, 1, 0), all)), refused);

    let far = RegionSpec {
        guest_phys: GuestPhysAddr(1 << 40),
        user: UserAddr(1),
        size_bytes: 4096,
        mmap_offset: 0,
        fd: file.as_raw_fd(),
    };
    assert_eq!(message(engine.add_memory(&[far])), refused);

    engine.map_log(Some(&log(4))).unwrap();
    assert_eq!(message(engine.add_memory(&[far])), refused);
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
    let file = File::from(memfd("log", 4096));
    let log = |size_bytes| FileSpec { fd: file.as_raw_fd(), offset: 0, size_bytes };
    let take_marks = || {
        let mut bytes = [0; 64];
        file.read_exact_at(&mut bytes, 0).unwrap();
        file.write_all_at(&[0; 64], 0).unwrap();
        bytes
    };
    // There are 32 pages, a bit each.
    let all: [u8; 64] = std::array::from_fn(|byte| if byte < 4 { 0xff } else { 0 });
    engine.map_log(Some(&log(64))).unwrap();
    assert!(message(engine.mark_all()).contains("has not sent any guest memory"));
    let _guest = mapped(&engine);
    assert_eq!(take_marks(), [0; 64]);
    engine.mark_all().unwrap();
    assert_eq!(take_marks(), all);
    assert!(engine.map_log(Some(&log(4097))).is_err());
    engine.mark_all().unwrap();
    assert_eq!(take_marks(), all, "the old log stays");
    engine.map_log(None).unwrap();
    assert!(message(engine.mark_all()).contains("has not sent a migration log"));
    assert_eq!(take_marks(), [0; 64]);
}

/// A change of the memory map, by the numbers of the regions in it.
#[derive(Debug, Clone)]
enum Change {
    Add(Vec<u8>),
    Replace(Vec<u8>),
}

fn change() -> impl Strategy<Value = Change> {
    let regions = || prop::collection::btree_set(0u8..6, 0..4).prop_map(|set| set.into_iter().collect());
    prop_oneof![regions().prop_map(Change::Add), regions().prop_map(Change::Replace)]
}

/// Region `number`: at its own place in the guest, and in the file that all of them share.
fn numbered(file: &OwnedFd, number: u8) -> RegionSpec {
    let (size_bytes, number) = (PAGE_BYTES * (1 + u64::from(number % 3)), u64::from(number));
    let guest_phys = GuestPhysAddr(number << 30);
    let user = UserAddr((number << 30) + (1 << 40));
    RegionSpec { guest_phys, size_bytes, user, mmap_offset: 4 * PAGE_BYTES * number, fd: file.as_raw_fd() }
}

proptest! {
    #![proptest_config(cases(128))]

    #[test]
    fn test_memory_is_what_the_changes_made_it_and_nothing_stays_mapped(changes in prop::collection::vec(change(), 1..12)) {
        let file = memfd("changing", 24 * PAGE_BYTES);
        let engine = engine(1);
        let mut model = BTreeSet::new();
        for change in changes {
            match change {
                Change::Add(numbers) => {
                    let specs: Vec<_> = numbers.iter().map(|&number| numbered(&file, number)).collect();
                    match added(&engine, &specs) {
                        Ok(fits) => {
                            prop_assert!(fits.is_some(), "pages of one size follow each other");
                            prop_assert!(!model.is_empty() && numbers.iter().all(|number| !model.contains(number)));
                            model.extend(numbers);
                        }
                        Err(_) => {
                            prop_assert!(model.is_empty() || numbers.iter().any(|number| model.contains(number)));
                        }
                    }
                }
                Change::Replace(numbers) => {
                    let specs: Vec<_> = numbers.iter().map(|&number| numbered(&file, number)).collect();
                    engine.map_memory(&specs).unwrap();
                    model = numbers.into_iter().collect();
                }
            }
            check_memory(&engine, &file, &model);
        }
        engine.close();
        prop_assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains("memfd:changing"));
    }
}

/// Asserts that every region of the model, and no other, is translated to its own bytes of the file.
fn check_memory(engine: &Engine, file: &OwnedFd, model: &BTreeSet<u8>) {
    let memory = engine.memory.lock().unwrap().clone();
    assert_eq!(memory.is_none(), model.is_empty());
    let Some(memory) = memory else { return };
    for number in 0..6 {
        let spec = numbered(file, number);
        for offset in [0, spec.size_bytes - 8] {
            let found = memory.translate(GuestPhysAddr(spec.guest_phys.0 + offset), 8, &mut 0);
            let user = memory.translate_user(UserAddr(spec.user.0 + offset), 8);
            assert_eq!((found.is_some(), user), (model.contains(&number), found.map(|segment| segment.addr)));
            let Some(found) = found else { continue };
            let mark = ((u64::from(number) << 32) | offset).to_le_bytes();
            memory.write(found.addr, &mark);
            let mut seen = [0; 8];
            let at = (spec.mmap_offset + offset) as libc::off_t;
            // SAFETY: `seen` has room for eight bytes.
            assert_eq!(unsafe { libc::pread(file.as_raw_fd(), seen.as_mut_ptr().cast(), 8, at) }, 8);
            assert_eq!(seen, mark);
        }
    }
    let mapped: u64 = model.iter().map(|&number| numbered(file, number).size_bytes).sum();
    assert_eq!(memory.len_bytes(), memory.slab_bytes() + mapped + 2 * PAGE_BYTES);
}

#[test]
fn test_running_queues_do_not_keep_memory_from_growing_and_find_their_buffers_in_it() {
    let engine = engine(2);
    let guest = mapped(&engine);
    for index in [0, 1, 3] {
        let token = engine.start_vring(index, config(&guest, index, 0), Logged::default()).unwrap();
        completed(&engine, token).unwrap();
    }
    let other = vmm::GuestMemory::new(&[RegionConfig::memfd(1 << 40, 4096)]).unwrap();
    let before = Arc::downgrade(&engine.mapped().unwrap());
    added(&engine, &specs(&other)).unwrap().unwrap();
    assert!(before.upgrade().is_none(), "every pump has the new memory");
    assert!(message(engine.map_memory(&[])).contains("while a virtqueue or socket uses it"));
    for index in [0, 1, 3] {
        let token = engine.stop_vring(index).unwrap();
        completed(&engine, token).unwrap();
    }
    engine.map_memory(&[]).unwrap();
}

#[test]
fn test_a_socket_is_bound_as_prepared_only_if_one_was() {
    let engine = engine(1);
    let _guest = mapped(&engine);
    assert!(message(engine.attach_prepared(0)).contains("no socket was prepared for queue pair 0"));
    let (socket, _peer) = UnixDatagram::pair().unwrap();
    let token = engine.prepare_socket(0, socket.as_raw_fd(), PARAMS).unwrap();
    assert!(message(completed(&engine, token)).contains("as a UMEM"), "it is no AF_XDP socket");
    assert!(message(engine.attach_prepared(0)).contains("no socket was prepared"));
    assert!(!engine.socket_lacks_memory(0).unwrap());
    engine.map_memory(&[]).unwrap();
}
