//! A bound socket over memory that looks like a guest's, and the program that steers a queue's frames to it.

use std::error::Error;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use mpassthru_datapath::guest_memory::{GuestMemory, GuestPhysAddr, RegionSpec, UmemAddr, UserAddr};
use mpassthru_datapath::xsk::{BindMode, CHUNK_BYTES, SocketParams, Umem, UmemLayout, XskSocket};
use mpassthru_steering::{Steer, SteeringProgram, XdpMode};

/// As the built-in guest has them: buffers of 2048 bytes, the frame behind a virtio-net header.
const BUFFER_BYTES: u64 = 2048;
const HEADER_BYTES: u64 = 12;
/// Buffers: as many as a socket has in the kernel at once, for each direction.
pub const BUFFERS: u64 = 1024;
const MEMORY_BYTES: u64 = 64 << 20;

/// Everything that has to live as long as frames flow.
pub struct Bound {
    pub xsk: XskSocket,
    pub layout: UmemLayout,
    pub memory: GuestMemory,
    pub _steering: SteeringProgram,
    start: UmemAddr,
}

impl Bound {
    /// Where the frame of receive buffer `index` starts.
    pub fn rx_frame(&self, index: u64) -> UmemAddr {
        self.start.plus(index * BUFFER_BYTES + HEADER_BYTES)
    }

    /// Where the frame of transmit buffer `index` starts.
    pub fn tx_frame(&self, index: u64) -> UmemAddr {
        self.rx_frame(BUFFERS + index)
    }
}

/// Attaches and binds, in copy mode, to queue 0.
pub fn open(ifindex: u32, frame_max: u32) -> Result<Bound, Box<dyn Error>> {
    let layout = UmemLayout::for_frames(frame_max).ok_or("such frames do not fit a chunk")?;
    let mut steering = SteeringProgram::attach(ifindex, XdpMode::Native, 1, false)?;
    steering.steer_queue(0, Steer::Passthru)?;
    let memory = memory()?;
    let start = memory.translate_user(UserAddr(0), MEMORY_BYTES).ok_or("memory is one region")?;
    // SAFETY: no pointers are passed; a new descriptor is ours.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let params = SocketParams {
        ifindex,
        queue_id: 0,
        mode: BindMode::Copy,
        layout,
        frame_max: layout.frame_max,
        zero_copy_rules: None,
    };
    let xsk = XskSocket::bind(owned(fd)?, &memory, &Umem::New, &params)?;
    // SAFETY: open as long as `xsk` lives, which is longer than this borrow.
    steering.set_socket(0, unsafe { BorrowedFd::borrow_raw(xsk.raw_fd()) })?;
    Ok(Bound { xsk, layout, memory, _steering: steering, start })
}

fn memory() -> Result<GuestMemory, Box<dyn Error>> {
    // SAFETY: the name is a C string; a new descriptor is ours.
    let file = owned(unsafe { libc::memfd_create(c"limit".as_ptr(), libc::MFD_CLOEXEC) })?;
    std::fs::File::from(file.try_clone()?).set_len(MEMORY_BYTES)?;
    let region = RegionSpec {
        guest_phys: GuestPhysAddr(0),
        size_bytes: MEMORY_BYTES,
        user: UserAddr(0),
        mmap_offset: 0,
        fd: file.as_raw_fd(),
    };
    // One chunk in front keeps fill addresses from being negative.
    Ok(GuestMemory::map(&[region], CHUNK_BYTES)?)
}

fn owned(fd: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: just made by the kernel, and owned by nobody else.
    if fd < 0 { Err(std::io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}
