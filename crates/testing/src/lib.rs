//! What tests, demo and benches use instead of a VM and a second machine.
//!
//! - [`memory`] and [`driver`]: guest memory and the driver side of split virtqueues;
//! - [`guest`]: the built-in guest, a virtio-net driver on a thread per queue pair;
//! - [`wire`]: the far end of a veth pair: a frame generator, a checked AF_PACKET wire, an XDP sink;
//! - [`pattern`]: frames that prove their own content, the same on both ends.
//!
//! Nothing here trusts the device under test, and nothing in the product depends on this crate.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod driver;
mod error;
pub mod eventfd;
pub mod guest;
pub mod memory;
#[cfg(test)]
mod model_device;
pub mod pattern;
pub mod wire;

pub use error::{Error, Result};
