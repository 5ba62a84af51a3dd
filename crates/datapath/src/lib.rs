//! The data plane of one port: guest memory, virtqueues, AF_XDP sockets and the pump that joins them.
//!
//! Dependencies point one way: `engine → pump → {virtqueue, xsk, packet, offload} → guest_memory`. Nothing here knows of
//! Python or of vhost-user.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod engine;
pub mod error;
pub mod fd;
#[cfg(any(test, feature = "test-utils"))]
// For tests, fuzzing and benches: what cannot be made ends them.
#[allow(clippy::unwrap_used, missing_docs, dead_code)]
mod fixture;
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    //! Cases for the fuzzers of `fuzz/`.

    pub use crate::pump::fuzz::{racing_ring_case, ring_case};
}
pub mod guest_memory;
#[cfg(feature = "test-utils")]
pub mod microbench {
    //! Scenes for the microbenchmarks of `bench/microbench`.

    pub use crate::pump::microbench::{Path, Plan, Scene, Way};
}
pub mod offload;
mod packet;
pub mod pump;
pub mod stats;
pub mod virtqueue;
pub mod xsk;
