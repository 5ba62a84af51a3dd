//! Offloads against references that are as plain as can be.

mod checksum;
pub(crate) mod packet;
mod segment;
