//! The built-in guest: guest memory and a virtio-net driver (VIRTIO 1.3 section 5.1), without a VM around them.
//!
//! A vhost-user front-end ([`Guest`] is only its guest half) tells a back-end of the regions and rings; each queue
//! pair is then driven by a thread of its own, which can be started with other roles and parked at any time without
//! the device noticing. All figures are read while threads run ([`Guest::counters`], [`Guest::violations`]).
//!
//! The invariant: a buffer is either in its [`QueueDriver`]'s hands or the device's, and every head that the device
//! returns is checked against that.

mod buffers;
mod config;
mod counters;
mod pair;
mod rx;
mod tx;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::driver::{IndirectTables, QueueDriver, RawPackedRing, RawRing, RingLayout};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, GuestPhysAddr};
use crate::pattern::{CheckCounts, Checker};
use buffers::{Buffers, Gaps};
pub use config::{BufferLayout, GuestConfig, Payload, RxRole, SourceConfig, features};
pub use counters::{Counters, Violations};
pub use pair::{Captured, QueueEvents};
use pair::{QueuePair, Shared, lock};
use rx::RxQueue;
use tx::{CHAIN_MAX, TxQueue};

const PAGE_BYTES: u64 = 4096;

/// Where everything of one virtqueue lies.
#[derive(Clone, Debug)]
struct QueuePlan {
    ring: RingLayout,
    tables: Option<IndirectTables>,
    buffers: Buffers,
}

impl QueuePlan {
    fn driver(&self, memory: &Arc<GuestMemory>, config: &GuestConfig) -> Result<QueueDriver> {
        let event_idx = config.has(features::VIRTIO_F_EVENT_IDX);
        let mut driver = QueueDriver::new(memory, self.ring, event_idx, config.is_packed())?;
        if let Some(tables) = self.tables {
            driver.use_indirect_tables(tables)?;
        }
        Ok(driver)
    }
}

enum Slot {
    Parked(Box<QueuePair>),
    Running(JoinHandle<(Box<QueuePair>, Result<()>)>),
    /// Its thread panicked; there is nothing left to run.
    Lost,
}

/// Memory, rings and driver of one guest. See the module's documentation.
pub struct Guest {
    config: GuestConfig,
    memory: Arc<GuestMemory>,
    /// rx of queue pair n is 2n, tx is 2n + 1.
    plans: Vec<QueuePlan>,
    /// One of both for each virtqueue.
    rings: Vec<RawRing>,
    packed_rings: Vec<RawPackedRing>,
    gaps: Gaps,
    shared: Vec<Arc<Shared>>,
    checker: Arc<Mutex<Checker>>,
    slots: Mutex<Vec<Slot>>,
}

impl Guest {
    /// Makes memory, lays out rings and buffers, and posts every rx buffer. No thread runs yet.
    ///
    /// # Errors
    /// [`Error::Config`] if the parts do not fit together or into their regions; [`Error::System`] if the kernel has
    /// no memory or descriptors.
    pub fn new(config: GuestConfig) -> Result<Self> {
        config.check()?;
        let memory = Arc::new(GuestMemory::new(&config.regions)?);
        let plans = plan(&config, &memory)?;
        let (split, packed) = if config.is_packed() { (&[][..], &plans[..]) } else { (&plans[..], &[][..]) };
        let rings = split.iter().map(|plan| RawRing::new(&memory, plan.ring)).collect::<Result<_>>()?;
        let packed_rings = packed.iter().map(|plan| RawPackedRing::new(&memory, plan.ring)).collect::<Result<_>>()?;
        let gaps = Gaps::around(&memory, taken(&plans))?;
        if config.canaries {
            gaps.fill()?;
        }
        let checker = Arc::new(Mutex::default());
        let shared = (0..config.queue_pairs)
            .map(|_| Shared::new(Arc::clone(&checker)).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let guest = Self { config, memory, plans, rings, packed_rings, gaps, shared, checker, slots: Mutex::default() };
        *lock(&guest.slots) = guest.fresh_slots()?;
        Ok(guest)
    }

    fn fresh_slots(&self) -> Result<Vec<Slot>> {
        let pair = |(plans, shared): (&[QueuePlan], &Arc<Shared>)| {
            let [rx_plan, tx_plan] = plans else { return Err(Error::config("a queue pair is rx and tx")) };
            let rx_driver = rx_plan.driver(&self.memory, &self.config)?;
            let rx = RxQueue::new(rx_driver, rx_plan.buffers.clone(), &self.config)?;
            let tx_driver = tx_plan.driver(&self.memory, &self.config)?;
            let tx = TxQueue::new(tx_driver, tx_plan.buffers.clone(), &self.config);
            let pair = QueuePair::new(rx, tx, Arc::clone(shared), self.config.polling, self.config.capture_frames);
            Ok(Slot::Parked(Box::new(pair)))
        };
        self.plans.chunks(2).zip(&self.shared).map(pair).collect()
    }

    /// How the guest was set up.
    #[must_use]
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Where virtqueue `index` lies (rx of queue pair n is 2n, tx is 2n + 1).
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such virtqueue.
    pub fn layout(&self, index: usize) -> Result<&RingLayout> {
        self.plans.get(index).map(|plan| &plan.ring).ok_or_else(|| no_such_queue(index))
    }

    /// Bare access to a split virtqueue, for tests that misbehave on purpose.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such virtqueue, or it is packed.
    pub fn ring(&self, index: usize) -> Result<&RawRing> {
        self.rings.get(index).ok_or_else(|| no_such_queue(index))
    }

    /// Bare access to a packed virtqueue, for tests that misbehave on purpose.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such virtqueue, or it is split.
    pub fn packed_ring(&self, index: usize) -> Result<&RawPackedRing> {
        self.packed_rings.get(index).ok_or_else(|| no_such_queue(index))
    }

    /// The eventfds of virtqueue `index`.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such virtqueue.
    pub fn events(&self, index: usize) -> Result<&QueueEvents> {
        let shared = self.shared.get(index / 2).ok_or_else(|| no_such_queue(index))?;
        Ok(if index.is_multiple_of(2) { &shared.rx } else { &shared.tx })
    }

    /// Runs a queue pair with these roles; one that runs is parked first, and goes on where it was.
    ///
    /// # Errors
    /// [`Error::Config`] if the source cannot work or the queue pair's thread has panicked.
    pub fn start(&self, queue_pair: usize, role: RxRole, source: Option<SourceConfig>, polling: bool) -> Result<()> {
        if let Some(source) = &source {
            source.check(self.config.header_bytes(), self.config.tx.capacity_bytes())?;
        }
        let mut slots = lock(&self.slots);
        let slot = slots.get_mut(queue_pair).ok_or_else(|| no_such_queue(queue_pair * 2))?;
        let mut pair = park(slot, &self.shared[queue_pair], queue_pair)?;
        pair.set_roles(role, source, polling);
        let work = move || {
            let result = pair.run();
            (pair, result)
        };
        let thread = std::thread::Builder::new()
            .name(format!("guest-{queue_pair}"))
            .spawn(work)
            .map_err(|error| Error::os("start a guest thread", error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        *slot = Slot::Running(thread);
        Ok(())
    }

    /// Parks every thread; posted buffers stay posted. Parked queue pairs are left as they are.
    ///
    /// # Errors
    /// [`Error::Config`] if a thread panicked, [`Error::System`] if one could not wait for its device.
    pub fn park(&self) -> Result<()> {
        let mut slots = lock(&self.slots);
        for shared in &self.shared {
            shared.request_stop();
        }
        for (index, slot) in slots.iter_mut().enumerate() {
            let pair = park(slot, &self.shared[index], index)?;
            *slot = Slot::Parked(pair);
        }
        Ok(())
    }

    /// Closes the account of a device that has stopped: takes what is left in the used rings and counts what was
    /// neither used nor given back. `bases` are those of GET_VRING_BASE, by virtqueue.
    ///
    /// # Errors
    /// As [`park`](Self::park); [`Error::Config`] if there are not two bases per queue pair.
    pub fn settle(&self, bases: &[u32]) -> Result<()> {
        if bases.len() != self.plans.len() {
            return Err(Error::config(format!("{} ring bases for {} virtqueues", bases.len(), self.plans.len())));
        }
        self.park()?;
        for (slot, bases) in lock(&self.slots).iter_mut().zip(bases.chunks_exact(2)) {
            if let Slot::Parked(pair) = slot {
                pair.settle([bases[0], bases[1]]);
            }
        }
        Ok(())
    }

    /// Starts over as a driver does after a device reset: rings cleared, ring bases at their start, every rx buffer posted anew.
    /// Counters go on; figures of the pattern check start over.
    ///
    /// # Errors
    /// As [`park`](Self::park).
    pub fn reset(&self) -> Result<()> {
        // A lost thread's queue pair is replaced like the others.
        let parked = self.park();
        *lock(&self.slots) = self.fresh_slots()?;
        *lock(&self.checker) = Checker::default();
        parked
    }

    /// Counters of one queue pair.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such queue pair.
    pub fn counters(&self, queue_pair: usize) -> Result<Counters> {
        Ok(self.shared.get(queue_pair).ok_or_else(|| no_such_queue(queue_pair * 2))?.counters.snapshot())
    }

    /// Violations by one queue pair's device.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no such queue pair.
    pub fn violations(&self, queue_pair: usize) -> Result<Violations> {
        Ok(self.shared.get(queue_pair).ok_or_else(|| no_such_queue(queue_pair * 2))?.violations.snapshot())
    }

    /// What the pattern check found, over all queue pairs.
    #[must_use]
    pub fn check_counts(&self) -> CheckCounts {
        lock(&self.checker).counts()
    }

    /// Takes the frames captured so far.
    #[must_use]
    pub fn take_captured(&self) -> Vec<Captured> {
        self.shared.iter().flat_map(|shared| std::mem::take(&mut *lock(&shared.captured))).collect()
    }

    /// How many bytes that belong to no ring and no buffer have changed. Threads may run meanwhile.
    ///
    /// # Errors
    /// [`Error::Config`] if the guest was made without canaries.
    pub fn changed_gap_bytes(&self) -> Result<u64> {
        if !self.config.canaries {
            return Err(Error::config("this guest was made without canaries"));
        }
        self.gaps.changed()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A panic of a thread has been printed by it; there is nobody to tell here.
        let _ = self.park();
    }
}

fn no_such_queue(index: usize) -> Error {
    Error::config(format!("there is no virtqueue {index} of this layout"))
}

/// Takes a queue pair out of its slot, off its thread if it is on one.
fn park(slot: &mut Slot, shared: &Shared, index: usize) -> Result<Box<QueuePair>> {
    match std::mem::replace(slot, Slot::Lost) {
        Slot::Parked(pair) => Ok(pair),
        Slot::Lost => Err(Error::config(format!("the thread of queue pair {index} panicked; reset the guest"))),
        Slot::Running(thread) => {
            shared.request_stop();
            let (pair, result) = thread
                .join()
                .map_err(|_| Error::config(format!("the thread of queue pair {index} panicked; reset the guest")))?;
            if let Err(error) = result {
                *slot = Slot::Parked(pair);
                return Err(error);
            }
            Ok(pair)
        }
    }
}

/// Lays out rings, tables and buffers: each kind in its region, one after the other, each on a page of its own.
fn plan(config: &GuestConfig, memory: &Arc<GuestMemory>) -> Result<Vec<QueuePlan>> {
    let size = config.queue_size;
    let mut cursors: Vec<_> =
        memory.regions().iter().map(|region| region.config().guest_phys_address.align_up(PAGE_BYTES)).collect();
    let mut plans = Vec::new();
    for index in 0..2 * config.queue_pairs {
        let cursor = &mut cursors[config.ring_region];
        let start = cursor.align_up(PAGE_BYTES);
        let ring =
            if config.is_packed() { RingLayout::packed(start, size) } else { RingLayout::contiguous(start, size) };
        *cursor = ring.end();
        let layout = if index % 2 == 0 { &config.rx } else { &config.tx };
        let tables = layout.indirect.then(|| {
            let entries = layout.pieces.len().max(CHAIN_MAX) as u16;
            IndirectTables { start: cursor.align_up(PAGE_BYTES), entries }
        });
        if let Some(tables) = tables {
            *cursor = tables.end(size);
        }
        plans.push((ring, tables));
    }
    let place = |(index, (ring, tables)): (usize, (RingLayout, Option<IndirectTables>))| {
        let layout = if index % 2 == 0 { &config.rx } else { &config.tx };
        let start = cursors[layout.region].plus(PAGE_BYTES).align_up(PAGE_BYTES);
        let buffers = Buffers::place(memory, layout, layout.buffers(size), start)?;
        let end = buffers.extents().map(|(address, bytes)| address.plus(bytes)).max().unwrap_or(start);
        cursors[layout.region] = end;
        Ok(QueuePlan { ring, tables, buffers })
    };
    plans.into_iter().enumerate().map(place).collect()
}

/// Every extent (address, bytes) that somebody may write.
fn taken(plans: &[QueuePlan]) -> Vec<(GuestPhysAddr, u64)> {
    let mut taken = Vec::new();
    for plan in plans {
        taken.push((plan.ring.desc, plan.ring.end().0 - plan.ring.desc.0));
        if let Some(tables) = plan.tables {
            taken.push((tables.start, tables.end(plan.ring.size).0 - tables.start.0));
        }
        taken.extend(plan.buffers.extents());
    }
    taken
}

#[cfg(test)]
mod tests;
