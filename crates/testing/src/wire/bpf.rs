//! The few bpf(2) commands that the wire needs, and programs of a dozen instructions written by hand: small enough
//! to read here, so that no compiler and no loader is needed on the far end. See bpf(2) and linux/bpf.h.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
/// Frames that a live test run sends at once.
const LIVE_FRAMES_BATCH: u32 = 64;

pub(super) const XDP_DROP: i32 = 1;
pub(super) const XDP_TX: i32 = 3;

/// One instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self { code, registers: destination | source << 4, offset, immediate }
    }

    /// `destination = immediate`
    pub const fn move_immediate(destination: u8, immediate: i32) -> Self {
        Self::new(0xb7, destination, 0, 0, immediate)
    }

    /// `destination -= source`
    pub const fn subtract(destination: u8, source: u8) -> Self {
        Self::new(0x1f, destination, source, 0, 0)
    }

    /// `destination = *(u32 *)(source + offset)`
    pub const fn load_u32(destination: u8, source: u8, offset: i16) -> Self {
        Self::new(0x61, destination, source, offset, 0)
    }

    /// `*(u64 *)(destination + offset) += source`, atomically
    pub const fn atomic_add_u64(destination: u8, offset: i16, source: u8) -> Self {
        Self::new(0xdb, destination, source, offset, 0)
    }

    /// `destination = &map[0]` (BPF_PSEUDO_MAP_VALUE); two instructions.
    pub fn load_map_value(destination: u8, map: &OwnedFd) -> [Self; 2] {
        [Self::new(0x18, destination, 2, 0, map.as_raw_fd()), Self::new(0, 0, 0, 0, 0)]
    }

    pub const EXIT: Self = Self::new(0x95, 0, 0, 0, 0);
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapElement {
    map_fd: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _padding: u32,
}

/// `struct xdp_md`, of which a test run takes the data's bounds and the interface.
#[repr(C)]
#[derive(Default)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

fn address<T: ?Sized>(of: &T) -> u64 {
    std::ptr::from_ref(of).cast::<u8>().addr() as u64
}

/// One bpf(2) call; fails with EPERM and the like under the name `action`.
fn bpf<T>(command: libc::c_int, attributes: &mut T, action: impl FnOnce() -> String) -> Result<libc::c_int> {
    // SAFETY: `attributes` is a prefix of `union bpf_attr` of the length given; addresses in it are of memory that the
    // caller keeps alive through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), std::mem::size_of::<T>()) };
    if result < 0 { Err(Error::last_os(action())) } else { Ok(result as libc::c_int) }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: a descriptor that bpf(2) has just made for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Makes an array map of one element of `N` counters.
pub(super) fn create_counters<const N: usize>() -> Result<OwnedFd> {
    let value_size = std::mem::size_of::<[u64; N]>() as u32;
    let mut attributes = MapCreate { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, max_entries: 1 };
    bpf(BPF_MAP_CREATE, &mut attributes, || "create a BPF map".to_string()).map(owned)
}

/// Reads the counters of a map made by [`create_counters`].
pub(super) fn read_counters<const N: usize>(map: &OwnedFd) -> Result<[u64; N]> {
    let (key, mut values) = (0u32, [0u64; N]);
    let value = std::ptr::from_mut(&mut values).addr() as u64;
    let mut attributes =
        MapElement { map_fd: map.as_raw_fd() as u32, _padding: 0, key: address(&key), value, flags: 0 };
    bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes, || "read BPF counters".to_string())?;
    Ok(values)
}

/// Loads an XDP program.
pub(super) fn load_xdp(name: &str, instructions: &[Instruction]) -> Result<OwnedFd> {
    let mut prog_name = [0; 16];
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let mut attributes = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: instructions.len() as u32,
        insns: address(instructions),
        license: address(c"Apache-2.0"),
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_XDP,
    };
    bpf(BPF_PROG_LOAD, &mut attributes, || format!("load XDP program {name}")).map(owned)
}

/// Attaches a program to an interface of the calling thread's network namespace, until the link is closed.
pub(super) fn attach_xdp(program: &OwnedFd, ifindex: u32, flags: u32) -> Result<OwnedFd> {
    let mut attributes =
        LinkCreate { prog_fd: program.as_raw_fd() as u32, target_ifindex: ifindex, attach_type: BPF_XDP, flags };
    bpf(BPF_LINK_CREATE, &mut attributes, || format!("attach an XDP program to interface {ifindex}")).map(owned)
}

/// Runs a program `repeat` times on `frame`, as if it came in on an interface of the calling thread's network
/// namespace; its verdicts are carried out (BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18).
pub(super) fn run_live(program: &OwnedFd, ifindex: u32, frame: &[u8], repeat: u32) -> Result<()> {
    let context = XdpContext { data_end: frame.len() as u32, ingress_ifindex: ifindex, ..XdpContext::default() };
    let mut attributes = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        retval: 0,
        data_size_in: frame.len() as u32,
        data_size_out: 0,
        data_in: address(frame),
        data_out: 0,
        repeat,
        duration: 0,
        ctx_size_in: std::mem::size_of::<XdpContext>() as u32,
        ctx_size_out: 0,
        ctx_in: address(&context),
        ctx_out: 0,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        cpu: 0,
        batch_size: LIVE_FRAMES_BATCH,
        _padding: 0,
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes, || {
        format!("generate frames of {} bytes on interface {ifindex}", frame.len())
    })
    .map(|_| ())
}
