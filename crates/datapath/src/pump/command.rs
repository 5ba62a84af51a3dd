//! What the control plane tells a pump thread, and what it hears back.

use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::vring::VringConfig;
use crate::error::{Error, HostError, QueueFault};
use crate::fd::EventFd;
use crate::guest_memory::GuestMemory;
use crate::virtqueue::WriteLog;
use crate::xsk::{BindMode, SocketParams, Umem};

/// One step for a pump. `tx` tells which virtqueue of the pair is meant: rx or tx.
#[derive(Debug)]
pub enum Command {
    /// Bind a socket; value 1 for zero-copy, 0 for copy.
    Attach {
        /// The socket, unbound.
        socket: OwnedFd,
        /// The memory that becomes the UMEM, or of which the UMEM is a part.
        memory: Arc<GuestMemory>,
        /// The UMEM.
        umem: Umem,
        /// What to bind to.
        params: SocketParams,
    },
    /// Use a packet socket that is bound already; value 0.
    AttachPacket {
        /// The socket.
        socket: OwnedFd,
        /// Longest frame, in bytes.
        frame_max: u32,
    },
    /// Let frames leave and close the socket. Its buffers stay ours until a virtqueue stops or a socket is attached:
    /// in zero-copy mode the NIC may still write to them, until its queue is seen free.
    Detach,
    /// Give the guest back what the closed socket had: neither kernel nor NIC uses it any more. Nothing is done under a
    /// socket.
    Reclaim,
    /// Buffers may lie in more memory from now on, in the arena of before.
    SetMemory {
        /// All of it.
        memory: Arc<GuestMemory>,
    },
    /// Run a virtqueue.
    Start {
        /// Which.
        tx: bool,
        /// The memory that its rings live in.
        memory: Arc<GuestMemory>,
        /// How.
        config: Box<VringConfig>,
    },
    /// Stop a virtqueue; value: its base. Refused with EBUSY while a socket has buffers of it.
    Stop {
        /// Which.
        tx: bool,
    },
    /// SET_VRING_ENABLE.
    Enable {
        /// Which.
        tx: bool,
        /// Frames flow.
        enabled: bool,
    },
    /// SET_VRING_CALL.
    SetCall {
        /// Which.
        tx: bool,
        /// The new eventfd.
        fd: Option<EventFd>,
    },
    /// SET_VRING_ERR.
    SetErr {
        /// Which.
        tx: bool,
        /// The new eventfd.
        fd: Option<EventFd>,
    },
    /// Log writes of a virtqueue from the next burst on, or no longer.
    SetLog {
        /// Which.
        tx: bool,
        /// Where, and which writes.
        log: Option<WriteLog>,
    },
    /// Send a frame of ours.
    Inject {
        /// The frame, without FCS.
        frame: Vec<u8>,
    },
    /// Close the socket and end the thread.
    Quit,
}

/// How a command ended.
#[derive(Debug)]
pub struct Completion {
    /// The token that was given out for it.
    pub token: u64,
    /// Its value.
    pub result: Result<u64, Error>,
}

/// Something for the control plane.
#[derive(Debug)]
pub enum Event {
    /// A command ended.
    Completed(Completion),
    /// The driver broke a virtqueue, which was stopped.
    Fault {
        /// vring index: 2 × pair, + 1 for tx.
        vring: usize,
        /// How.
        fault: QueueFault,
    },
    /// A virtqueue was kicked while its rings hold nothing but zeros: once per start.
    KickedEmpty {
        /// vring index.
        vring: usize,
    },
    /// The socket was closed, for the kernel answered what it was not asked. The virtqueues stand still until there is
    /// another socket.
    Distrusted {
        /// vring index.
        vring: usize,
        /// The mode that it was in. In copy mode the virtqueues have stopped for good: there is no other to go on in.
        mode: BindMode,
        /// How.
        error: HostError,
    },
    /// The socket does not work any more.
    Host {
        /// vring index of the pair's tx queue.
        vring: usize,
        /// What failed.
        error: HostError,
    },
}

/// Commands for one pump, and the eventfd that wakes it.
#[derive(Debug)]
pub(crate) struct CommandQueue {
    queue: Mutex<VecDeque<(u64, Command)>>,
    /// Lets the busy loop see that there is something without a lock or a system call.
    pending: AtomicBool,
    wake: EventFd,
}

impl CommandQueue {
    pub fn new() -> Result<Self, HostError> {
        Ok(Self { queue: Mutex::default(), pending: AtomicBool::new(false), wake: EventFd::new()? })
    }

    pub fn wake_fd(&self) -> RawFd {
        self.wake.raw()
    }

    pub fn push(&self, token: u64, command: Command) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back((token, command));
        // Relaxed: only a hint; what it announces is ordered by the lock.
        self.pending.store(true, Ordering::Relaxed);
        drop(queue);
        self.wake.signal();
    }

    /// The next command. Costs one load while there is none.
    #[inline]
    pub fn pop(&self) -> Option<(u64, Command)> {
        // Relaxed: as in push(). Seen late, it is seen in a later round, or by the wake eventfd.
        if !self.pending.load(Ordering::Relaxed) {
            return None;
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let command = queue.pop_front();
        self.pending.store(!queue.is_empty(), Ordering::Relaxed);
        command
    }

    pub fn clear_wake(&self) {
        self.wake.clear();
    }
}

/// Events of all pumps of a port, and the eventfd that announces them.
#[derive(Debug)]
pub struct EventQueue {
    queue: Mutex<VecDeque<Event>>,
    ready: EventFd,
}

impl EventQueue {
    /// An empty queue.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new() -> Result<Self, HostError> {
        Ok(Self { queue: Mutex::default(), ready: EventFd::new()? })
    }

    /// Readable while there are events.
    pub fn ready_fd(&self) -> RawFd {
        self.ready.raw()
    }

    /// Adds an event.
    pub fn push(&self, event: Event) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        self.ready.signal();
    }

    /// Takes all events, and the announcement with them.
    pub fn drain(&self) -> Vec<Event> {
        self.ready.clear();
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

#[cfg(test)]
mod tests;
