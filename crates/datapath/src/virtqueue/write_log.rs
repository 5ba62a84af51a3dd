//! Which writes to guest memory a virtqueue logs, and where (vhost-user.rst, "Migration").

use std::sync::Arc;

use crate::fd::EventFd;
use crate::guest_memory::{DirtyLog, GuestMemory, GuestPhysAddr, UmemAddr};

/// What the front-end asked to have logged of a virtqueue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Logged {
    /// Writes to the driver's buffers (VHOST_F_LOG_ALL).
    pub buffers: bool,
    /// Writes to the used ring, as if it started at this address (VHOST_VRING_F_LOG, log_guest_addr).
    pub used_ring: Option<GuestPhysAddr>,
}

/// A log, and what goes into it.
#[derive(Debug, Clone)]
pub struct WriteLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// What is logged.
    pub logged: Logged,
    /// Signalled when pages have been marked (SET_LOG_FD).
    pub notify: Option<Arc<EventFd>>,
}

impl WriteLog {
    /// A buffer was written; all of it lies in one region.
    pub(super) fn buffer(&self, memory: &GuestMemory, start: UmemAddr, len_bytes: u64, region_hint: usize) {
        if self.logged.buffers
            && let Some(address) = memory.guest_phys(start, region_hint)
        {
            self.log.mark(address, len_bytes);
        }
    }

    /// The used ring was written, `offset` bytes from its start.
    pub(super) fn used_ring(&self, offset: u64, len_bytes: u64) {
        if let Some(address) = self.logged.used_ring.and_then(|start| start.checked_add(offset)) {
            self.log.mark(address, len_bytes);
        }
    }

    /// A part of a ring in guest memory was written, which lies in one region.
    pub(super) fn ring(&self, memory: &GuestMemory, start: UmemAddr, len_bytes: u64) {
        if self.logged.used_ring.is_some()
            && let Some(address) = memory.guest_phys(start, 0)
        {
            self.log.mark(address, len_bytes);
        }
    }

    /// Used entries were shown to the driver: all that was written for them is marked.
    pub(super) fn published(&self) {
        if let Some(notify) = &self.notify {
            notify.signal();
        }
    }
}
