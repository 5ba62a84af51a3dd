use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use proptest::prelude::*;

use super::super::ring::{Consumer, Producer};
use crate::fixture::{cases, memfd};

const SIZE: u32 = 8;
const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset { producer: 0, consumer: 64, desc: 192, flags: 128 };

/// A ring in a file that starts at `index`, and both ends of it.
fn ring(index: u32) -> (OwnedFd, Producer<u64>, Consumer<u64>) {
    let file = memfd("ring", 4096);
    let fd = file.as_raw_fd();
    let mut producer = Producer::map(fd, &OFFSETS, 0, SIZE).unwrap();
    let mut consumer = Consumer::map(fd, &OFFSETS, 0, SIZE).unwrap();
    producer.start_at(index);
    consumer.start_at(index);
    (file, producer, consumer)
}

/// A word of the file, as any other process sees it.
fn word(file: &OwnedFd, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    // SAFETY: `bytes` has room for four bytes.
    let count = unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), 4, offset as libc::off_t) };
    assert_eq!(count, 4);
    u32::from_ne_bytes(bytes)
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u32),
    Submit,
    Read(u32),
    Release,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u32..6).prop_map(Step::Write),
        Just(Step::Submit),
        (1u32..6).prop_map(Step::Read),
        Just(Step::Release)
    ]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn test_a_ring_is_a_queue_whatever_its_indices(
        index in prop_oneof![Just(0u32), u32::MAX - 20..=u32::MAX, any::<u32>()],
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (_file, mut producer, mut consumer) = ring(index);
        let (mut written, mut submitted, mut read) = (VecDeque::new(), VecDeque::new(), 0u32);
        let mut number = 0u64;
        for step in steps {
            match step {
                Step::Write(wanted) => {
                    let free = SIZE - written.len() as u32 - submitted.len() as u32 - read;
                    let seen = producer.free(wanted);
                    prop_assert!(seen <= free && (seen >= wanted || seen == free), "free {free}, seen {seen}");
                    for _ in 0..wanted.min(seen) {
                        producer.write(number);
                        written.push_back(number);
                        number += 1;
                    }
                }
                Step::Submit => {
                    producer.submit();
                    submitted.append(&mut written);
                }
                Step::Read(wanted) => {
                    prop_assert_eq!(consumer.peek() as usize, submitted.len());
                    for _ in 0..wanted.min(consumer.peek()) {
                        prop_assert_eq!(Some(consumer.read()), submitted.pop_front());
                        read += 1;
                    }
                }
                Step::Release => {
                    consumer.release();
                    read = 0;
                }
            }
            prop_assert_eq!(producer.pending() as usize, written.len() + submitted.len() + read as usize);
        }
    }
}

#[test]
fn test_fields_lie_where_the_offsets_say() {
    let (file, mut producer, mut consumer) = ring(6);
    for entry in [0x11u64, 0x22, 0x33] {
        producer.write(entry);
    }
    assert_eq!(word(&file, 0), 6, "not submitted yet");
    producer.submit();
    assert_eq!((word(&file, 0), word(&file, 64)), (9, 6));
    assert_eq!([6, 7, 0].map(|slot| word(&file, 192 + 8 * slot)), [0x11, 0x22, 0x33], "slots wrap at the size");
    consumer.read();
    assert_eq!(word(&file, 64), 6, "not released yet");
    consumer.release();
    assert_eq!(word(&file, 64), 7);
    assert!(!producer.needs_wakeup());
    consumer.set_needs_wakeup(true);
    assert_eq!(word(&file, 128), 1);
    assert!(producer.needs_wakeup());
}
