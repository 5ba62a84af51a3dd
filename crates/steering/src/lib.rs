//! Loads, attaches and configures the XDP steering program (`bpf/steer.bpf.c`).
//!
//! [`SteeringProgram`] owns the program of one interface with its maps. It is attached by a bpf_link and by nothing
//! else, so that the kernel takes it off the interface when the owning process ends, however it ends.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod error;
mod filter;
mod layout;
mod link;
mod program;
mod xdp_query;

pub use error::SteeringError;
pub use filter::{Addresses, Filter, FilterError, MacAddress, TABLE_MAX, Vlans};
pub use layout::{QueueCounters, Steer};
pub use link::XdpMode;
pub use program::SteeringProgram;
