//! What a NIC's offloads are to a virtio-net guest, done here: AF_XDP has none of them.

pub mod checksum;
#[cfg(test)]
mod tests;
