//! Which frames are the guest's where its queues are shared with the host.

/// A MAC address in the order of the wire.
pub type MacAddress = [u8; 6];

/// Addresses of a kind that a filter has room for.
pub const TABLE_MAX: usize = 64;

/// Numbers that a VLAN tag has room for.
pub const VLAN_IDS: usize = 4096;

/// Addresses of one kind: all that there are, or those of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Every one.
    All,
    /// These, [`TABLE_MAX`] at most.
    Of(Vec<MacAddress>),
}

/// VLANs: all that there are, or those of a table. A frame without a tag is in none, and is not judged by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vlans {
    /// Every one.
    All,
    /// These, numbered below [`VLAN_IDS`].
    Of(Vec<u16>),
}

/// Which frames are the guest's: those of its VLANs that are sent to its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Station addresses.
    pub unicast: Addresses,
    /// Group addresses, but for broadcast.
    pub multicast: Addresses,
    /// Broadcast frames go to the guest, and not to the host.
    pub broadcast: bool,
    /// VLANs (IEEE 802.1Q).
    pub vlans: Vlans,
    /// Frames to this station are the host's, whatever `unicast` says.
    pub host_address: Option<MacAddress>,
}

/// What a [`Filter`] must not be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// A table has more entries than the program has room for.
    #[error("a table has at most {TABLE_MAX} addresses, not {0}")]
    TableTooLong(usize),
    /// A group address where stations are named.
    #[error("{} is a group address; a station's is not", Hex(.0))]
    GroupAddress(MacAddress),
    /// A station's address, or that of broadcast, where groups are named.
    #[error("{} is not the address of a multicast group", Hex(.0))]
    NotMulticast(MacAddress),
    /// A VLAN that no tag can name.
    #[error("VLANs are numbered below {VLAN_IDS}; {0} is not")]
    NoSuchVlan(u16),
}

impl Filter {
    /// Refuses what the program could not hold, or would never match.
    ///
    /// # Errors
    /// See [`FilterError`].
    pub fn check(&self) -> Result<(), FilterError> {
        for mac in listed(&self.unicast)?.iter().chain(&self.host_address) {
            if is_group(*mac) {
                return Err(FilterError::GroupAddress(*mac));
            }
        }
        for mac in listed(&self.multicast)? {
            if !is_group(*mac) || *mac == [0xff; 6] {
                return Err(FilterError::NotMulticast(*mac));
            }
        }
        let Vlans::Of(vlans) = &self.vlans else { return Ok(()) };
        match vlans.iter().find(|vlan| usize::from(**vlan) >= VLAN_IDS) {
            Some(vlan) => Err(FilterError::NoSuchVlan(*vlan)),
            None => Ok(()),
        }
    }
}

fn listed(addresses: &Addresses) -> Result<&[MacAddress], FilterError> {
    match addresses {
        Addresses::All => Ok(&[]),
        Addresses::Of(table) if table.len() > TABLE_MAX => Err(FilterError::TableTooLong(table.len())),
        Addresses::Of(table) => Ok(table),
    }
}

fn is_group(mac: MacAddress) -> bool {
    mac[0] & 1 == 1
}

struct Hex<'a>(&'a MacAddress);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter() -> Filter {
        Filter {
            unicast: Addresses::Of(vec![[2; 6]; TABLE_MAX]),
            multicast: Addresses::Of(vec![[1; 6]; TABLE_MAX]),
            broadcast: true,
            vlans: Vlans::Of(vec![0, 4095]),
            host_address: Some([4; 6]),
        }
    }

    #[test]
    fn full_tables_are_taken_and_fuller_ones_refused() {
        assert_eq!(filter().check(), Ok(()));
        let unicast = Addresses::Of(vec![[2; 6]; TABLE_MAX + 1]);
        assert_eq!(Filter { unicast, ..filter() }.check(), Err(FilterError::TableTooLong(65)));
        let multicast = Addresses::Of(vec![[1; 6]; TABLE_MAX + 1]);
        assert_eq!(Filter { multicast, ..filter() }.check(), Err(FilterError::TableTooLong(65)));
    }

    #[test]
    fn addresses_of_the_other_kind_are_refused() {
        let group = [1, 0, 0x5e, 0, 0, 1];
        let unicast = Addresses::Of(vec![group]);
        assert_eq!(Filter { unicast, ..filter() }.check(), Err(FilterError::GroupAddress(group)));
        assert_eq!(Filter { host_address: Some(group), ..filter() }.check(), Err(FilterError::GroupAddress(group)));
        for other in [[2; 6], [0xff; 6]] {
            let multicast = Addresses::Of(vec![other]);
            assert_eq!(Filter { multicast, ..filter() }.check(), Err(FilterError::NotMulticast(other)));
        }
        assert_eq!(
            FilterError::GroupAddress(group).to_string(),
            "01:00:5e:00:00:01 is a group address; a station's is not"
        );
    }

    #[test]
    fn vlan_beyond_the_last_is_refused() {
        let vlans = Vlans::Of(vec![1, 4096]);
        assert_eq!(Filter { vlans, ..filter() }.check(), Err(FilterError::NoSuchVlan(4096)));
    }
}
