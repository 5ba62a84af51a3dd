//! Patterned frames through AF_PACKET: sent from one thread, received and checked on another, every one accounted for.
//!
//! The kernel's own losses are counted too (PACKET_STATISTICS), so that a missing frame can be laid at the right door.
//! A veth whose other end cannot keep up drops silently: send at a rate, or in portions whose arrival is awaited.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::worker::{Pace, Signals, Worker};
use crate::error::{Error, Result, check};
use crate::eventfd::wait_readable;
use crate::pattern::{CheckCounts, Checker, ETHERTYPE, Stream};

const BATCH: usize = 64;
const FRAME_MAX_BYTES: usize = 16_384;
const RECEIVE_BUFFER_BYTES: libc::c_int = 256 << 20;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// How a wire listens.
#[derive(Clone, Copy, Debug)]
pub struct PacketWireConfig {
    /// The interface, in the calling thread's network namespace.
    pub ifindex: u32,
    /// Receive frames of every ethertype, not only of patterned ones.
    pub all_ethertypes: bool,
    /// Keep copies of this many of the first frames received.
    pub capture_frames: usize,
}

/// What to send.
#[derive(Clone, Debug)]
pub struct SendJob {
    /// The frames.
    pub stream: Stream,
    /// How many; sequences go on where the last job ended.
    pub count: u64,
    /// Start over at this sequence instead.
    pub first_sequence: Option<u32>,
    /// At most this many a second.
    pub rate_frames_per_s: Option<f64>,
}

/// What a wire counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireCounters {
    /// Frames the kernel took for sending.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Times the kernel had no room for a frame, which was then sent again.
    pub send_retries: u64,
    /// Frames received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the kernel dropped for want of room in the socket.
    pub kernel_drops: u64,
    /// What the pattern check found.
    pub check: CheckCounts,
}

#[derive(Debug, Default)]
struct Shared {
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    send_retries: AtomicU64,
    received: AtomicU64,
    received_bytes: AtomicU64,
    kernel_drops: Mutex<u64>,
    checker: Mutex<Checker>,
    captured: Mutex<VecDeque<Vec<u8>>>,
}

/// A checked wire on one interface. Receives from the moment it is made until it is dropped.
#[derive(Debug)]
pub struct PacketWire {
    socket: Arc<OwnedFd>,
    ifindex: u32,
    shared: Arc<Shared>,
    sender: Worker<SendJob>,
    receiver: Worker<()>,
}

impl PacketWire {
    /// Opens the wire and begins to receive.
    ///
    /// # Errors
    /// [`Error::System`]: EPERM without CAP_NET_RAW, ENODEV without such an interface.
    pub fn new(config: PacketWireConfig) -> Result<Self> {
        let protocol = if config.all_ethertypes { libc::ETH_P_ALL as u16 } else { ETHERTYPE };
        let socket = Arc::new(open_socket(config.ifindex, protocol)?);
        prepare_receiving(&socket)?;
        let shared = Arc::new(Shared::default());
        // Protocol 0: a socket that only sends.
        let mut sending = Sender {
            socket: open_socket(config.ifindex, 0)?,
            buffers: Batch::new(),
            sequence: 0,
            shared: Arc::clone(&shared),
        };
        let mut receiving = Receiver {
            socket: Arc::clone(&socket),
            buffers: Batch::new(),
            capture_left: config.capture_frames,
            shared: Arc::clone(&shared),
        };
        let wire = Self {
            sender: Worker::spawn("wire-sender", move |job, signals: &Signals| sending.run(&job, signals))?,
            receiver: Worker::spawn("wire-receiver", move |(), signals: &Signals| receiving.run(signals))?,
            socket,
            ifindex: config.ifindex,
            shared,
        };
        wire.receiver.start(())?;
        Ok(wire)
    }

    /// Starts sending.
    ///
    /// # Errors
    /// [`Error::Config`] if it is sending already, or frames have impossible sizes.
    pub fn start_sending(&self, job: SendJob) -> Result<()> {
        if !job.stream.is_valid() || job.stream.frame_max_bytes() > FRAME_MAX_BYTES {
            return Err(Error::config(format!("pattern frames have 22 to {FRAME_MAX_BYTES} bytes")));
        }
        self.sender.start(job)
    }

    /// Ends sending early; [`is_sending`](Self::is_sending) says when it has ended.
    pub fn stop_sending(&self) {
        self.sender.stop();
    }

    /// Whether it is sending.
    ///
    /// # Errors
    /// What sending or receiving failed with, once.
    pub fn is_sending(&self) -> Result<bool> {
        let is_sending = self.sender.is_active();
        self.sender.check()?;
        self.receiver.check()?;
        Ok(is_sending)
    }

    /// Sends one frame as it is.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel refuses it.
    pub fn send_frame(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: `frame` is readable for its length; the socket is bound.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        check(sent, || format!("send {} bytes to interface {}", frame.len(), self.ifindex))?;
        add(&self.shared.sent, 1);
        add(&self.shared.sent_bytes, frame.len() as u64);
        Ok(())
    }

    /// All counts so far.
    ///
    /// # Errors
    /// What receiving failed with; [`Error::System`] if the kernel does not tell its drops.
    pub fn counters(&self) -> Result<WireCounters> {
        self.receiver.check()?;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(WireCounters {
            sent: load(&self.shared.sent),
            sent_bytes: load(&self.shared.sent_bytes),
            send_retries: load(&self.shared.send_retries),
            kernel_drops: self.kernel_drops()?,
            received: load(&self.shared.received),
            received_bytes: load(&self.shared.received_bytes),
            check: lock(&self.shared.checker).counts(),
        })
    }

    /// Forgets which sequences have been seen, and the check's counts.
    pub fn reset_check(&self) {
        *lock(&self.shared.checker) = Checker::default();
    }

    /// Takes the frames captured so far.
    #[must_use]
    pub fn take_captured(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *lock(&self.shared.captured)).into()
    }

    /// Reading PACKET_STATISTICS sets it to zero, so it is added up here.
    fn kernel_drops(&self) -> Result<u64> {
        let mut total = lock(&self.shared.kernel_drops);
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = std::mem::size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: `statistics` has room for `length` bytes.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        check(result, || "read PACKET_STATISTICS".to_string())?;
        *total += u64::from(statistics.tp_drops);
        Ok(*total)
    }
}

struct Sender {
    socket: OwnedFd,
    buffers: Batch,
    sequence: u32,
    shared: Arc<Shared>,
}

impl Sender {
    fn run(&mut self, job: &SendJob, signals: &Signals) -> Result<()> {
        let pace = Pace::new(job.rate_frames_per_s)?;
        self.sequence = job.first_sequence.unwrap_or(self.sequence);
        let mut sent = 0;
        while sent < job.count && !signals.must_stop() {
            let burst = pace.wait(sent, (job.count - sent).min(BATCH as u64), signals)?;
            self.send_burst(&job.stream, burst as usize, signals)?;
            sent += burst;
        }
        Ok(())
    }

    fn send_burst(&mut self, stream: &Stream, burst: usize, signals: &Signals) -> Result<()> {
        let mut bytes = 0;
        for index in 0..burst {
            let length = stream.write(self.sequence, self.buffers.frame_mut(index));
            self.buffers.set_length(index, length);
            self.sequence = self.sequence.wrapping_add(1);
            bytes += length as u64;
        }
        let mut done = 0;
        while done < burst {
            match self.buffers.send(&self.socket, done, burst) {
                Ok(count) => done += count,
                Err(Error::System { errno: libc::ENOBUFS | libc::EAGAIN, .. }) => {
                    add(&self.shared.send_retries, 1);
                    signals.sleep(Duration::from_micros(50))?;
                }
                Err(error) => return Err(error),
            }
        }
        add(&self.shared.sent, burst as u64);
        add(&self.shared.sent_bytes, bytes);
        Ok(())
    }
}

struct Receiver {
    socket: Arc<OwnedFd>,
    buffers: Batch,
    capture_left: usize,
    shared: Arc<Shared>,
}

impl Receiver {
    fn run(&mut self, signals: &Signals) -> Result<()> {
        while !signals.must_stop() {
            let count = match self.buffers.receive(&self.socket) {
                Err(Error::System { errno: libc::EAGAIN, .. }) => {
                    wait_readable(&[self.socket.as_fd(), signals.wake().as_fd()], None)?;
                    continue;
                }
                // The interface went down: whether it comes back is not the wire's business.
                Err(Error::System { errno: libc::ENETDOWN, .. }) => continue,
                other => other?,
            };
            let mut bytes = 0;
            let mut checker = lock(&self.shared.checker);
            for index in 0..count {
                let frame = self.buffers.received(index);
                bytes += frame.len() as u64;
                checker.check(frame);
                if self.capture_left > 0 {
                    self.capture_left -= 1;
                    lock(&self.shared.captured).push_back(frame.to_vec());
                }
            }
            drop(checker);
            add(&self.shared.received_bytes, bytes);
            add(&self.shared.received, count as u64);
        }
        Ok(())
    }
}

/// Buffers for sendmmsg(2) and recvmmsg(2), made once.
struct Batch {
    frames: Vec<u8>,
    pieces: Vec<libc::iovec>,
    messages: Vec<libc::mmsghdr>,
}

// SAFETY: the pointers in `pieces` and `messages` lead into this batch's own vectors, which move with it (their heap
// blocks stay where they are).
unsafe impl Send for Batch {}

impl Batch {
    fn new() -> Self {
        let mut frames = vec![0u8; BATCH * FRAME_MAX_BYTES];
        let mut pieces: Vec<_> = frames
            .chunks_exact_mut(FRAME_MAX_BYTES)
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: FRAME_MAX_BYTES })
            .collect();
        let message = |piece: &mut libc::iovec| {
            // SAFETY: all zeros is a valid message header: no name, no control data.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iov = piece;
            message.msg_hdr.msg_iovlen = 1;
            message
        };
        let messages = pieces.iter_mut().map(message).collect();
        Self { frames, pieces, messages }
    }

    fn frame_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self.frames[index * FRAME_MAX_BYTES..(index + 1) * FRAME_MAX_BYTES]
    }

    fn set_length(&mut self, index: usize, length: usize) {
        self.pieces[index].iov_len = length;
    }

    /// The frame received at `index`. One that was too long is cut off, and will not pass the check.
    fn received(&self, index: usize) -> &[u8] {
        let length = self.messages[index].msg_len as usize;
        &self.frames[index * FRAME_MAX_BYTES..][..length.min(FRAME_MAX_BYTES)]
    }

    fn send(&mut self, socket: &OwnedFd, first: usize, end: usize) -> Result<usize> {
        let messages = &mut self.messages[first..end];
        // SAFETY: every message leads to one piece, and that to a frame of its length, all owned by `self`.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0) };
        Ok(check(sent, || "send frames through AF_PACKET".to_string())? as usize)
    }

    fn receive(&mut self, socket: &OwnedFd) -> Result<usize> {
        let messages = self.messages.as_mut_ptr();
        // SAFETY: as in `send`; pieces of a receiving batch keep their full length.
        let count = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), messages, BATCH as u32, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        Ok(check(count, || "receive frames through AF_PACKET".to_string())? as usize)
    }
}

fn open_socket(ifindex: u32, protocol: u16) -> Result<OwnedFd> {
    // Protocol 0 until bound, so that nothing of other interfaces is received.
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    check(fd, || "open an AF_PACKET socket".to_string())?;
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = ifindex.cast_signed();
    let length = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is readable for `length` bytes.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), length) };
    check(bound, || format!("bind an AF_PACKET socket to interface {ifindex}"))?;
    Ok(socket)
}

/// Room for bursts, and no echo of what is sent here.
fn prepare_receiving(socket: &OwnedFd) -> Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES, "SO_RCVBUFFORCE")?;
    set_option(socket, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1, "PACKET_IGNORE_OUTGOING")
}

fn set_option(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int, name: &str) -> Result<()> {
    let length = std::mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: `value` is readable for `length` bytes.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    check(result, || format!("set {name}")).map(|_| ())
}

fn add(counter: &AtomicU64, value: u64) {
    // Relaxed: counters stand alone; each has one writer, but for `send_frame` beside the sender.
    counter.fetch_add(value, Ordering::Relaxed);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
