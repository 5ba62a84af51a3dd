//! Map values as `bpf/steer.bpf.c` lays them out: both sides of one contract, so a change here is a change there.

use crate::filter::{Addresses, Filter, MacAddress, TABLE_MAX, VLAN_IDS, Vlans};

/// How a claimed queue's frames are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// Every frame of the queue is the guest's.
    Passthru,
    /// The frames that the program's filter names are the guest's, the rest is the host's.
    Mac,
}

/// `enum queue_state`.
pub(crate) type QueueState = u32;

/// `QUEUE_UNCLAIMED`, which is also what the kernel fills a new array with.
pub(crate) const UNCLAIMED: QueueState = 0;

impl Steer {
    pub(crate) fn to_state(self) -> QueueState {
        match self {
            Steer::Passthru => 1,
            Steer::Mac => 2,
        }
    }
}

const ALL_UNICAST: u32 = 1 << 0;
const ALL_MULTICAST: u32 = 1 << 1;
const BROADCAST: u32 = 1 << 2;
const ALL_VLANS: u32 = 1 << 3;

/// `struct filter`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct FilterValue {
    flags: u32,
    unicast_count: u16,
    multicast_count: u16,
    host_address: u64,
    unicast: [u64; TABLE_MAX],
    multicast: [u64; TABLE_MAX],
    vlans: [u64; VLAN_IDS / 64],
}

// SAFETY: `repr(C)`, of integers that leave no padding, each of which may have any value.
unsafe impl aya::Pod for FilterValue {}

impl From<&Filter> for FilterValue {
    fn from(filter: &Filter) -> Self {
        let (all_unicast, unicast_count, unicast) = table(&filter.unicast);
        let (all_multicast, multicast_count, multicast) = table(&filter.multicast);
        let (all_vlans, vlans) = bitmap(&filter.vlans);
        let flag = |flag, is_set| if is_set { flag } else { 0 };
        Self {
            flags: flag(ALL_UNICAST, all_unicast)
                | flag(ALL_MULTICAST, all_multicast)
                | flag(BROADCAST, filter.broadcast)
                | flag(ALL_VLANS, all_vlans),
            unicast_count,
            multicast_count,
            host_address: filter.host_address.map_or(0, number),
            unicast,
            multicast,
            vlans,
        }
    }
}

/// Whether it is all of them, and the table that counts if it is not.
fn table(addresses: &Addresses) -> (bool, u16, [u64; TABLE_MAX]) {
    let mut table = [0; TABLE_MAX];
    let Addresses::Of(listed) = addresses else { return (true, 0, table) };
    let mut count = 0;
    for (slot, mac) in table.iter_mut().zip(listed) {
        *slot = number(*mac);
        count += 1;
    }
    (false, count, table)
}

fn bitmap(vlans: &Vlans) -> (bool, [u64; VLAN_IDS / 64]) {
    let mut bitmap = [0; VLAN_IDS / 64];
    let Vlans::Of(listed) = vlans else { return (true, bitmap) };
    for vlan in listed {
        let vlan = usize::from(*vlan) % VLAN_IDS;
        bitmap[vlan / 64] |= 1 << (vlan % 64);
    }
    (false, bitmap)
}

/// `address_of`: three halves as the machine reads them, the first one lowest.
fn number(mac: MacAddress) -> u64 {
    let [a, b, c, d, e, f] = mac;
    let half = |pair| u64::from(u16::from_ne_bytes(pair));
    half([a, b]) | half([c, d]) << 16 | half([e, f]) << 32
}

/// `struct queue_counters` as one CPU counts.
pub(crate) type CpuCounters = [u64; 3];

/// Frames of one claimed queue since it was claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames handed to the guest's AF_XDP socket (which may still drop them, and counts that itself).
    pub redirected: u64,
    /// Frames passed to the host.
    pub passed: u64,
    /// Frames for the guest while no socket was in the queue's slot.
    pub dropped_no_guest: u64,
}

impl QueueCounters {
    pub(crate) fn sum<'a>(cpus: impl IntoIterator<Item = &'a CpuCounters>) -> Self {
        cpus.into_iter().fold(Self::default(), |sum, [redirected, passed, dropped_no_guest]| Self {
            redirected: sum.redirected + redirected,
            passed: sum.passed + passed,
            dropped_no_guest: sum.dropped_no_guest + dropped_no_guest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATION: MacAddress = [2, 3, 4, 5, 6, 7];

    #[test]
    fn claimed_states_are_not_the_unclaimed_one() {
        assert_ne!(Steer::Passthru.to_state(), UNCLAIMED);
        assert_ne!(Steer::Mac.to_state(), UNCLAIMED);
    }

    #[test]
    fn address_is_a_number_that_no_other_address_is() {
        assert_eq!(number([0; 6]), 0);
        assert_eq!(number([0xff; 6]), 0xffff_ffff_ffff);
        let others = (0..48).map(|bit| {
            let mut mac = STATION;
            mac[bit / 8] ^= 1 << (bit % 8);
            number(mac)
        });
        assert!(others.into_iter().all(|other| other != number(STATION)));
    }

    #[test]
    fn filter_of_tables_has_their_entries_and_no_flag() {
        let filter = Filter {
            unicast: Addresses::Of(vec![STATION, [2; 6]]),
            multicast: Addresses::Of(vec![[1; 6]]),
            broadcast: false,
            vlans: Vlans::Of(vec![5, 64, 4095]),
            host_address: Some([4; 6]),
        };
        let value = FilterValue::from(&filter);
        assert_eq!((value.flags, value.unicast_count, value.multicast_count), (0, 2, 1));
        assert_eq!(value.unicast[..3], [number(STATION), number([2; 6]), 0]);
        assert_eq!(value.multicast[..2], [number([1; 6]), 0]);
        assert_eq!((value.vlans[0], value.vlans[1], value.vlans[63]), (1 << 5, 1, 1 << 63));
        assert_eq!(value.host_address, number([4; 6]));
    }

    #[test]
    fn filter_of_everything_is_all_flags() {
        let filter = Filter {
            unicast: Addresses::All,
            multicast: Addresses::All,
            broadcast: true,
            vlans: Vlans::All,
            host_address: None,
        };
        let value = FilterValue::from(&filter);
        assert_eq!(value.flags, 0b1111);
        assert_eq!((value.unicast_count, value.multicast_count, value.host_address), (0, 0, 0));
    }

    #[test]
    fn counters_sum_over_cpus() {
        let sum = QueueCounters::sum(&[[1, 2, 3], [10, 20, 30]]);
        assert_eq!(sum, QueueCounters { redirected: 11, passed: 22, dropped_no_guest: 33 });
    }
}
