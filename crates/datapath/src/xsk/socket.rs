//! One AF_XDP socket, bound to one hardware queue.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ring::{Consumer, Producer};
use super::{CHUNK_BYTES, DriverRules, RxDesc, UmemLayout};
use crate::error::{Error, HostError};
use crate::guest_memory::{GuestMemory, UmemAddr};

/// Entries of the fill and the rx ring: as many frames as can be in the kernel's hands.
pub const RX_RING_DESCS: u32 = 1024;
/// Entries of the rx ring of a driver that must not run out of buffers.
pub(super) const RX_RING_SMALL_DESCS: u32 = 64;
/// Entries of the tx ring.
pub const TX_RING_DESCS: u32 = 2048;
/// Entries of the completion ring: every tx descriptor in flight has room in it.
pub const COMPLETION_RING_DESCS: u32 = TX_RING_DESCS;
/// Descriptors that one send works on in copy mode: several bursts, so that a full one never needs a second call.
const TX_BUDGET_DESCS: u32 = 256;
/// Descriptors of one packet in copy mode. An skb has room for 17 fragments (MAX_SKB_FRAGS); where the kernel refers to
/// our pages instead of copying (virtio_net: IFF_TX_SKB_NO_LINEAR), a piece that crosses a page takes two, and a packet
/// with too many is dropped without its completions (net/xdp/xsk.c: xsk_build_skb_zerocopy).
const TX_PIECES_COPY_MODE: usize = 8;
/// A predecessor's queue is free, and its locked memory off the account, 28-58 ms after its close (kernel-facts,
/// section 8.3).
const BIND_DEADLINE: Duration = Duration::from_secs(2);
const BIND_RETRY: Duration = Duration::from_millis(2);

/// Who moves the bytes between the NIC and the UMEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindMode {
    /// The kernel copies (XDP_COPY): any driver.
    Copy,
    /// The NIC's DMA (XDP_ZEROCOPY): drivers that support it.
    ZeroCopy,
}

/// What to bind to, and how.
#[derive(Debug, Clone, Copy)]
pub struct SocketParams {
    /// Interface index, in the network namespace where the socket was made.
    pub ifindex: u32,
    /// Hardware queue, 0-based.
    pub queue_id: u32,
    /// Mode; never silently another.
    pub mode: BindMode,
    /// Layout of the UMEM.
    pub layout: UmemLayout,
    /// Longest frame. In copy mode it may be longer than those of the layout: it then comes and goes in several pieces.
    pub frame_max: u32,
    /// The driver's limits, for zero-copy mode; copy mode has its own.
    pub zero_copy_rules: Option<DriverRules>,
}

impl SocketParams {
    /// Whether frames may arrive in several pieces.
    fn is_multi_buffer(&self) -> bool {
        self.frame_max > self.layout.frame_max
    }
}

/// A socket's descriptor where other threads may look at it: statistics, and other sockets that share its UMEM.
/// `None` once closed.
pub type SharedFd = Arc<Mutex<Option<OwnedFd>>>;

/// A UMEM that another socket may share, if it is to be bound in the same way: it gets all of this with it.
#[derive(Debug, Clone)]
pub struct SharedUmem {
    /// A socket that has it.
    pub socket: SharedFd,
    /// Where the kernel writes in a chunk.
    pub layout: UmemLayout,
    /// Who moves the bytes.
    pub mode: BindMode,
    /// All guest memory below this address is in it.
    pub end: UmemAddr,
    /// Frames may arrive in several pieces, on all sockets that have it.
    pub multi_buffer: bool,
}

impl SharedUmem {
    /// Whether a socket with these parameters may have it. With another layout, frames would land before or behind the
    /// places that were kept for them, in other memory of the guest.
    pub fn serves(&self, params: &SocketParams) -> bool {
        (self.layout, self.mode, self.multi_buffer) == (params.layout, params.mode, params.is_multi_buffer())
    }
}

/// Where a socket's UMEM comes from.
#[derive(Debug)]
pub enum Umem {
    /// It is to be registered: all of guest memory.
    New,
    /// [`register_umem`] has registered it on this socket, when guest memory ended here.
    Registered {
        /// All guest memory below this address is in it.
        end: UmemAddr,
    },
    /// That of another socket.
    Of(SharedUmem),
}

/// XDP_STATISTICS: what the kernel dropped, since the socket was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames dropped for want of a fill entry.
    pub fill_empty: u64,
    /// Frames dropped as longer than the UMEM's frames.
    pub oversize: u64,
    /// Frames dropped as the rx ring was full.
    pub rx_ring_full: u64,
    /// Descriptors that the kernel refused; we submit none, so this stays 0.
    pub tx_invalid: u64,
}

/// A bound socket with its four rings. Dropping it unmaps the rings, then closes the descriptor: in that order, for a
/// mapped ring keeps the socket alive.
#[derive(Debug)]
pub struct XskSocket {
    pub(crate) layout: UmemLayout,
    pub(crate) rules: DriverRules,
    /// Guest memory from here on is not in the UMEM: it was added after that was registered.
    pub(crate) umem_end: UmemAddr,
    /// Longest frame that is delivered; in several pieces where it is longer than those of the layout.
    pub(crate) frame_max: u32,
    mode: BindMode,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
    raw_fd: RawFd,
    /// Last, so that it is dropped after the rings.
    fd: ClosingFd,
}

/// The four rings of a socket, mapped.
#[derive(Debug)]
pub(super) struct Rings {
    fill: Producer<u64>,
    completion: Consumer<u64>,
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
}

impl Rings {
    /// Maps the rings that `fd` has at the offsets that every AF_XDP socket has them at.
    pub fn map(fd: RawFd, offsets: &libc::xdp_mmap_offsets, rx_descs: u32) -> Result<Self, HostError> {
        Ok(Self {
            fill: Producer::map(fd, &offsets.fr, libc::XDP_UMEM_PGOFF_FILL_RING, RX_RING_DESCS)?,
            completion: Consumer::map(fd, &offsets.cr, libc::XDP_UMEM_PGOFF_COMPLETION_RING, COMPLETION_RING_DESCS)?,
            rx: Consumer::map(fd, &offsets.rx, libc::XDP_PGOFF_RX_RING as u64, rx_descs)?,
            tx: Producer::map(fd, &offsets.tx, libc::XDP_PGOFF_TX_RING as u64, TX_RING_DESCS)?,
        })
    }
}

/// Empties a [`SharedFd`] on drop.
#[derive(Debug)]
struct ClosingFd(SharedFd);

impl Drop for ClosingFd {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl XskSocket {
    /// Registers the UMEM if there is none yet; makes and maps the rings; binds.
    ///
    /// While the queue's last socket is being torn down, bind is tried again for a while.
    ///
    /// # Errors
    /// Each failing system call, with what to try.
    pub fn bind(fd: OwnedFd, memory: &GuestMemory, umem: &Umem, params: &SocketParams) -> Result<Self, Error> {
        let raw_fd = fd.as_raw_fd();
        let deadline = Instant::now() + BIND_DEADLINE;
        let umem_end = match umem {
            Umem::New => {
                until(deadline, libc::ENOBUFS, || register_umem(&fd, memory, params.layout).map_err(Error::from))?;
                memory.end()
            }
            Umem::Of(shared) if !shared.serves(params) => {
                return Err(Error::Refused(
                    "another socket's UMEM is of another layout or mode; make a new one".into(),
                ));
            }
            Umem::Registered { end } | Umem::Of(SharedUmem { end, .. }) => *end,
        };
        let rx_descs = params.zero_copy_rules.map_or(RX_RING_DESCS, |rules| rules.rx_ring_descs());
        for (option, descs) in [
            (libc::XDP_UMEM_FILL_RING, RX_RING_DESCS),
            (libc::XDP_UMEM_COMPLETION_RING, COMPLETION_RING_DESCS),
            (libc::XDP_RX_RING, rx_descs),
            (libc::XDP_TX_RING, TX_RING_DESCS),
        ] {
            set_option(raw_fd, option, &descs, "cannot make an AF_XDP ring", |_| "free some memory")?;
        }
        raise_tx_budget(raw_fd)?;
        let offsets: libc::xdp_mmap_offsets = get_option(raw_fd, libc::XDP_MMAP_OFFSETS)?;
        let rings = Rings::map(raw_fd, &offsets, rx_descs)?;
        until(deadline, libc::EBUSY, || bind_queue(raw_fd, umem, params))?;
        let mode = bound_mode(raw_fd)?;
        if mode != params.mode {
            return Err(Error::Refused(format!(
                "bound interface {} queue {} in {mode:?} mode instead of {:?}; ask for a mode that its driver has",
                params.ifindex, params.queue_id, params.mode
            )));
        }
        let rules = match (mode, params.zero_copy_rules) {
            (BindMode::Copy, _) => DriverRules {
                tx_frame_max: params.frame_max,
                ..DriverRules::copy_mode(params.layout.frame_max, copy_mode_pieces_max())
            },
            (BindMode::ZeroCopy, Some(rules)) => rules.within_a_chunk(),
            (BindMode::ZeroCopy, None) => {
                return Err(Error::Refused("zero-copy mode needs the driver's rules: guest memory is at stake".into()));
            }
        };
        Ok(Self { frame_max: params.frame_max, ..Self::over(rings, fd, mode, params.layout, rules, umem_end) })
    }

    /// A socket from its parts.
    pub(super) fn over(
        rings: Rings,
        fd: OwnedFd,
        mode: BindMode,
        layout: UmemLayout,
        rules: DriverRules,
        umem_end: UmemAddr,
    ) -> Self {
        let Rings { fill, completion, rx, tx } = rings;
        let raw_fd = fd.as_raw_fd();
        let fd = ClosingFd(Arc::new(Mutex::new(Some(fd))));
        Self { layout, rules, umem_end, frame_max: layout.frame_max, mode, fill, completion, rx, tx, raw_fd, fd }
    }

    /// Whether frames may arrive in several pieces.
    #[inline]
    pub(crate) fn is_multi_buffer(&self) -> bool {
        self.frame_max > self.layout.frame_max
    }

    /// How it was bound, as the kernel says (XDP_OPTIONS).
    pub fn mode(&self) -> BindMode {
        self.mode
    }

    /// The descriptor, to poll.
    pub fn raw_fd(&self) -> RawFd {
        self.raw_fd
    }

    /// The descriptor, for statistics, and the UMEM, for sockets that share it.
    pub fn shared_umem(&self) -> SharedUmem {
        SharedUmem {
            socket: Arc::clone(&self.fd.0),
            layout: self.layout,
            mode: self.mode,
            end: self.umem_end,
            multi_buffer: self.is_multi_buffer(),
        }
    }

    /// Room in the fill ring, at least `wanted` if there is that much.
    #[inline]
    pub fn fill_free(&mut self, wanted: u32) -> u32 {
        self.fill.free(wanted)
    }

    /// Writes a fill entry; [`fill_submit`](Self::fill_submit) shows it to the kernel.
    #[inline]
    pub fn fill_write(&mut self, addr: UmemAddr) {
        self.fill.write(addr.0);
    }

    /// Shows the written fill entries to the kernel.
    #[inline]
    pub fn fill_submit(&mut self) {
        self.fill.submit();
    }

    /// Number of received frames.
    #[inline]
    pub fn rx_peek(&self) -> u32 {
        self.rx.peek()
    }

    /// Reads the next rx descriptor.
    #[inline]
    pub fn rx_read(&mut self) -> RxDesc {
        self.rx.read().into()
    }

    /// Gives the read rx descriptors back.
    #[inline]
    pub fn rx_release(&mut self) {
        self.rx.release();
    }

    /// Room in the tx ring, at least `wanted` if there is that much.
    #[inline]
    pub fn tx_free(&mut self, wanted: u32) -> u32 {
        self.tx.free(wanted)
    }

    /// Writes a tx descriptor; `more` says that the packet goes on in the next one.
    #[inline]
    pub fn tx_write(&mut self, addr: UmemAddr, len: u32, more: bool) {
        self.tx.write(libc::xdp_desc { addr: addr.0, len, options: if more { libc::XDP_PKT_CONTD } else { 0 } });
    }

    /// Shows the written tx descriptors to the kernel.
    #[inline]
    pub fn tx_submit(&mut self) {
        self.tx.submit();
    }

    /// Tx descriptors that the kernel has not taken yet.
    #[inline]
    pub fn tx_pending(&mut self) -> u32 {
        self.tx.pending()
    }

    /// Number of completions.
    #[inline]
    pub fn completion_peek(&self) -> u32 {
        self.completion.peek()
    }

    /// Reads the next completion.
    #[inline]
    pub fn completion_read(&mut self) -> UmemAddr {
        UmemAddr(self.completion.read())
    }

    /// Gives the read completions back.
    #[inline]
    pub fn completion_release(&mut self) {
        self.completion.release();
    }

    /// Lets the kernel work on the tx ring, if it asked for that. `Err` is the errno of sendto: EAGAIN if work is left
    /// over (the budget of one call, or the send buffer), ENETDOWN and the like if the interface is gone.
    #[inline]
    pub fn tx_wakeup(&mut self) -> Result<(), i32> {
        if !self.tx.needs_wakeup() {
            return Ok(());
        }
        // SAFETY: a send without data or address; nothing of ours is read or written.
        let sent = unsafe { libc::sendto(self.raw_fd, std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
        if sent >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)) }
    }

    /// Lets the driver refill from the fill ring, if it asked for that (zero-copy mode only).
    #[inline]
    pub fn rx_wakeup(&self) {
        if self.fill.needs_wakeup() {
            let flags = libc::MSG_DONTWAIT;
            // SAFETY: a receive without a buffer; AF_XDP only wakes the driver.
            // Its result says nothing that the rings do not.
            let _woken = unsafe {
                libc::recvfrom(self.raw_fd, std::ptr::null_mut(), 0, flags, std::ptr::null_mut(), std::ptr::null_mut())
            };
        }
    }
}

/// Reads a socket's statistics; all zero once it is closed.
pub fn statistics(umem: &SharedUmem) -> Statistics {
    let guard = umem.socket.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(fd) = guard.as_ref() else { return Statistics::default() };
    let raw: Result<libc::xdp_statistics, _> = get_option(fd.as_raw_fd(), libc::XDP_STATISTICS);
    // A bound AF_XDP socket always answers; a kernel before 5.9 answers without the later fields, which stay 0.
    raw.map_or_else(
        |_| Statistics::default(),
        |raw| {
            // In copy mode rx_dropped counts both causes (net/xdp/xsk.c: __xsk_rcv); of frames in several pieces none is too
            // long, but fewer fill entries than pieces do not count as an empty ring.
            let fill_empty = if umem.multi_buffer { raw.rx_dropped } else { raw.rx_fill_ring_empty_descs };
            Statistics {
                fill_empty: fill_empty.min(raw.rx_dropped),
                oversize: raw.rx_dropped.saturating_sub(fill_empty),
                rx_ring_full: raw.rx_ring_full,
                tx_invalid: raw.tx_invalid_descs,
            }
        },
    )
}

/// One send works on 32 descriptors in copy mode; Linux 6.17 and later let us ask for more (net/xdp/xsk.c). On earlier
/// kernels a burst takes more system calls, no more.
fn raise_tx_budget(fd: RawFd) -> Result<(), HostError> {
    const XDP_MAX_TX_SKB_BUDGET: i32 = 9;
    match set_option(
        fd,
        XDP_MAX_TX_SKB_BUDGET,
        &TX_BUDGET_DESCS,
        "cannot set the tx budget",
        |_| "see the kernel's log",
    ) {
        Err(error) if error.errno != libc::ENOPROTOOPT => Err(error),
        _ => Ok(()),
    }
}

/// Makes all of guest memory a socket's UMEM. The kernel pins it, which takes time; other sockets and the threads that
/// use the memory go on meanwhile.
///
/// # Errors
/// The memlock limit, or memory that cannot be pinned.
pub fn register_umem(fd: &OwnedFd, memory: &GuestMemory, layout: UmemLayout) -> Result<(), HostError> {
    let reg = libc::xdp_umem_reg {
        addr: memory.base().as_ptr() as u64,
        len: memory.len_bytes(),
        chunk_size: CHUNK_BYTES as u32,
        headroom: layout.headroom(),
        flags: libc::XDP_UMEM_UNALIGNED_CHUNK_FLAG,
        tx_metadata_len: 0,
    };
    let mib = memory.len_bytes() >> 20;
    let raw_fd = fd.as_raw_fd();
    set_option(
        raw_fd,
        libc::XDP_UMEM_REG,
        &reg,
        &format!("cannot register {mib} MiB of guest memory as a UMEM"),
        |errno| match errno {
            libc::ENOBUFS => {
                "the memlock limit is too small: raise it above the guest's memory (ulimit -l, LimitMEMLOCK=) \
                 or leave CAP_IPC_LOCK to mpassthru"
            }
            libc::EFAULT => "memory on a disk file cannot be pinned: use memfd, hugetlbfs or POSIX shared memory",
            libc::ENOMEM => "not enough free memory to pin all of the guest: give it less, or free some",
            _ => "this kernel does not take unaligned chunks (Linux 5.4 or later does)",
        },
    )
}

fn bind_queue(fd: RawFd, umem: &Umem, params: &SocketParams) -> Result<(), Error> {
    let guard = match umem {
        Umem::Of(shared) => Some(shared.socket.lock().unwrap_or_else(PoisonError::into_inner)),
        Umem::New | Umem::Registered { .. } => None,
    };
    let owner = match &guard {
        Some(guard) => {
            Some(guard.as_ref().ok_or_else(|| Error::Refused("the shared UMEM's socket was closed".into()))?)
        }
        None => None,
    };
    let mode = match params.mode {
        BindMode::Copy if params.is_multi_buffer() => libc::XDP_COPY | libc::XDP_USE_SG,
        BindMode::Copy => libc::XDP_COPY,
        // Never with XDP_USE_SG: drivers keep their own bookkeeping of a frame's pieces inside the first one, which is guest
        // memory (kernel-facts, section 5.4).
        BindMode::ZeroCopy => libc::XDP_ZEROCOPY,
    };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        // A shared UMEM brings its flags along; passing others is EINVAL (net/xdp/xsk.c: xsk_bind).
        sxdp_flags: if owner.is_some() { libc::XDP_SHARED_UMEM } else { mode | libc::XDP_USE_NEED_WAKEUP },
        sxdp_ifindex: params.ifindex,
        sxdp_queue_id: params.queue_id,
        sxdp_shared_umem_fd: owner.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a sockaddr_xdp and `len` its size.
    if unsafe { libc::bind(fd, (&raw const address).cast(), len) } == 0 {
        return Ok(());
    }
    let what = format!("cannot bind AF_XDP socket to interface {} queue {}", params.ifindex, params.queue_id);
    Err(HostError::last(what, |errno| bind_advice(errno, params.mode)).into())
}

/// Tries again, until the deadline, what fails with `errno` while the kernel takes a predecessor down.
fn until(deadline: Instant, errno: i32, mut step: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
    loop {
        match step() {
            Err(Error::Host(error)) if error.errno == errno && Instant::now() < deadline => {
                std::thread::sleep(BIND_RETRY);
            }
            result => return result,
        }
    }
}

fn bind_advice(errno: i32, mode: BindMode) -> &'static str {
    match (errno, mode) {
        (libc::EBUSY, _) => "another AF_XDP socket owns this queue: stop its program or take another queue",
        (libc::ENODEV, _) => "the interface is gone or the socket was made in another network namespace",
        (libc::ENETDOWN, _) => "bring the interface up",
        (libc::ENOMEM, _) => {
            "not enough kernel memory for the pool (136 bytes per 4 KiB of guest memory): give it less"
        }
        (libc::EINVAL, BindMode::ZeroCopy) => "no such queue, or the MTU is too large for zero-copy",
        (libc::EINVAL, BindMode::Copy) => "the interface has no such queue",
        (libc::ENOTSUP, BindMode::ZeroCopy) => "the driver has no zero-copy support: use copy mode",
        _ => "see the kernel's log",
    }
}

fn bound_mode(fd: RawFd) -> Result<BindMode, HostError> {
    let options: libc::xdp_options = get_option(fd, libc::XDP_OPTIONS)?;
    Ok(if options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0 { BindMode::ZeroCopy } else { BindMode::Copy })
}

/// Packets of several descriptors came with Linux 6.6; before, the option bit made a descriptor invalid.
fn copy_mode_pieces_max() -> usize {
    if kernel_version() >= (6, 6) { TX_PIECES_COPY_MODE } else { 1 }
}

fn kernel_version() -> (u32, u32) {
    let mut name = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: `name` is valid for writes of its type, and all-zero bytes are a valid utsname if the call fails.
    let name = unsafe {
        libc::uname(name.as_mut_ptr());
        name.assume_init()
    };
    let release: String = name.release.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn set_option<T>(
    fd: RawFd,
    option: i32,
    value: &T,
    attempted: &str,
    advice: impl FnOnce(i32) -> &'static str,
) -> Result<(), HostError> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for reads of `len` bytes.
    let failed = unsafe { libc::setsockopt(fd, libc::SOL_XDP, option, (&raw const *value).cast::<c_void>(), len) };
    if failed == 0 { Ok(()) } else { Err(HostError::last(attempted, advice)) }
}

fn get_option<T: Copy>(fd: RawFd, option: i32) -> Result<T, HostError> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for writes of `len` bytes; T is one of the kernel's plain structures, for which zeros
    // are valid where the kernel writes less.
    let failed = unsafe { libc::getsockopt(fd, libc::SOL_XDP, option, value.as_mut_ptr().cast(), &raw mut len) };
    if failed != 0 {
        return Err(HostError::last(
            format!("cannot read AF_XDP socket option {option}"),
            |_| "Linux 5.9 or later is needed",
        ));
    }
    // SAFETY: filled in by the kernel, zero elsewhere.
    Ok(unsafe { value.assume_init() })
}
