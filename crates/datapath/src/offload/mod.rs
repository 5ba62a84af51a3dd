//! What a NIC's offloads are to a virtio-net guest, done here: AF_XDP has none of them.

pub mod checksum;
pub mod gro;
pub mod headers;
pub mod segment;
#[cfg(test)]
pub(crate) mod tests;
