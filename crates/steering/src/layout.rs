//! Map values as `bpf/steer.bpf.c` lays them out: both sides of one contract, so a change here is a change there.

/// A MAC address in the order of the wire.
pub type MacAddress = [u8; 6];

/// How a claimed queue's frames are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// Every frame of the queue is the guest's.
    Passthru,
    /// Frames to the guest's MAC address, and by choice to group addresses; the rest is the host's.
    Mac {
        /// The guest's address.
        mac: MacAddress,
        /// Broadcast frames go to the guest, and not to the host.
        broadcast: bool,
        /// Multicast frames go to the guest, and not to the host.
        multicast: bool,
    },
}

/// `struct queue_config`: state, flags, mac.
pub(crate) type QueueConfig = [u8; 8];

/// `QUEUE_UNCLAIMED`, which is also what the kernel fills a new array with.
pub(crate) const UNCLAIMED: QueueConfig = [0; 8];

impl Steer {
    pub(crate) fn to_config(self) -> QueueConfig {
        match self {
            Steer::Passthru => [1, 0, 0, 0, 0, 0, 0, 0],
            Steer::Mac { mac, broadcast, multicast } => {
                let flags = u8::from(broadcast) | u8::from(multicast) << 1;
                let [a, b, c, d, e, f] = mac;
                [2, flags, a, b, c, d, e, f]
            }
        }
    }
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

    #[test]
    fn mac_config_has_state_flags_and_address_in_wire_order() {
        let steer = Steer::Mac { mac: [2, 3, 4, 5, 6, 7], broadcast: true, multicast: false };
        assert_eq!(steer.to_config(), [2, 1, 2, 3, 4, 5, 6, 7]);
        let steer = Steer::Mac { mac: [2, 3, 4, 5, 6, 7], broadcast: false, multicast: true };
        assert_eq!(steer.to_config()[1], 2);
    }

    #[test]
    fn passthru_is_not_the_unclaimed_state() {
        assert_ne!(Steer::Passthru.to_config(), UNCLAIMED);
    }

    #[test]
    fn counters_sum_over_cpus() {
        let sum = QueueCounters::sum(&[[1, 2, 3], [10, 20, 30]]);
        assert_eq!(sum, QueueCounters { redirected: 11, passed: 22, dropped_no_guest: 33 });
    }
}
