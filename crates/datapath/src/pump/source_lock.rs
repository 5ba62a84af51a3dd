//! Anti-spoofing: source addresses that frames from the guest may have.
//!
//! A guest can rewrite a frame at any moment until it has left, so that looking at it in guest memory proves nothing.
//! What is checked here is always a copy of ours, and that copy is what is sent: see `tx/offload.rs` and `packet.rs`.

use std::sync::Arc;

use crate::offload::headers::ETHERNET_HEADER_BYTES;
use crate::stats::DropReason;

/// The source addresses that frames may have; any, if there are none.
#[derive(Debug, Clone, Default)]
pub struct SourceLock {
    allowed: Option<Arc<[[u8; 6]]>>,
}

impl SourceLock {
    /// Any source will do.
    pub fn open() -> Self {
        Self::default()
    }

    /// One of these it has to be.
    pub fn to(addresses: &[[u8; 6]]) -> Self {
        Self { allowed: Some(addresses.into()) }
    }

    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.allowed.is_none()
    }

    /// # Errors
    /// The source address of a frame that begins so is none of those.
    pub(super) fn check(&self, ethernet: [u8; ETHERNET_HEADER_BYTES]) -> Result<(), DropReason> {
        let [_, _, _, _, _, _, source @ .., _, _] = ethernet;
        if self.allows(source) { Ok(()) } else { Err(DropReason::Spoofed) }
    }

    /// Whether a frame may have this source.
    pub(super) fn allows(&self, source: [u8; 6]) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(&source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(source: [u8; 6]) -> [u8; ETHERNET_HEADER_BYTES] {
        let mut ethernet = [2; ETHERNET_HEADER_BYTES];
        ethernet[6..12].copy_from_slice(&source);
        ethernet
    }

    #[test]
    fn open_lock_takes_every_source() {
        assert!(SourceLock::open().is_open());
        assert_eq!(SourceLock::open().check(from([1; 6])), Ok(()));
    }

    #[test]
    fn locked_takes_its_addresses_and_no_near_miss() {
        let lock = SourceLock::to(&[[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]]);
        assert!(!lock.is_open());
        assert_eq!(lock.check(from([2, 0, 0, 0, 0, 2])), Ok(()));
        for bit in 0..48 {
            let mut source = [2, 0, 0, 0, 0, 1];
            source[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(lock.check(from(source)), Err(DropReason::Spoofed), "{source:x?}");
        }
    }

    #[test]
    fn lock_without_addresses_takes_none() {
        assert_eq!(SourceLock::to(&[]).check(from([0; 6])), Err(DropReason::Spoofed));
    }
}
