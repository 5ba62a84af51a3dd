//! The pump: one thread per queue pair that joins two virtqueues and an AF_XDP socket.
//!
//! Each direction is a burst: see [`rx`] and [`tx`]. [`run`] is the loop around them: commands from the control
//! plane, work, adaptive waiting.
//!
//! Invariants: the loop allocates nothing, logs nothing and makes no system call per frame; no Python runs on its
//! thread.

mod command;
mod inflight;
mod packet;
mod position;
mod run;
mod rx;
mod slab;
mod source_lock;
mod tx;
mod vring;
mod wait;

pub(crate) use command::CommandQueue;
pub use command::{Command, Completion, Event, EventQueue};
#[cfg(feature = "fuzzing")]
pub(crate) use run::fuzz;
#[cfg(feature = "test-utils")]
pub(crate) use run::microbench;
pub(crate) use run::{Pump, PumpView};
pub(crate) use slab::slab_bytes;
pub use source_lock::SourceLock;
pub use vring::{MacAddress, VringConfig};
pub use wait::{PollMode, Spin, sleep};
