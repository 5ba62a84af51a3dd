//! The short run of the ring fuzzer: the corpus, and cases from a fixed seed.

use std::path::Path;

use super::{racing_ring_case, ring_case};

const RANDOM_CASES: u64 = 1500;
const RACING_CASES: u64 = 50;

/// The bytes of random case `number` (splitmix64).
fn random_bytes(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut word = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    };
    let words = 4 + word() % 60;
    (0..words).flat_map(|_| word().to_le_bytes()).collect()
}

#[test]
fn test_corpus_cases_hold() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/rings");
    let mut count = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        ring_case(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "there is a corpus");
}

#[test]
fn test_random_cases_hold() {
    for number in 0..RANDOM_CASES {
        println!("case {number}");
        ring_case(&random_bytes(number));
    }
}

#[test]
fn test_random_cases_with_a_racing_driver_end_clean() {
    for number in 0..RACING_CASES {
        println!("case {number}");
        racing_ring_case(&random_bytes(number));
    }
}
