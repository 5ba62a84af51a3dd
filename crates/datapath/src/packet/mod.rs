//! AF_PACKET: the raw-socket path, for interfaces without XDP and as what a port is measured against (packet(7),
//! Documentation/networking/packet_mmap.rst).
//!
//! Received frames lie in a ring that the kernel fills (TPACKET_V2: frame by frame; V3 holds frames back until a block is
//! full or a timer ends) and are copied to the guest. Frames are sent straight from the guest's memory, many in one
//! call (sendmmsg): the kernel copies them while it is in that call, and has nothing of the guest's afterwards.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::HostError;
use crate::xsk::SharedFd;

/// Frames in the ring.
const RING_FRAMES: u32 = 2048;
/// In front of a frame in its slot: tpacket2_hdr, sockaddr_ll and alignment (TPACKET2_HDRLEN is 52).
const SLOT_HEADER_BYTES: u32 = 128;
const BLOCK_BYTES: u32 = 1 << 16;
const VLAN_TAG_BYTES: usize = 4;
/// Destination and source address: a VLAN tag comes right behind.
const ADDRESSES_BYTES: usize = 12;
const ETHERTYPE_VLAN: u16 = 0x8100;

/// A bound socket with its receive ring. Dropping it unmaps the ring and closes the descriptor.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    ring: NonNull<u8>,
    ring_bytes: usize,
    slot_bytes: usize,
    next: u32,
    raw_fd: RawFd,
    fd: SharedFd,
}

// SAFETY: a mapping without thread affinity; one thread owns the socket at a time (&mut self to use the ring).
unsafe impl Send for PacketSocket {}

/// A received frame, in the ring until it is released.
pub(crate) struct Received<'a> {
    /// The frame, without the VLAN tag that the kernel took off.
    bytes: &'a [u8],
    tag: Option<[u8; VLAN_TAG_BYTES]>,
    /// The frame was longer than a slot.
    pub truncated: bool,
}

impl Received<'_> {
    pub fn len(&self) -> u32 {
        (self.bytes.len() + self.tag.map_or(0, |tag| tag.len())) as u32
    }

    /// The frame's bytes in order: addresses, tag if there is one, the rest.
    pub fn parts(&self) -> [&[u8]; 3] {
        match &self.tag {
            Some(tag) => {
                let (addresses, rest) = self.bytes.split_at(ADDRESSES_BYTES.min(self.bytes.len()));
                [addresses, tag, rest]
            }
            None => [self.bytes, &[], &[]],
        }
    }
}

impl PacketSocket {
    /// Takes a socket that is bound to its interface already, and gives it a ring for frames of `frame_max` bytes.
    ///
    /// # Errors
    /// Each failing system call, with what to try.
    pub fn open(fd: OwnedFd, frame_max: u32) -> Result<Self, HostError> {
        let raw_fd = fd.as_raw_fd();
        let slot_bytes = (frame_max + SLOT_HEADER_BYTES).next_power_of_two();
        let version = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
        set_option(raw_fd, libc::PACKET_VERSION, &version)?;
        let request = libc::tpacket_req {
            tp_block_size: BLOCK_BYTES,
            tp_block_nr: RING_FRAMES / (BLOCK_BYTES / slot_bytes),
            tp_frame_size: slot_bytes,
            tp_frame_nr: RING_FRAMES,
        };
        set_option(raw_fd, libc::PACKET_RX_RING, &request)?;
        let bypass: libc::c_int = 1;
        set_option(raw_fd, libc::PACKET_QDISC_BYPASS, &bypass)?;
        let ring_bytes = RING_FRAMES as usize * slot_bytes as usize;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), ring_bytes, access, flags, raw_fd, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(ring) if start != libc::MAP_FAILED => Ok(Self {
                ring,
                ring_bytes,
                slot_bytes: slot_bytes as usize,
                next: 0,
                raw_fd,
                fd: Arc::new(Mutex::new(Some(fd))),
            }),
            _ => Err(HostError::last("cannot map a packet socket's ring", |_| "free some memory")),
        }
    }

    /// The descriptor, to poll.
    pub fn raw_fd(&self) -> RawFd {
        self.raw_fd
    }

    /// The descriptor, for statistics.
    pub fn shared_fd(&self) -> SharedFd {
        Arc::clone(&self.fd)
    }

    /// Whether a frame has arrived.
    #[inline]
    pub fn has_frame(&self) -> bool {
        // Acquire: the frame is read after its status. Pairs with the kernel's barrier before it sets the status
        // (net/packet/af_packet.c: __packet_set_status).
        self.status().load(Ordering::Acquire) & libc::TP_STATUS_USER != 0
    }

    /// The next frame, if one has arrived; it stays the next until [`release`](Self::release).
    #[inline]
    pub fn peek(&mut self) -> Option<Received<'_>> {
        if !self.has_frame() {
            return None;
        }
        let slot = self.slot();
        // SAFETY: a slot begins with this header, written by the kernel before the status that has_frame() saw.
        let header = unsafe { slot.cast::<libc::tpacket2_hdr>().read() };
        let room = self.slot_bytes.saturating_sub(usize::from(header.tp_mac));
        let len = (header.tp_snaplen as usize).min(room);
        // SAFETY: inside the slot, and the slot is ours, not the kernel's, until release(), which needs &mut self.
        let bytes = unsafe { std::slice::from_raw_parts(slot.add(usize::from(header.tp_mac)), len) };
        let tag = (header.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then(|| {
            let known = header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
            let ethertype = if known { header.tp_vlan_tpid } else { ETHERTYPE_VLAN };
            let ([a, b], [c, d]) = (ethertype.to_be_bytes(), header.tp_vlan_tci.to_be_bytes());
            [a, b, c, d]
        });
        Some(Received { bytes, tag, truncated: header.tp_len > header.tp_snaplen })
    }

    /// Gives the next frame's slot back to the kernel.
    #[inline]
    pub fn release(&mut self) {
        // Release: the frame has been read. Pairs with the kernel's load of the status before it fills the slot again.
        self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % RING_FRAMES;
    }

    fn slot(&self) -> *mut u8 {
        // SAFETY: next < RING_FRAMES, and the mapping holds as many slots.
        unsafe { self.ring.as_ptr().add(self.next as usize * self.slot_bytes) }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: tp_status is the slot's first, aligned word; the mapping lives as long as &self, and both sides change
        // the word atomically.
        unsafe { AtomicU32::from_ptr(self.slot().cast()) }
    }

    /// Sends messages, and returns how many; fewer if the kernel stopped at one.
    ///
    /// # Errors
    /// The errno of the first message.
    ///
    /// # Safety
    /// Every message's vectors are valid for reads, by the kernel.
    pub unsafe fn send(&self, messages: &mut [libc::mmsghdr]) -> Result<usize, i32> {
        // SAFETY: the caller's; the count is that of the slice.
        let sent = unsafe {
            libc::sendmmsg(self.raw_fd, messages.as_mut_ptr(), messages.len() as libc::c_uint, libc::MSG_DONTWAIT)
        };
        usize::try_from(sent).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Drop for PacketSocket {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; nothing refers to it any more.
        let failed = unsafe { libc::munmap(self.ring.as_ptr().cast(), self.ring_bytes) };
        assert!(failed == 0, "a range that mmap returned can be unmapped");
        self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Frames that found no room in the ring since this was last asked: the kernel forgets them when it tells.
pub(crate) fn take_drops(fd: &SharedFd) -> u64 {
    let guard = fd.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(fd) = guard.as_ref() else { return 0 };
    let mut stats = MaybeUninit::<libc::tpacket_stats>::zeroed();
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: `stats` is valid for writes of `len` bytes, and zeros are a valid value if nothing is written.
    let stats = unsafe {
        let value = stats.as_mut_ptr().cast();
        // A packet socket always answers.
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, value, &raw mut len);
        stats.assume_init()
    };
    u64::from(stats.tp_drops)
}

fn set_option<T>(fd: RawFd, option: libc::c_int, value: &T) -> Result<(), HostError> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for reads of `len` bytes.
    let failed = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const *value).cast(), len) };
    if failed == 0 {
        return Ok(());
    }
    Err(HostError::last(format!("cannot set packet socket option {option}"), |errno| match errno {
        libc::ENOMEM => "free some memory",
        _ => "the kernel needs CONFIG_PACKET",
    }))
}
