//! The loop of one queue pair: commands, work, waiting.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::command::{Command, CommandQueue, Completion, Event, EventQueue};
use super::packet::PacketPump;
use super::rx::Rx;
use super::slab::Slab;
use super::source_lock::SourceLock;
use super::tx::{Tx, TxInFlight, is_passing};
use super::vring::{MacAddress, Vring, VringConfig};
use super::wait::{PollMode, Spin, sleep};
use crate::error::{BurstError, Error, HostError, QueueFault, UnknownAnswer};
use crate::guest_memory::GuestMemory;
use crate::packet::{PacketSocket, take_drops};
use crate::stats::{Counts, DropReason, Published};
use crate::xsk::{BindMode, FRAME_BYTES_MAX, SharedFd, SharedUmem, SocketParams, Umem, XskSocket, statistics};

/// A stopping tx queue waits this long for its frames to leave before their socket is closed.
const DRAIN_DEADLINE: Duration = Duration::from_millis(100);
/// While frames are being sent and nothing else happens, completions are looked for this often: no descriptor
/// announces them.
const COMPLETION_PERIOD: Duration = Duration::from_millis(1);
/// While the kernel refuses to send (interface down), it is asked again this often.
const REFUSED_PERIOD: Duration = Duration::from_millis(100);

/// What the guest sends waits for so long while there is no socket; then it is lost. It would come too late to be of use,
/// and a Linux guest complains of a queue that stands still for 5 s.
const UNSENT_PATIENCE: Duration = Duration::from_secs(1);

/// QEMU kicks each queue once when it starts it; a driver, when it has put something there.
const KICKS_TO_SUSPECT: u32 = 2;

/// What other threads may look at.
#[derive(Debug, Default)]
pub(crate) struct PumpView {
    pub rx: Published,
    pub tx: Published,
    /// The attached AF_XDP socket, if any, and its UMEM.
    pub socket: Mutex<Option<SharedUmem>>,
    /// The attached packet socket, if any.
    pub packet: Mutex<Option<SharedFd>>,
    /// Kernel drops of sockets that are closed by now.
    pub past_kernel_drops: Mutex<Counts>,
    /// The address that the guest sends from, in the lower six bytes; 0 as long as it has sent nothing.
    guest_address: AtomicU64,
}

impl PumpView {
    /// Frames towards the guest that the kernel dropped, in this socket's life and in earlier ones.
    pub fn kernel_drops(&self) -> Counts {
        let mut drops = {
            let mut past = self.past_kernel_drops.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(fd) = self.packet.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                past.dropped[DropReason::RingFull as usize] += take_drops(fd);
            }
            *past
        };
        if let Some(umem) = self.shared_umem() {
            drops.add(&kernel_drops(&umem));
        }
        drops
    }

    /// The address that the guest sends from, once it has sent something.
    pub fn guest_address(&self) -> Option<MacAddress> {
        // Relaxed: a value of its own.
        let [_, _, address @ ..] = self.guest_address.load(Ordering::Relaxed).to_be_bytes();
        (address != MacAddress::default()).then_some(address)
    }

    fn set_guest_address(&self, address: MacAddress) {
        let [a, b, c, d, e, f] = address;
        // Relaxed: a value of its own.
        self.guest_address.store(u64::from_be_bytes([0, 0, a, b, c, d, e, f]), Ordering::Relaxed);
    }

    /// The attached socket's UMEM, if there is one.
    pub fn shared_umem(&self) -> Option<SharedUmem> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn kernel_drops(umem: &SharedUmem) -> Counts {
    let stats = statistics(umem);
    let mut drops = Counts::default();
    drops.dropped[DropReason::NoBuffer as usize] = stats.fill_empty;
    drops.dropped[DropReason::Oversize as usize] = stats.oversize;
    drops.dropped[DropReason::RingFull as usize] = stats.rx_ring_full;
    drops
}

/// One queue pair. Lives on its own thread; owns all that is touched per frame.
pub(crate) struct Pump {
    pair: usize,
    commands: Arc<CommandQueue>,
    events: Arc<EventQueue>,
    view: Arc<PumpView>,
    lock: SourceLock,
    spin: Spin,
    xsk: Option<XskSocket>,
    /// The other way to the interface; never both.
    packet: Option<PacketPump>,
    /// The UMEM of `xsk`.
    memory: Option<Arc<GuestMemory>>,
    rx: Option<Rx>,
    tx: Option<Tx>,
    rx_slab: Slab,
    flight: TxInFlight,
    rx_counts: Counts,
    tx_counts: Counts,
    /// The sending error reported last, so that it is reported once.
    reported_errno: Option<i32>,
    /// How often each queue was kicked while all zero.
    kicks_while_empty: [u32; 2],
    drain_deadline: Duration,
    /// Since when frames of the guest have no socket to leave by.
    unsent_since: Option<Instant>,
    unsent_patience: Duration,
}

impl Pump {
    pub fn new(
        pair: usize,
        poll: PollMode,
        lock: SourceLock,
        commands: Arc<CommandQueue>,
        events: Arc<EventQueue>,
        view: Arc<PumpView>,
    ) -> Self {
        Self {
            pair,
            commands,
            events,
            view,
            lock,
            spin: Spin::new(poll),
            xsk: None,
            packet: None,
            memory: None,
            rx: None,
            tx: None,
            rx_slab: Slab::new(pair, 0),
            flight: TxInFlight::new(pair),
            rx_counts: Counts::default(),
            tx_counts: Counts::default(),
            reported_errno: None,
            kicks_while_empty: [0; 2],
            drain_deadline: DRAIN_DEADLINE,
            unsent_since: None,
            unsent_patience: UNSENT_PATIENCE,
        }
    }

    /// Runs until [`Command::Quit`].
    pub fn run(mut self) {
        loop {
            while let Some((token, command)) = self.commands.pop() {
                let quit = matches!(command, Command::Quit);
                let result = self.execute(command);
                self.publish();
                self.events.push(Event::Completed(Completion { token, result }));
                if quit {
                    return;
                }
            }
            if self.round() {
                continue;
            }
            if self.has_no_queue() || !self.spin.look_again() {
                self.wait();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// One burst each way, and what is told of it. Whether anything was moved.
    #[inline]
    fn round(&mut self) -> bool {
        if self.work() == 0 {
            return false;
        }
        self.spin.worked();
        self.publish();
        true
    }

    /// One burst each way. Returns how much was moved.
    #[inline]
    fn work(&mut self) -> u32 {
        let moved = self.work_frames();
        if self.has_socket() {
            self.unsent_since = None;
            return moved;
        }
        moved + self.discard_unsent()
    }

    #[inline]
    fn work_frames(&mut self) -> u32 {
        let Some(xsk) = &mut self.xsk else { return self.work_packets() };
        let mut moved = 0;
        if let Some(rx) = self.rx.as_mut().filter(|rx| rx.vring.runs()) {
            match rx.burst(xsk, &mut self.rx_slab, &mut self.rx_counts) {
                Ok(count) => moved += count,
                Err(error) => self.burst_failed(0, error),
            }
        }
        let Some(xsk) = &mut self.xsk else { return moved };
        if let Some(tx) = &mut self.tx {
            match tx.burst(xsk, &mut self.flight, &mut self.tx_counts) {
                Ok(count) => moved += count,
                Err(error) => self.burst_failed(1, error),
            }
        } else if !self.flight.is_empty() {
            match self.flight.reap(xsk, |_| debug_assert!(false, "a stopped queue has no heads in flight")) {
                Ok(count) => moved += count,
                Err(unknown) => self.distrust(1, unknown),
            }
        }
        self.report_refusal();
        moved
    }

    /// [`work`](Self::work) over a packet socket.
    fn work_packets(&mut self) -> u32 {
        let Some(packet) = &mut self.packet else { return 0 };
        let mut moved = 0;
        let mut faults = [None; 2];
        if let Some(rx) = self.rx.as_mut().filter(|rx| rx.vring.runs()) {
            match packet.receive(&mut rx.vring, &mut self.rx_counts) {
                Ok(count) => moved += count,
                Err(fault) => faults[0] = Some(fault),
            }
        }
        if let Some(tx) = self.tx.as_mut().filter(|tx| tx.vring.runs()) {
            match packet.transmit(&mut tx.vring, &mut self.tx_counts) {
                Ok(count) => moved += count,
                Err(fault) => faults[1] = Some(fault),
            }
            tx.wakeup_errno = packet.send_errno.filter(|errno| !is_passing(*errno));
        }
        for (index, fault) in faults.into_iter().enumerate() {
            if let Some(fault) = fault {
                self.fault(index, fault);
            }
        }
        self.report_refusal();
        moved
    }

    /// Drops what the guest has waited too long with. Returns the number of heads used. Not before a frame that is held is
    /// given up ([`reclaim`](Self::reclaim)): it goes back to the avail ring as the one that was taken last.
    #[cold]
    fn discard_unsent(&mut self) -> u32 {
        let Some(tx) = self.tx.as_mut().filter(|tx| tx.vring.runs() && !tx.holds()) else { return 0 };
        let since = *self.unsent_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.unsent_patience {
            return 0;
        }
        tx.discard(&mut self.tx_counts).unwrap_or_else(|fault| {
            self.fault(1, fault);
            0
        })
    }

    /// Nothing can come but commands, and frames to drop: even a busy pump may sleep.
    fn has_no_queue(&self) -> bool {
        !self.has_socket() || (self.rx.is_none() && self.tx.is_none())
    }

    #[inline]
    fn has_socket(&self) -> bool {
        self.xsk.is_some() || self.packet.is_some()
    }

    /// How long frames without a socket may still wait; `None` if there is one, or no tx queue that may drop them.
    fn patience_left(&self) -> Option<Duration> {
        let since = self.unsent_since.filter(|_| self.tx.as_ref().is_some_and(|tx| !tx.holds()))?;
        Some(self.unsent_patience.saturating_sub(since.elapsed()))
    }

    /// The socket, if what it receives can be delivered: a faulted queue leaves frames where they are.
    fn receiving_socket(&self) -> Option<&XskSocket> {
        self.xsk.as_ref().filter(|_| self.rx.as_ref().is_some_and(|rx| rx.vring.runs()))
    }

    /// As [`receiving_socket`](Self::receiving_socket), the other way; frames that wait for buffers wake nobody.
    fn receiving_packets(&self) -> Option<&PacketPump> {
        let runs = self.rx.as_ref().is_some_and(|rx| rx.vring.runs());
        self.packet.as_ref().filter(|packet| runs && !packet.starved)
    }

    /// Sleeps until there may be work: with kicks on, and after one more look.
    fn wait(&mut self) {
        let ready = self.arm(true);
        if !ready {
            let packet_fd = self.receiving_packets().map_or(-1, |packet| packet.socket.raw_fd());
            let xsk_fd = self.receiving_socket().map_or(packet_fd, XskSocket::raw_fd);
            let kick = |vring: Option<&Vring>| vring.map_or(-1, |v| v.kick.raw());
            let rx_kick = kick(self.rx.as_ref().map(|rx| &rx.vring));
            let tx_kick = kick(self.tx.as_ref().map(|tx| &tx.vring));
            let woken = sleep([self.commands.wake_fd(), xsk_fd, rx_kick, tx_kick], self.timeout());
            self.spin.slept();
            if woken[0] {
                self.commands.clear_wake();
            }
            self.kicked(woken[2], woken[3]);
        }
        self.arm(false);
    }

    /// How long to sleep at most: completions and recovered interfaces do not wake us.
    fn timeout(&self) -> Option<Duration> {
        let unsent = self.packet.as_ref().is_some_and(|packet| packet.send_errno.is_some());
        match &self.tx {
            _ if !self.has_socket() => self.patience_left().filter(|left| !left.is_zero()),
            Some(tx) if tx.wakeup_errno.is_some() => Some(REFUSED_PERIOD),
            Some(_) if unsent => Some(COMPLETION_PERIOD),
            _ if self.xsk.is_none() => None,
            _ if !self.flight.is_empty() => Some(COMPLETION_PERIOD),
            _ => None,
        }
    }

    /// Switches kicks on or off; whether there is work already.
    fn arm(&mut self, on: bool) -> bool {
        let mut ready = self.receiving_socket().is_some_and(|xsk| on && xsk.rx_peek() > 0);
        ready |= on && self.receiving_packets().is_some_and(|packet| packet.socket.has_frame());
        // Without a socket, buffers are nothing to stay awake for, nor frames that are to wait.
        let has_socket = self.has_socket();
        let useful = [has_socket, has_socket || self.patience_left().is_some_and(|left| left.is_zero())];
        let vrings = [self.rx.as_mut().map(|rx| &mut rx.vring), self.tx.as_mut().map(|tx| &mut tx.vring)];
        let mut faults = [None; 2];
        for ((vring, fault), useful) in vrings.into_iter().zip(&mut faults).zip(useful) {
            let Some(vring) = vring else { continue };
            if !on {
                vring.queue.disable_kicks();
                continue;
            }
            if !useful {
                continue;
            }
            match vring.arm() {
                Ok(more) => ready |= more,
                Err(broken) => *fault = Some(broken),
            }
        }
        for (index, fault) in faults.into_iter().enumerate() {
            if let Some(fault) = fault {
                self.fault(index, fault);
            }
        }
        ready
    }

    fn kicked(&mut self, rx: bool, tx: bool) {
        let vrings = [self.rx.as_ref().map(|rx| &rx.vring), self.tx.as_ref().map(|tx| &tx.vring)];
        for ((index, vring), kicked) in vrings.into_iter().enumerate().zip([rx, tx]) {
            let Some(vring) = vring.filter(|_| kicked) else { continue };
            vring.kick.clear();
            if self.kicks_while_empty[index] < KICKS_TO_SUSPECT && vring.queue.looks_unshared() {
                self.kicks_while_empty[index] += 1;
                if self.kicks_while_empty[index] == KICKS_TO_SUSPECT {
                    self.events.push(Event::KickedEmpty { vring: 2 * self.pair + index });
                }
            }
        }
    }

    #[cold]
    fn fault(&mut self, index: usize, fault: QueueFault) {
        let vring = match index {
            0 => self.rx.as_mut().map(|rx| &mut rx.vring),
            _ => self.tx.as_mut().map(|tx| &mut tx.vring),
        };
        if let Some(vring) = vring {
            vring.fault();
            self.events.push(Event::Fault { vring: 2 * self.pair + index, fault });
        }
    }

    #[cold]
    fn burst_failed(&mut self, index: usize, error: BurstError) {
        match error {
            BurstError::Fault(fault) => self.fault(index, fault),
            BurstError::Unknown(unknown) => self.distrust(index, unknown),
        }
    }

    /// Closes the socket at once: what the kernel says about its buffers cannot be believed any more. To the control plane
    /// it is attached until [`Command::Detach`], so that what it had stays taken until its queue was seen free. In
    /// zero-copy mode the virtqueues go on with the next socket; in copy mode there is no other mode to try, and they stop.
    #[cold]
    fn distrust(&mut self, index: usize, unknown: UnknownAnswer) {
        let Some(mode) = self.xsk.as_ref().map(XskSocket::mode) else { return };
        self.report_unknown(index, unknown, mode);
        if mode == BindMode::Copy {
            let vrings = [self.rx.as_mut().map(|rx| &mut rx.vring), self.tx.as_mut().map(|tx| &mut tx.vring)];
            vrings.into_iter().flatten().for_each(Vring::fault);
        }
        self.close_xsk();
    }

    fn report_unknown(&mut self, index: usize, unknown: UnknownAnswer, mode: BindMode) {
        let counts = if index == 0 { &mut self.rx_counts } else { &mut self.tx_counts };
        counts.dropped(DropReason::UnknownAnswer);
        let what = if index == 0 { "received into" } else { "sent from" };
        let attempted = format!(
            "queue pair {}: the kernel has {what} a buffer that was not given to it (UMEM address {:#x})",
            self.pair, unknown.0.0
        );
        let error = HostError::new(libc::EIO, attempted, "its socket was closed");
        self.events.push(Event::Distrusted { vring: 2 * self.pair + index, mode, error });
    }

    /// Tells once when the kernel stops sending for us, and once when it does again by forgetting.
    fn report_refusal(&mut self) {
        let errno = self.tx.as_ref().and_then(|tx| tx.wakeup_errno);
        if errno != self.reported_errno {
            self.reported_errno = errno;
            if let Some(errno) = errno {
                let error = HostError::new(
                    errno,
                    format!("cannot send from queue pair {}", self.pair),
                    "the interface is down, gone or was taken away; frames wait until it is back",
                );
                self.events.push(Event::Host { vring: 2 * self.pair + 1, error });
            }
        }
    }

    fn publish(&self) {
        self.view.rx.publish(&self.rx_counts);
        self.view.tx.publish(&self.tx_counts);
        if let Some(source) = self.tx.as_ref().and_then(|tx| tx.vring.source)
            && self.lock.allows(source)
        {
            self.view.set_guest_address(source);
        }
    }

    fn execute(&mut self, command: Command) -> Result<u64, Error> {
        match command {
            Command::Attach { socket, memory, umem, params } => self.attach(socket, memory, &umem, &params),
            Command::Reclaim => Ok(self.reclaim_of_closed()),
            Command::SetMemory { memory } => Ok(self.set_memory(&memory)),
            Command::AttachPacket { socket, frame_max } => self.attach_packets(socket, frame_max),
            // Virtqueues that were not stopped before the end are left as a crash would leave them.
            Command::Detach | Command::Quit => Ok(self.detach()),
            Command::Start { tx, memory, config } => self.start(tx, memory, *config),
            Command::Stop { tx } => self.stop(tx),
            Command::Enable { tx, enabled } => self.with_vring(tx, |vring| vring.enabled = enabled),
            Command::SetCall { tx, fd } => self.with_vring(tx, |vring| {
                vring.call = fd;
                // The driver may have missed a call that went to the old eventfd.
                if let Some(call) = &vring.call {
                    call.signal();
                }
            }),
            Command::SetErr { tx, fd } => self.with_vring(tx, |vring| vring.err = fd),
            Command::SetLog { tx, log } => self.with_vring(tx, |vring| vring.queue.set_log(log)),
            Command::Inject { frame } => self.inject(&frame),
        }
    }

    fn attach(
        &mut self,
        socket: std::os::fd::OwnedFd,
        memory: Arc<GuestMemory>,
        umem: &Umem,
        params: &SocketParams,
    ) -> Result<u64, Error> {
        self.refuse_second_socket()?;
        // In zero-copy mode this is also the proof that no NIC writes to the buffers of a socket before, if that was on the
        // same queue: the kernel binds nothing to a queue that another socket still has.
        let xsk = XskSocket::bind(socket, &memory, umem, params)?;
        self.reclaim();
        let mode = xsk.mode();
        self.flight.start(mode);
        *self.view.socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(xsk.shared_umem());
        self.xsk = Some(xsk);
        self.memory = Some(memory);
        Ok(u64::from(mode == BindMode::ZeroCopy))
    }

    fn attach_packets(&mut self, socket: std::os::fd::OwnedFd, frame_max: u32) -> Result<u64, Error> {
        self.refuse_second_socket()?;
        let socket = PacketSocket::open(socket, frame_max)?;
        self.reclaim();
        *self.view.packet.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket.shared_fd());
        self.packet = Some(PacketPump::new(socket, frame_max, self.lock.clone()));
        Ok(0)
    }

    /// Whether there is an AF_XDP socket, or one that was closed and whose queue may not be free yet.
    fn has_xsk(&self) -> bool {
        self.xsk.is_some() || self.view.shared_umem().is_some()
    }

    fn refuse_second_socket(&self) -> Result<(), Error> {
        if self.has_xsk() || self.packet.is_some() {
            return Err(Error::Refused(format!("queue pair {} has a socket already; detach it first", self.pair)));
        }
        Ok(())
    }

    /// Lets frames leave, then closes the socket. What it had stays taken until [`reclaim`](Self::reclaim).
    fn detach(&mut self) -> u64 {
        self.drain();
        self.close_xsk();
        self.view.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(packet) = self.packet.take() {
            // Takes the last drops in, while the socket can still tell.
            self.view.kernel_drops();
            self.view.packet.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(packet);
        }
        self.memory = None;
        0
    }

    /// Closes the AF_XDP socket; what it can tell of drops is kept.
    fn close_xsk(&mut self) {
        let drops = self.view.shared_umem().map(|umem| kernel_drops(&umem)).unwrap_or_default();
        // Unmaps the rings, then closes: after that the kernel writes no guest memory in copy mode.
        self.xsk = None;
        self.view.past_kernel_drops.lock().unwrap_or_else(PoisonError::into_inner).add(&drops);
    }

    /// Lets the virtqueues find buffers in more memory.
    fn set_memory(&mut self, memory: &Arc<GuestMemory>) -> u64 {
        if let Some(rx) = &mut self.rx {
            rx.vring.queue.set_memory(Arc::clone(memory));
        }
        if let Some(tx) = &mut self.tx {
            tx.vring.queue.set_memory(Arc::clone(memory));
        }
        if let Some(socket_memory) = &mut self.memory {
            *socket_memory = Arc::clone(memory);
        }
        0
    }

    fn reclaim_of_closed(&mut self) -> u64 {
        if self.xsk.is_none() {
            self.reclaim();
        }
        0
    }

    /// Gives back to the guest what a closed socket had.
    fn reclaim(&mut self) {
        debug_assert!(self.xsk.is_none(), "only a closed socket has let go of its buffers");
        match &mut self.rx {
            Some(rx) => rx.recall(&mut self.rx_slab),
            None => self.rx_slab.reset(),
        }
        if let Some(tx) = &mut self.tx {
            tx.withdraw(&mut self.flight);
        }
        let tx = &mut self.tx;
        self.flight.abandon(|head| {
            if let Some(tx) = tx {
                tx.vring.queue.push_used(head, 0);
            }
        });
        if let Some(tx) = &mut self.tx {
            tx.vring.flush();
        }
    }

    /// Waits, for a limited time, until the kernel has sent what it was given and all of a frame of which it has a part.
    fn drain(&mut self) {
        let (Some(xsk), deadline) = (&mut self.xsk, Instant::now() + self.drain_deadline) else { return };
        let mut unknown = None;
        while (!self.flight.is_empty() || self.tx.as_ref().is_some_and(Tx::holds)) && Instant::now() < deadline {
            if let Some(tx) = &mut self.tx {
                tx.finish(xsk, &mut self.flight, &mut self.tx_counts);
            }
            let refused = xsk.tx_pending() > 0 && xsk.tx_wakeup().is_err_and(|errno| errno != libc::EAGAIN);
            let tx = &mut self.tx;
            let reaped = self.flight.reap(xsk, |head| {
                if let Some(tx) = tx {
                    tx.vring.queue.push_used(head, 0);
                }
            });
            unknown = reaped.err();
            if unknown.is_some() || refused && reaped == Ok(0) {
                break;
            }
            std::thread::yield_now();
        }
        let mode = xsk.mode();
        if let Some(unknown) = unknown {
            // Not closed here: whoever drains closes the socket next, as long as something is in flight.
            self.report_unknown(1, unknown, mode);
        }
        if let Some(tx) = &mut self.tx {
            tx.vring.flush();
        }
    }

    fn start(&mut self, tx: bool, memory: Arc<GuestMemory>, config: VringConfig) -> Result<u64, Error> {
        let taken = if tx { self.tx.is_some() } else { self.rx.is_some() };
        if taken {
            return Err(Error::Refused(format!("vring {} runs already; stop it first", self.index(tx))));
        }
        let mut vring = Vring::new(memory, config)?;
        vring.queue.disable_kicks();
        let resumed = vring.resumed;
        // Whoever ran the ring before may have ended between showing used entries and saying so.
        if let Some(call) = &vring.call {
            call.signal();
        }
        self.kicks_while_empty[usize::from(tx)] = 0;
        if tx {
            self.unsent_since = None;
            self.view.set_guest_address(MacAddress::default());
            self.tx = Some(Tx::new(vring, self.lock.clone()));
        } else {
            self.rx = Some(Rx::new(vring));
        }
        // Who hears that the queue runs may count on its buffers being posted.
        self.work();
        Ok(resumed as u64)
    }

    fn stop(&mut self, tx: bool) -> Result<u64, Error> {
        let stopped = self.not_running(tx);
        if tx {
            self.tx.as_ref().ok_or(stopped)?;
            self.drain();
            self.let_go(tx, !self.flight.is_empty())?;
            let mut tx = self.tx.take();
            if let Some(tx) = &mut tx {
                tx.withdraw(&mut self.flight);
                tx.vring.give_back(&mut []);
            }
            Ok(tx.map_or(0, |mut tx| tx.vring.stopped()))
        } else {
            let rx = self.rx.as_mut().ok_or(stopped)?;
            let kernel_has_buffers = rx.kernel_has_buffers() || self.rx_slab.used() > 0;
            self.let_go(tx, kernel_has_buffers)?;
            if let Some(rx) = &mut self.rx {
                rx.recall(&mut self.rx_slab);
            }
            let rx = self.rx.take();
            Ok(rx.map_or(0, |mut rx| rx.vring.stopped()))
        }
    }

    /// Makes sure that no socket has buffers of a queue that stops: posted ones come back only by closing it
    /// (kernel-facts, section 3).
    fn let_go(&mut self, tx: bool, kernel_has_buffers: bool) -> Result<(), Error> {
        // A closed socket that was not believed may have had more than was known of it.
        let distrusted = self.xsk.is_none() && self.has_xsk();
        if !kernel_has_buffers && !distrusted {
            return Ok(());
        }
        if self.has_xsk() {
            let what = format!("cannot stop vring {}: the kernel has buffers of it", self.index(tx));
            return Err(HostError::new(libc::EBUSY, what, "detach its socket first").into());
        }
        self.reclaim();
        Ok(())
    }

    fn with_vring(&mut self, tx: bool, change: impl FnOnce(&mut Vring)) -> Result<u64, Error> {
        let stopped = self.not_running(tx);
        let vring =
            if tx { self.tx.as_mut().map(|tx| &mut tx.vring) } else { self.rx.as_mut().map(|rx| &mut rx.vring) };
        change(vring.ok_or(stopped)?);
        Ok(0)
    }

    fn inject(&mut self, frame: &[u8]) -> Result<u64, Error> {
        let fits = (14..=FRAME_BYTES_MAX as usize).contains(&frame.len());
        // It may be the front-end that says who announces itself.
        if let Some(ethernet) = frame.first_chunk()
            && let Err(reason) = self.lock.check(*ethernet)
        {
            self.tx_counts.dropped(reason);
            return Err(Error::Refused("cannot send a frame from an address that the guest may not have".into()));
        }
        if let Some(packet) = self.packet.as_mut().filter(|_| fits) {
            let refused = |errno| HostError::new(errno, "cannot send a frame", "bring the interface up");
            return packet.inject(frame).map(|()| 0).map_err(|errno| refused(errno).into());
        }
        let (Some(xsk), Some(memory), true) = (&mut self.xsk, &self.memory, fits) else {
            return Err(Error::Refused(format!("cannot send a frame of {} bytes: no socket or no frame", frame.len())));
        };
        if !self.flight.inject(xsk, memory, frame) {
            return Err(Error::Refused("cannot send: the tx ring is full; try again".into()));
        }
        if let Err(errno) = xsk.tx_wakeup()
            && errno != libc::EAGAIN
        {
            return Err(HostError::new(errno, "cannot send a frame", "bring the interface up").into());
        }
        Ok(0)
    }

    fn not_running(&self, tx: bool) -> Error {
        Error::Refused(format!("vring {} does not run", self.index(tx)))
    }

    fn index(&self, tx: bool) -> usize {
        2 * self.pair + usize::from(tx)
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(feature = "test-utils")]
// For benches: what cannot be made ends them.
#[allow(clippy::unwrap_used)]
pub(crate) mod microbench;
#[cfg(test)]
mod tests;
