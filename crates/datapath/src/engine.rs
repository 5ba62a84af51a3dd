//! The data plane of one port, as the control plane sees it: a memory map, and one pump per queue pair.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, HostError};
use crate::fd::{EventFd, duplicate};
use crate::guest_memory::{DirtyLog, FileSpec, GuestMemory, RegionSpec, UmemAddr};
use crate::pump::{
    Command, CommandQueue, Completion, Event, EventQueue, MacAddress, PollMode, Pump, PumpView, SourceLock,
    VringConfig, slab_bytes,
};
use crate::stats::Counts;
use crate::virtqueue::{Logged, WriteLog};
use crate::xsk::{SocketParams, Umem, register_umem};

/// Most queue pairs of a port; VIRTIO_NET_F_MQ would allow 32768.
pub const QUEUE_PAIRS_MAX: usize = 64;

/// A socket whose UMEM is registered ahead of its bind.
struct Prepared {
    socket: OwnedFd,
    params: SocketParams,
    end: UmemAddr,
}

struct PumpHandle {
    commands: Arc<CommandQueue>,
    view: Arc<PumpView>,
    prepared: Arc<Mutex<Option<Prepared>>>,
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
    preparing: Mutex<Vec<JoinHandle<()>>>,
    next_token: AtomicU64,
}

impl Engine {
    /// Starts the pump threads; they sleep until there is work. Frames from the guest have sources that `lock` allows.
    ///
    /// # Errors
    /// More than [`QUEUE_PAIRS_MAX`] or no queue pairs; no eventfd or thread can be made.
    pub fn new(queue_pairs: usize, poll: PollMode, lock: &SourceLock) -> Result<Self, Error> {
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
            preparing: Mutex::default(),
            next_token: AtomicU64::new(1),
        };
        for pair in 0..queue_pairs {
            engine.pumps.push(start_pump(pair, poll, lock, &engine.events)?);
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
        let mut memory = lock(&self.memory);
        if memory.as_ref().is_some_and(GuestMemory::is_shared) {
            return Err(Error::Refused("cannot replace guest memory while a virtqueue or socket uses it".into()));
        }
        for pump in &self.pumps {
            lock(&pump.prepared).take();
        }
        memory.take();
        if !regions.is_empty() {
            *memory = Some(Arc::new(GuestMemory::map(regions, slab_bytes(self.pumps.len()))?));
        }
        Ok(())
    }

    /// Adds regions to the memory map while virtqueues run; the tokens are those of the pumps that get to know of them.
    /// Frames in the new regions are copied until their socket is one that was made after this. `None`, with nothing done,
    /// if everything has to be mapped anew instead.
    ///
    /// # Errors
    /// See [`GuestMemory::with_regions`]; then nothing has changed. No memory is mapped yet, or there is a migration log
    /// without room for the regions.
    pub fn add_memory(&self, regions: &[RegionSpec]) -> Result<Option<Vec<u64>>, Error> {
        if let Some(log) = &self.log().bits
            && !regions.iter().all(|spec| log.has_room(spec.guest_phys, spec.size_bytes))
        {
            return Err(no_room());
        }
        let mut memory = lock(&self.memory);
        let Some(more) = memory.as_ref().ok_or_else(no_memory)?.with_regions(regions)? else { return Ok(None) };
        let more = Arc::new(more);
        *memory = Some(Arc::clone(&more));
        let tokens =
            (0..self.pumps.len()).map(|pair| self.submit(pair, Command::SetMemory { memory: Arc::clone(&more) }));
        tokens.collect::<Result<_, _>>().map(Some)
    }

    /// Registers all of guest memory as the UMEM of a socket that is to take the place of a queue pair's present one, which
    /// goes on meanwhile: pinning takes long. [`attach_prepared`](Self::attach_prepared) binds it.
    ///
    /// # Errors
    /// No such queue pair, no memory, or `socket` cannot be duplicated. The rest comes with the event.
    pub fn prepare_socket(&self, pair: usize, socket: RawFd, params: SocketParams) -> Result<u64, Error> {
        let (memory, socket) = (self.mapped()?, duplicate(socket)?);
        let (prepared, events) = (Arc::clone(&self.pump(pair)?.prepared), Arc::clone(&self.events));
        let token = self.new_token();
        let prepare = move || {
            let result = register_umem(&socket, &memory, params.layout);
            let result = result.map(|()| *lock(&prepared) = Some(Prepared { socket, params, end: memory.end() }));
            drop(memory); // who hears of the end may replace it
            events.push(Event::Completed(Completion { token, result: result.map(|()| 0).map_err(Error::from) }));
        };
        let mut preparing = lock(&self.preparing);
        preparing.retain(|thread| !thread.is_finished());
        preparing.push(spawn(format!("umem-{pair}"), prepare)?);
        Ok(token)
    }

    /// Closes a socket that was prepared, if there is one.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn discard_prepared(&self, pair: usize) -> Result<(), Error> {
        lock(&self.pump(pair)?.prepared).take();
        Ok(())
    }

    /// Binds the socket that was prepared for a queue pair.
    ///
    /// # Errors
    /// No such queue pair, no memory, or none was prepared. The rest comes with the event.
    pub fn attach_prepared(&self, pair: usize) -> Result<u64, Error> {
        let memory = self.mapped()?;
        let prepared = lock(&self.pump(pair)?.prepared).take();
        let Prepared { socket, params, end } =
            prepared.ok_or_else(|| Error::Refused(format!("no socket was prepared for queue pair {pair}")))?;
        self.submit(pair, Command::Attach { socket, memory, umem: Umem::Registered { end }, params })
    }

    /// Binds a socket to a queue pair. It shares the UMEM of another one, that with most of guest memory, or registers its
    /// own if it is the first.
    ///
    /// # Errors
    /// No such queue pair, no memory, or `socket` cannot be duplicated. The rest comes with the event.
    pub fn attach_socket(&self, pair: usize, socket: RawFd, params: SocketParams) -> Result<u64, Error> {
        let memory = self.mapped()?;
        let socket = duplicate(socket)?;
        let umems = self.pumps.iter().filter_map(|pump| pump.view.shared_umem());
        let largest = umems.filter(|umem| umem.serves(&params)).max_by_key(|umem| umem.end);
        let umem = largest.map_or(Umem::New, Umem::Of);
        self.submit(pair, Command::Attach { socket, memory, umem, params })
    }

    /// Whether the UMEM of a queue pair's socket lacks memory that was added after it was registered.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn socket_lacks_memory(&self, pair: usize) -> Result<bool, Error> {
        let umem = self.pump(pair)?.view.shared_umem();
        let memory = lock(&self.memory);
        Ok(umem.zip(memory.as_ref()).is_some_and(|(umem, memory)| umem.end < memory.end()))
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

    /// Gives the guest back what a queue pair's closed socket had of it. In zero-copy mode no NIC may write to it any more:
    /// that the hardware queue is free has to be seen first.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn reclaim(&self, pair: usize) -> Result<u64, Error> {
        self.submit(pair, Command::Reclaim)
    }

    /// The address that the guest sends from on a queue pair, once it has sent something.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn guest_address(&self, pair: usize) -> Result<Option<MacAddress>, Error> {
        Ok(self.pump(pair)?.view.guest_address())
    }

    /// Whether a queue pair has a socket.
    ///
    /// # Errors
    /// No such queue pair.
    pub fn socket_attached(&self, pair: usize) -> Result<bool, Error> {
        let view = &self.pump(pair)?.view;
        Ok(view.shared_umem().is_some() || lock(&view.packet).is_some())
    }

    /// Replaces the log of written pages; `None` ends it. Virtqueues that run keep what they have until
    /// [`set_vring_log`](Self::set_vring_log).
    ///
    /// # Errors
    /// It cannot be mapped; then the old one stays.
    pub fn map_log(&self, spec: Option<&FileSpec>) -> Result<(), Error> {
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
        let threads: Vec<_> =
            self.pumps.iter().filter_map(|pump| lock(&pump.thread).take().map(|t| (pump, t))).collect();
        for (pump, _) in &threads {
            pump.commands.push(0, Command::Quit);
        }
        for (_, thread) in threads {
            assert!(thread.join().is_ok(), "a pump thread does not panic");
        }
        for thread in lock(&self.preparing).drain(..) {
            assert!(thread.join().is_ok(), "a thread that registers memory does not panic");
        }
        for pump in &self.pumps {
            lock(&pump.prepared).take();
        }
        lock(&self.memory).take();
        *self.log() = Log::default();
    }

    fn pump(&self, pair: usize) -> Result<&PumpHandle, Error> {
        let count = self.pumps.len();
        self.pumps
            .get(pair)
            .ok_or_else(|| Error::Refused(format!("there is no queue pair {pair}: this port has {count}")))
    }

    fn mapped(&self) -> Result<Arc<GuestMemory>, Error> {
        lock(&self.memory).clone().ok_or_else(no_memory)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_log(&self, memory: &GuestMemory, logged: Logged) -> Result<Option<WriteLog>, Error> {
        let log = self.log();
        let Some(bits) = log.bits.clone().filter(|_| logged != Logged::default()) else { return Ok(None) };
        if !bits.covers(memory) {
            return Err(no_room());
        }
        Ok(Some(WriteLog { log: bits, logged, notify: log.notify.clone() }))
    }

    fn submit(&self, pair: usize, command: Command) -> Result<u64, Error> {
        let pump = self.pump(pair)?;
        let token = self.new_token();
        pump.commands.push(token, command);
        Ok(token)
    }

    fn new_token(&self) -> u64 {
        // Relaxed: only uniqueness matters.
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

fn start_pump(pair: usize, poll: PollMode, lock: &SourceLock, events: &Arc<EventQueue>) -> Result<PumpHandle, Error> {
    let commands = Arc::new(CommandQueue::new()?);
    let view = Arc::new(PumpView::default());
    let pump = Pump::new(pair, poll, lock.clone(), Arc::clone(&commands), Arc::clone(events), Arc::clone(&view));
    let thread = spawn(format!("pump-{pair}"), || pump.run())?;
    Ok(PumpHandle { commands, view, prepared: Arc::default(), thread: Mutex::new(Some(thread)) })
}

/// Runs `work` on a thread. A panic is a bug of ours; what was asked for would never be answered. The process ends, and is
/// started anew.
fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HostError> {
    let attempted = format!("cannot start thread {name}");
    let run_or_abort = || {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            std::process::abort();
        }
    };
    std::thread::Builder::new().name(name).spawn(run_or_abort).map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
        HostError::new(errno, attempted, "raise the limit on processes")
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_room() -> Error {
    Error::Refused("the migration log has no room for all of guest memory".into())
}

fn no_memory() -> Error {
    Error::Refused("the front-end has not sent any guest memory".into())
}

fn is_tx(index: usize) -> bool {
    index % 2 == 1
}

#[cfg(test)]
mod tests;
