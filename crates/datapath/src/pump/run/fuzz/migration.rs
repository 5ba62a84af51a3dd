//! The other end of a migration: it has what the driver wrote, and the pages that the device marked. Whatever else the
//! device, the kernel or the NIC wrote is missing there.

use std::sync::Arc;

use arbitrary::Result;

use super::Case;
use super::world::World;
use crate::fixture::{dirty_log, write_log};
use crate::guest_memory::{DirtyLog, PAGE_BYTES};
use crate::pump::Command;
use crate::virtqueue::WriteLog;

/// A migration that goes on.
pub struct Migration {
    log: Arc<DirtyLog>,
    /// Guest memory as the other end has it.
    copy: Vec<u8>,
}

impl Migration {
    /// The driver writes: the VMM sees that by itself.
    pub fn driver_writes(&mut self, offset: usize, bytes: &[u8]) {
        self.copy[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// How a queue logs whose used ring is at `used`.
    pub fn write_log(&self, world: &World, used: u64) -> WriteLog {
        write_log(&self.log, world.plan.guest_phys(used))
    }
}

impl World {
    /// Takes the bits of a log, and copies their pages.
    fn copy_marked_pages(&mut self, log: &DirtyLog) {
        let plan = self.plan;
        self.copy_pages(|page| log.take(plan.guest_phys(page) / PAGE_BYTES));
    }

    fn copy_pages(&mut self, which: impl Fn(u64) -> bool) {
        let Some(mut migration) = self.migration.take() else { return };
        for page in self.pages().filter(|&page| which(page)) {
            let bytes: [u8; PAGE_BYTES as usize] = self.read(page);
            migration.copy[page as usize..(page + PAGE_BYTES) as usize].copy_from_slice(&bytes);
        }
        self.migration = Some(migration);
    }

    fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.plan.total_bytes()).step_by(PAGE_BYTES as usize)
    }
}

fn new_log(world: &World) -> Arc<DirtyLog> {
    dirty_log(world.plan.guest_phys(world.plan.total_bytes()))
}

impl Case<'_> {
    /// A migration begins, goes on, gets another log, or is given up.
    pub(super) fn migrate(&mut self) -> Result<()> {
        let choice = self.byte()? % 8;
        match self.world.migration.take() {
            None => self.begin_migration(),
            Some(migration) if choice < 5 => {
                let log = Arc::clone(&migration.log);
                self.world.migration = Some(migration);
                self.world.copy_marked_pages(&log);
            }
            Some(mut migration) if choice < 7 => {
                let old = std::mem::replace(&mut migration.log, new_log(&self.world));
                self.world.migration = Some(migration);
                self.set_logs();
                self.world.copy_marked_pages(&old);
            }
            Some(_) => self.set_logs(),
        }
        Ok(())
    }

    fn begin_migration(&mut self) {
        if self.racing {
            return;
        }
        let copy = vec![0; self.world.plan.total_bytes() as usize];
        self.world.migration = Some(Migration { log: new_log(&self.world), copy });
        self.set_logs();
        self.world.copy_pages(|_| true);
    }

    /// Tells the queues that run of the log there is now.
    fn set_logs(&mut self) {
        for tx in [false, true] {
            if let Some(ring) = self.ring(tx) {
                let log = self.world.migration.as_ref().map(|m| m.write_log(&self.world, ring.used));
                self.observe(|pump| pump.execute(Command::SetLog { tx, log })).expect("a running queue logs");
            }
        }
    }

    /// Everything is stopped: both ends have the same memory.
    pub(super) fn finish_migration(&mut self) {
        let Some(log) = self.world.migration.as_ref().map(|migration| Arc::clone(&migration.log)) else { return };
        self.world.copy_marked_pages(&log);
        let Some(migration) = self.world.migration.take() else { return };
        for page in self.world.pages() {
            let here: [u8; PAGE_BYTES as usize] = self.world.read(page);
            let there = &migration.copy[page as usize..(page + PAGE_BYTES) as usize];
            assert!(here == there, "page {page:#x} was written and not marked");
        }
    }
}
