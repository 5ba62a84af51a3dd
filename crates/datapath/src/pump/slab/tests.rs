use std::collections::HashSet;

use super::{CHUNK_BYTES, SLAB_FRAMES, Slab, UmemAddr, UnknownAnswer, slab_bytes};

fn take_all(slab: &mut Slab) -> Vec<UmemAddr> {
    std::iter::from_fn(|| slab.take()).collect()
}

#[test]
fn test_slabs_of_all_pairs_are_disjoint_and_fill_the_front_slab_behind_chunk_0() {
    let pairs = 3;
    let mut slabs: Vec<_> = (0..pairs).flat_map(|pair| [Slab::new(pair, 0), Slab::new(pair, 1)]).collect();
    let frames: HashSet<u64> = slabs.iter_mut().flat_map(take_all).map(|frame| frame.0).collect();
    let expected: HashSet<u64> = (1..slab_bytes(pairs) / CHUNK_BYTES).map(|chunk| chunk * CHUNK_BYTES).collect();
    assert_eq!(frames, expected);
    for (number, slab) in slabs.iter().enumerate() {
        let owned = frames.iter().filter(|&&frame| slab.owns(UmemAddr(frame)));
        assert_eq!(owned.count(), SLAB_FRAMES, "slab {number} owns its own frames only");
    }
}

#[test]
fn test_frames_are_counted_while_in_use_and_come_back() {
    let mut slab = Slab::new(0, 0);
    assert_eq!(slab.used(), 0);
    let frames = take_all(&mut slab);
    assert_eq!((frames.len(), slab.used()), (SLAB_FRAMES, SLAB_FRAMES));
    slab.give_back(frames[7]).unwrap();
    assert_eq!((slab.used(), slab.take()), (SLAB_FRAMES - 1, Some(frames[7])));
    slab.reset();
    assert_eq!(slab.used(), 0);
}

#[test]
fn test_a_frame_that_nobody_has_is_not_taken_back() {
    let mut slab = Slab::new(0, 0);
    let frame = slab.take().unwrap();
    slab.give_back(frame).unwrap();
    assert_eq!((slab.give_back(frame), slab.used()), (Err(UnknownAnswer(frame)), 0));
    let frame = slab.take().unwrap();
    slab.reset();
    assert_eq!((slab.give_back(frame), slab.used()), (Err(UnknownAnswer(frame)), 0));
}

#[test]
fn test_only_starts_of_its_own_frames_are_owned() {
    let slab = Slab::new(1, 0);
    let start = slab.start;
    let end = start + SLAB_FRAMES as u64 * CHUNK_BYTES;
    assert!(slab.owns(UmemAddr(start)) && slab.owns(UmemAddr(end - CHUNK_BYTES)));
    for outside in [start - CHUNK_BYTES, start - 1, start + 1, start + CHUNK_BYTES / 2, end, 0, u64::MAX] {
        assert!(!slab.owns(UmemAddr(outside)), "{outside:#x}");
    }
}
