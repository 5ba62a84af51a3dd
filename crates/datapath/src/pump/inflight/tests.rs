use std::collections::HashMap;

use proptest::prelude::*;

use super::{InFlight, UmemAddr};
use crate::fixture::cases;

#[derive(Debug, Clone)]
enum Step {
    Insert(u64, u32),
    Remove(u64),
    Clear,
}

/// What undoes the hash's multiplication.
const INVERSE: u64 = 0xf1de_83e1_9937_733d;

/// Few keys, so that many are equal; some a power of two apart; many that all look for a place around the table's end.
fn key() -> impl Strategy<Value = u64> {
    let colliding = (60u64..64, 0u64..4).prop_map(|(home, number)| (home << 58 | number).wrapping_mul(INVERSE));
    prop_oneof![
        2 => 0u64..4,
        1 => (0u64..4).prop_map(|i| i << 12),
        1 => (0u64..4).prop_map(|i| i << 43),
        1 => 0u64..u64::MAX,
        4 => colliding,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (key(), any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
        20 => key().prop_map(Step::Remove),
        1 => Just(Step::Clear),
    ]
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn test_it_is_a_multimap(steps in prop::collection::vec(step(), 1..120)) {
        run::<64>(steps.clone())?;
        run::<8>(steps)?;
    }
}

fn run<const PLACES: usize>(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut table = InFlight::<u32, PLACES>::new();
    let mut model: HashMap<u64, Vec<u32>> = HashMap::new();
    for step in steps {
        let len = model.values().map(Vec::len).sum::<usize>();
        match step {
            Step::Insert(key, value) if len < PLACES / 4 => {
                table.insert(UmemAddr(key), value);
                model.entry(key).or_default().push(value);
            }
            Step::Insert(..) => prop_assert_eq!(table.room(), 0),
            Step::Remove(key) => {
                let of_key = model.entry(key).or_default();
                let seen = table.get(UmemAddr(key));
                prop_assert_eq!(seen.is_some(), !of_key.is_empty());
                let taken = table.remove(UmemAddr(key));
                prop_assert_eq!(taken, seen, "get shows what remove takes");
                if let Some(value) = taken {
                    let place = of_key.iter().position(|&v| v == value);
                    prop_assert!(place.is_some(), "a value that was inserted under this key");
                    of_key.remove(place.unwrap());
                }
            }
            Step::Clear => {
                table.clear();
                model.clear();
            }
        }
        let mut left: Vec<_> = model.values().flatten().copied().collect();
        let mut values: Vec<_> = table.values().collect();
        left.sort_unstable();
        values.sort_unstable();
        prop_assert_eq!(&values, &left);
        prop_assert_eq!((table.len(), table.room()), (left.len(), PLACES / 4 - left.len()));
    }
    Ok(())
}

#[test]
fn test_a_large_table_holds_its_capacity() {
    let mut table = InFlight::<u16, 16384>::new();
    for key in 0..4096u64 {
        table.insert(UmemAddr(key * 4096), key as u16);
    }
    assert_eq!(table.room(), 0);
    assert!((0..4096u64).rev().all(|key| table.remove(UmemAddr(key * 4096)) == Some(key as u16)));
    assert_eq!(table.len(), 0);
}

#[test]
#[should_panic(expected = "room was checked")]
fn test_one_too_many_is_a_bug_that_is_caught() {
    let mut table = InFlight::<u8, 4>::new();
    table.insert(UmemAddr(0), 0);
    table.insert(UmemAddr(1), 0);
}
