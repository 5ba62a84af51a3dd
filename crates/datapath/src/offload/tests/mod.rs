//! Offloads against references that are as plain as can be.

mod checksum;
mod gro;
pub(crate) mod packet;
pub(crate) mod segment;
