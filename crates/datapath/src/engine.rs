//! The data plane of one port, as the control plane sees it: a memory map, and one pump per queue pair.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, HostError};
use crate::fd::{EventFd, duplicate};
use crate::guest_memory::{DirtyLog, GuestMemory, LogSpec, RegionSpec};
use crate::pump::{Command, CommandQueue, EventQueue, PollMode, Pump, PumpView, VringConfig, slab_bytes};
use crate::stats::Counts;
use crate::virtqueue::{Logged, WriteLog};
use crate::xsk::{SharedFd, SocketParams};

/// Most queue pairs of a port; VIRTIO_NET_F_MQ would allow 32768.
pub const QUEUE_PAIRS_MAX: usize = 64;

struct PumpHandle {
    commands: Arc<CommandQueue>,
    view: Arc<PumpView>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The migration log, and who is told of marks.
#[derive(Default)]
struct Log {
    bits: Option<Arc<DirtyLog>>,
    notify: Option<Arc<EventFd>>,
}

/// One port. Steps that a pump executes return a token at once; an [`Event::Completed`](crate::pump::Event) with that
/// token follows.
pub struct Engine {
    pumps: Vec<PumpHandle>,
    events: Arc<EventQueue>,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    log: Mutex<Log>,
    next_token: AtomicU64,
}

impl Engine {
    /// Starts the pump threads; they sleep until there is work.
    ///
    /// # Errors
    /// More than [`QUEUE_PAIRS_MAX`] or no queue pairs; no eventfd or thread can be made.
    pub fn new(queue_pairs: usize, poll: PollMode) -> Result<Self, Error> {
        if !(1..=QUEUE_PAIRS_MAX).contains(&queue_pairs) {
            return Err(Error::Refused(format!(
                "cannot make {queue_pairs} queue pairs: 1 to {QUEUE_PAIRS_MAX} are possible"
            )));
        }
        let mut engine = Self {
            pumps: Vec::with_capacity(queue_pairs),
            events: Arc::new(EventQueue::new()?),
            memory: Mutex::default(),
            log: Mutex::default(),
            next_token: AtomicU64::new(1),
        };
        for pair in 0..queue_pairs {
            engine.pumps.push(start_pump(pair, poll, &engine.events)?);
        }
        Ok(engine)
    }

    /// Events of all pumps.
    pub fn events(&self) -> &EventQueue {
        &self.events
    }

    /// Number of queue pairs.
    pub fn queue_pairs(&self) -> usize {
        self.pumps.len()
    }

    /// Replaces the memory map. Every virtqueue is stopped and every socket detached, so that nothing refers to the old
    /// one: it is unmapped before the new one is mapped.
    ///
    /// # Errors
    /// See [`GuestMemory::map`]; then no memory is mapped. Refused while something runs.
    pub fn map_memory(&self, regions: &[RegionSpec]) -> Result<(), Error> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = memory.take()
            && let Err(in_use) = Arc::try_unwrap(old)
        {
            *memory = Some(in_use);
            return Err(Error::Refused("cannot replace guest memory while a virtqueue or socket uses it".into()));
        }
        if !regions.is_empty() {
            *memory = Some(Arc::new(GuestMemory::map(regions, slab_bytes(self.pumps.len()))?));
        }
        Ok(())
    }

    /// Binds a socket to a queue pair; the first one registers guest memory as the UMEM, others share it.
    ///
    /// # Errors
    /// No such queue pair, no memory, or `socket` cannot be duplicated. The rest comes with the event.
    pub fn attach_socket(&self, pair: usize, socket: RawFd, params: SocketParams) -> Result<u64, Error> {
        let memory = self.mapped()?;
        let socket = duplicate(socket)?;
        let umem_of = self.pumps.iter().find_map(|pump| attached(&pump.view));
        self.submit(pair, Command::Attach { socket, memory, umem_of, params })
    }

    /// Gives a queue pair a packet socket, bound to its interface already, for frames of up to `frame_max` bytes.
    ///
    /// # Errors
    /// No such queue pair, or `socket` cannot be duplicated. The rest comes with the event.
    pub fn attach_packet_socket(&self, pair: usize, socket: RawFd, frame_max: u32) -> Result<u64, Error> {
        let socket = duplicate(socket)?;
        self.submit(pair, Command::AttachPacket { socket, frame_max })
    }

    /// Closes a queue pair's socket, once its frames have left or a time limit is over. Its buffers go back to the guest
    /// when their virtqueue stops or the next socket is attached.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn detach_socket(&self, pair: usize) -> Result<u64, Error> {
        self.submit(pair, Command::Detach)
    }

    /// Whether a queue pair has a socket.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn socket_attached(&self, pair: usize) -> Result<bool, Error> {
        let view = &self.pump(pair)?.view;
        Ok(attached(view).is_some() || view.packet.lock().unwrap_or_else(PoisonError::into_inner).is_some())
    }

    /// Replaces the log of written pages; `None` ends it. Virtqueues that run keep what they have until
    /// [`set_vring_log`](Self::set_vring_log).
    ///
    /// # Errors
    /// It cannot be mapped; then the old one stays.
    pub fn map_log(&self, spec: Option<&LogSpec>) -> Result<(), Error> {
        let log = spec.map(DirtyLog::map).transpose()?;
        self.log().bits = log.map(Arc::new);
        Ok(())
    }

    /// Who is told when pages have been marked (SET_LOG_FD); for virtqueues as with [`map_log`](Self::map_log).
    pub fn set_log_notify(&self, notify: Option<EventFd>) {
        self.log().notify = notify.map(Arc::new);
    }

    /// Marks all of guest memory in the log.
    ///
    /// # Errors
    /// There is no log, or no memory.
    pub fn mark_all(&self) -> Result<(), Error> {
        let memory = self.mapped()?;
        let log = self.log().bits.clone();
        let log = log.ok_or_else(|| Error::Refused("the front-end has not sent a migration log".into()))?;
        log.mark_all(&memory);
        Ok(())
    }

    /// Logs these writes of a running virtqueue to the log as it is now; to none if there is none.
    ///
    /// # Errors
    /// No such vring, no memory, or a log without room for all of it.
    pub fn set_vring_log(&self, index: usize, logged: Logged) -> Result<u64, Error> {
        let log = self.write_log(&*self.mapped()?, logged)?;
        self.submit(index / 2, Command::SetLog { tx: is_tx(index), log })
    }

    /// Starts a virtqueue, with these of its writes logged.
    ///
    /// # Errors
    /// No such vring, no memory, or a log without room for all of it. The rest comes with the event.
    pub fn start_vring(&self, index: usize, config: VringConfig, logged: Logged) -> Result<u64, Error> {
        let memory = self.mapped()?;
        let config = VringConfig { log: self.write_log(&memory, logged)?, ..config };
        self.submit(index / 2, Command::Start { tx: is_tx(index), memory, config: Box::new(config) })
    }

    /// Stops a virtqueue; the event's value is its base. EBUSY while a socket has buffers of it: detach that first.
    ///
    /// # Errors
    /// No such vring.
    pub fn stop_vring(&self, index: usize) -> Result<u64, Error> {
        self.submit(index / 2, Command::Stop { tx: is_tx(index) })
    }

    /// SET_VRING_ENABLE of a running virtqueue.
    ///
    /// # Errors
    /// No such vring.
    pub fn set_vring_enabled(&self, index: usize, enabled: bool) -> Result<u64, Error> {
        self.submit(index / 2, Command::Enable { tx: is_tx(index), enabled })
    }

    /// SET_VRING_CALL of a running virtqueue.
    ///
    /// # Errors
    /// No such vring.
    pub fn set_vring_call(&self, index: usize, fd: Option<EventFd>) -> Result<u64, Error> {
        self.submit(index / 2, Command::SetCall { tx: is_tx(index), fd })
    }

    /// SET_VRING_ERR of a running virtqueue.
    ///
    /// # Errors
    /// No such vring.
    pub fn set_vring_err(&self, index: usize, fd: Option<EventFd>) -> Result<u64, Error> {
        self.submit(index / 2, Command::SetErr { tx: is_tx(index), fd })
    }

    /// Sends one frame of ours.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn send_frame(&self, pair: usize, frame: Vec<u8>) -> Result<u64, Error> {
        self.submit(pair, Command::Inject { frame })
    }

    /// Figures of all queue pairs: towards the guest, and from it.
    pub fn counts(&self) -> (Counts, Counts) {
        let (mut rx, mut tx) = (Counts::default(), Counts::default());
        for pump in &self.pumps {
            rx.add(&pump.view.rx.snapshot());
            rx.add(&pump.view.kernel_drops());
            tx.add(&pump.view.tx.snapshot());
        }
        (rx, tx)
    }

    /// Stops the threads: every socket is closed and guest memory unmapped. Virtqueues that still run are left as a
    /// crash would leave them; stop them first. May be called twice.
    pub fn close(&self) {
        let threads: Vec<_> = self
            .pumps
            .iter()
            .filter_map(|pump| pump.thread.lock().unwrap_or_else(PoisonError::into_inner).take().map(|t| (pump, t)))
            .collect();
        for (pump, _) in &threads {
            pump.commands.push(0, Command::Quit);
        }
        for (_, thread) in threads {
            assert!(thread.join().is_ok(), "a pump thread does not panic");
        }
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).take();
        *self.log() = Log::default();
    }

    fn pump(&self, pair: usize) -> Result<&PumpHandle, Error> {
        let count = self.pumps.len();
        self.pumps
            .get(pair)
            .ok_or_else(|| Error::Refused(format!("there is no queue pair {pair}: this port has {count}")))
    }

    fn mapped(&self) -> Result<Arc<GuestMemory>, Error> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.clone().ok_or_else(|| Error::Refused("the front-end has not sent any guest memory".into()))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_log(&self, memory: &GuestMemory, logged: Logged) -> Result<Option<WriteLog>, Error> {
        let log = self.log();
        let Some(bits) = log.bits.clone().filter(|_| logged != Logged::default()) else { return Ok(None) };
        if !bits.covers(memory) {
            return Err(Error::Refused("the migration log has no room for all of guest memory".into()));
        }
        Ok(Some(WriteLog { log: bits, logged, notify: log.notify.clone() }))
    }

    fn submit(&self, pair: usize, command: Command) -> Result<u64, Error> {
        let pump = self.pump(pair)?;
        // Relaxed: only uniqueness matters.
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        pump.commands.push(token, command);
        Ok(token)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

fn start_pump(pair: usize, poll: PollMode, events: &Arc<EventQueue>) -> Result<PumpHandle, Error> {
    let commands = Arc::new(CommandQueue::new()?);
    let view = Arc::new(PumpView::default());
    let pump = Pump::new(pair, poll, Arc::clone(&commands), Arc::clone(events), Arc::clone(&view));
    let thread =
        std::thread::Builder::new().name(format!("pump-{pair}")).spawn(|| run_or_abort(pump)).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
            HostError::new(
                errno,
                format!("cannot start the thread of queue pair {pair}"),
                "raise the limit on processes",
            )
        })?;
    Ok(PumpHandle { commands, view, thread: Mutex::new(Some(thread)) })
}

/// A pump that panics is a bug of ours; its commands would never be answered. The process ends, and is started anew.
fn run_or_abort(pump: Pump) {
    let run = std::panic::AssertUnwindSafe(|| pump.run());
    if std::panic::catch_unwind(run).is_err() {
        std::process::abort();
    }
}

fn attached(view: &PumpView) -> Option<SharedFd> {
    view.socket.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn is_tx(index: usize) -> bool {
    index % 2 == 1
}

#[cfg(test)]
mod tests;
