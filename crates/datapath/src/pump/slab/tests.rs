use super::{CHUNK_BYTES, SLAB_FRAMES, Slab, UmemAddr, UnknownAnswer, slab_bytes};

fn take_all(slab: &mut Slab) -> Vec<UmemAddr> {
    std::iter::from_fn(|| slab.take()).collect()
}

#[test]
fn test_slabs_of_all_pairs_are_disjoint_and_fill_the_front_slab_behind_chunk_0() {
    let pairs = 3;
    let of_pair = |pair| [Slab::new(pair, 0), Slab::new(pair, 1), Slab::of_headers(pair)];
    let mut slabs: Vec<_> = (0..pairs).flat_map(of_pair).collect();
    let taken: Vec<Vec<UmemAddr>> = slabs.iter_mut().map(take_all).collect();
    let mut ranges: Vec<(u64, u64)> = slabs
        .iter()
        .zip(&taken)
        .flat_map(|(slab, frames)| frames.iter().map(|f| (f.0, f.0 + slab.frame_bytes)))
        .collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0), "no frame overlaps another, and no room is left");
    assert_eq!((ranges[0].0, ranges[ranges.len() - 1].1), (CHUNK_BYTES, slab_bytes(pairs)));
    for (number, slab) in slabs.iter().enumerate() {
        for (other, frames) in taken.iter().enumerate() {
            assert!(
                frames.iter().all(|&frame| slab.owns(frame) == (number == other)),
                "slab {number} owns its own only"
            );
        }
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
