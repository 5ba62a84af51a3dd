//! The loaded program of one interface, its maps, and what may be done with them.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError, PerCpuArray, PerCpuValues, XskMap};
use aya::programs::{ProgramFd, Xdp};
use aya::{EbpfLoader, include_bytes_aligned};

use crate::error::{SteeringError, errno_of};
use crate::filter::Filter;
use crate::layout::{CpuCounters, FilterValue, QueueCounters, QueueState, Steer, UNCLAIMED};
use crate::link::{XdpLink, XdpMode};
use crate::xdp_query::attached_program;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer.bpf.o"));

/// The steering program on one interface. Dropping it takes the program off.
pub struct SteeringProgram {
    ifname: String,
    link: XdpLink,
    maps: Maps,
    claimed: BTreeMap<u32, Steer>,
}

/// One filter; see `filters` in `bpf/steer.bpf.c`.
type FilterMap = Array<MapData, FilterValue>;

struct Maps {
    sockets: XskMap<MapData>,
    queues: Array<MapData, QueueState>,
    counters: PerCpuArray<MapData, CpuCounters>,
    filters: ArrayOfMaps<MapData, FilterMap>,
}

impl SteeringProgram {
    /// Loads the program with room for `queue_count` receive queues, all unclaimed, and attaches it. With `frags` it takes
    /// frames that a driver has put into several buffers (BPF_F_XDP_HAS_FRAGS, Linux 5.18); without, drivers refuse the
    /// MTUs that would need them.
    ///
    /// # Errors
    /// EBUSY or EEXIST if the interface has an XDP program (the message names its id), EPERM without CAP_BPF and
    /// CAP_NET_ADMIN, EOPNOTSUPP if the driver has no native XDP, ENODEV if there is no such interface.
    pub fn attach(ifindex: u32, mode: XdpMode, queue_count: u32, frags: bool) -> Result<Self, SteeringError> {
        let ifname = interface_name(ifindex)?;
        let (program, maps) = load(queue_count, frags).map_err(|error| load_error(&ifname, error.as_ref()))?;
        let link = XdpLink::create(program.as_fd(), ifindex, mode)
            .map_err(|errno| attach_error(&ifname, ifindex, mode, errno))?;
        Ok(Self { ifname, link, maps, claimed: BTreeMap::new() })
    }

    /// Claims a queue, or changes how a claimed one is steered. Counters start at zero when a queue is claimed.
    /// Of a queue that is steered by [`Steer::Mac`] nothing is the guest's before there is a filter.
    ///
    /// # Errors
    /// EINVAL if the interface has no such queue.
    pub fn steer_queue(&mut self, queue_id: u32, steer: Steer) -> Result<(), SteeringError> {
        let operation = self.operation("steer", queue_id);
        self.check_queue(queue_id, &operation)?;
        if !self.claimed.contains_key(&queue_id) {
            self.maps.clear_counters(queue_id).map_err(|error| map_error(&operation, &error))?;
        }
        self.maps.queues.set(queue_id, steer.to_state(), 0).map_err(|error| map_error(&operation, &error))?;
        self.claimed.insert(queue_id, steer);
        Ok(())
    }

    /// Gives a queue back to the host and empties its slot. A queue that is not claimed stays as it is.
    ///
    /// # Errors
    /// EINVAL if the interface has no such queue.
    pub fn release_queue(&mut self, queue_id: u32) -> Result<(), SteeringError> {
        let operation = self.operation("release", queue_id);
        self.check_queue(queue_id, &operation)?;
        self.maps.queues.set(queue_id, UNCLAIMED, 0).map_err(|error| map_error(&operation, &error))?;
        self.maps.sockets.unset(queue_id).map_err(|error| map_error(&operation, &error))?;
        self.claimed.remove(&queue_id);
        Ok(())
    }

    /// Replaces the filter of the queues that are steered by [`Steer::Mac`]: each frame is judged by the old one or by
    /// the new one, and those that are judged after the return by the new one. Takes the kernel some 10 ms, for it waits
    /// until no program looks at the old one any more.
    ///
    /// # Errors
    /// ENOMEM if the kernel has no room for it; the old one stays.
    ///
    /// # Panics
    /// If the filter does not pass [`Filter::check`].
    pub fn set_filter(&mut self, filter: &Filter) -> Result<(), SteeringError> {
        filter.check().expect("a filter is checked before it is used");
        self.maps
            .set_filter(&FilterValue::from(filter))
            .map_err(|error| map_error(&format!("replace the filter of {}", self.ifname), &error))
    }

    /// Puts an AF_XDP socket into the queue's slot; the kernel empties the slot when the socket is closed.
    ///
    /// # Errors
    /// ENOTSOCK or EOPNOTSUPP if it is no AF_XDP socket, EINVAL if the interface has no such queue. Linux 6.18 takes a
    /// socket that is not bound yet, and loses its frames without a counter: bind first.
    pub fn set_socket(&mut self, queue_id: u32, socket: BorrowedFd<'_>) -> Result<(), SteeringError> {
        let operation = self.operation("put an AF_XDP socket on", queue_id);
        self.check_queue(queue_id, &operation)?;
        self.maps.sockets.set(queue_id, socket.as_raw_fd(), 0).map_err(|error| map_error(&operation, &error))
    }

    /// Empties the queue's slot: frames for the guest are dropped from now on.
    ///
    /// # Errors
    /// EINVAL if the interface has no such queue.
    pub fn clear_socket(&mut self, queue_id: u32) -> Result<(), SteeringError> {
        let operation = self.operation("take the AF_XDP socket off", queue_id);
        self.check_queue(queue_id, &operation)?;
        self.maps.sockets.unset(queue_id).map_err(|error| map_error(&operation, &error))
    }

    /// What became of the frames of each claimed queue.
    ///
    /// # Errors
    /// The errno of the map look-up.
    pub fn counters(&self) -> Result<BTreeMap<u32, QueueCounters>, SteeringError> {
        self.claimed
            .keys()
            .map(|&queue_id| {
                let cpus = self
                    .maps
                    .counters
                    .get(&queue_id, 0)
                    .map_err(|error| map_error(&self.operation("read the counters of", queue_id), &error))?;
                Ok((queue_id, QueueCounters::sum(cpus.iter())))
            })
            .collect()
    }

    /// Takes the program off the interface at once.
    ///
    /// # Errors
    /// The errno of `BPF_LINK_DETACH`.
    pub fn detach(self) -> Result<(), SteeringError> {
        self.link.detach().map_err(|errno| {
            let operation = format!("take the XDP program off {}", self.ifname);
            SteeringError::new(errno, &operation, "end the process: the program goes with it")
        })
    }

    fn operation(&self, verb: &str, queue_id: u32) -> String {
        format!("{verb} {} queue {queue_id}", self.ifname)
    }

    fn check_queue(&self, queue_id: u32, operation: &str) -> Result<(), SteeringError> {
        let queue_count = self.maps.queues.len();
        if queue_id < queue_count {
            return Ok(());
        }
        let advice = format!("receive queues are numbered 0 to {}", queue_count - 1);
        Err(SteeringError::new(libc::EINVAL, operation, &advice))
    }
}

impl Maps {
    fn clear_counters(&mut self, queue_id: u32) -> Result<(), MapError> {
        let cpu_count = self.counters.get(&queue_id, 0)?.len();
        let zeros = PerCpuValues::try_from(vec![CpuCounters::default(); cpu_count])
            .expect("as many values as the kernel returned are as many as it takes");
        self.counters.set(queue_id, zeros, 0)
    }

    fn set_filter(&mut self, value: &FilterValue) -> Result<(), MapError> {
        let mut map = FilterMap::create(1, 0)?;
        map.set(0, value, 0)?;
        self.filters.set(0, &map, 0)
    }
}

/// Creates the maps and loads the program; nothing is attached yet.
fn load(queue_count: u32, frags: bool) -> Result<(ProgramFd, Maps), Box<dyn Error>> {
    let mut object = EbpfLoader::new()
        .map_max_entries("xsks", queue_count)
        .map_max_entries("queues", queue_count)
        .map_max_entries("counters", queue_count)
        .load(OBJECT)?;
    let name = if frags { "steer_frags" } else { "steer" };
    let program: &mut Xdp = object.program_mut(name).ok_or_else(|| format!("no program named {name}"))?.try_into()?;
    program.load()?;
    let program = program.fd()?.try_clone()?;
    let mut take = |name: &str| -> Result<Map, String> { object.take_map(name).ok_or(format!("no map named {name}")) };
    let maps = Maps {
        sockets: take("xsks")?.try_into()?,
        queues: take("queues")?.try_into()?,
        counters: take("counters")?.try_into()?,
        filters: take("filters")?.try_into()?,
    };
    Ok((program, maps))
}

fn interface_name(ifindex: u32) -> Result<String, SteeringError> {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE bytes that if_indextoname may write.
    if unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr()) }.is_null() {
        let operation = format!("find the interface with index {ifindex}");
        return Err(SteeringError::new(libc::ENODEV, &operation, "it is gone, or is in another network namespace"));
    }
    // SAFETY: if_indextoname succeeded and ended the name with a NUL inside the buffer.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

fn load_error(ifname: &str, error: &(dyn Error + 'static)) -> SteeringError {
    let advice = match errno_of(error) {
        libc::EPERM | libc::EACCES => "run as root, or give the process CAP_BPF and CAP_NET_ADMIN".to_owned(),
        libc::ENOMEM => "the kernel has no memory left for the maps".to_owned(),
        _ => format!("{}; Linux 5.11 or later is needed", root_cause(error)),
    };
    SteeringError::new(errno_of(error), &format!("load the XDP program for {ifname}"), &advice)
}

/// The first line of the innermost error: what the kernel or the ELF loader said.
fn root_cause(mut error: &(dyn Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn attach_error(ifname: &str, ifindex: u32, mode: XdpMode, errno: i32) -> SteeringError {
    let advice = match (errno, mode) {
        (libc::EBUSY | libc::EEXIST, _) => occupied_advice(ifname, ifindex),
        (libc::EPERM, _) => "run as root, or give the process CAP_BPF and CAP_NET_ADMIN".to_owned(),
        (libc::EOPNOTSUPP, XdpMode::Native) => "its driver has no native XDP; use generic mode".to_owned(),
        (libc::EINVAL | libc::ERANGE | libc::ENOSPC | libc::EOPNOTSUPP | libc::ENOMEM, _) => {
            "its driver refuses XDP as it is set up: lower the MTU to 1500 (a veth's peer too), switch LRO off, or give \
             it more queues; or use generic mode"
                .to_owned()
        }
        _ => "see the kernel log".to_owned(),
    };
    SteeringError::new(errno, &format!("attach the XDP program to {ifname}"), &advice)
}

fn occupied_advice(ifname: &str, ifindex: u32) -> String {
    match attached_program(ifindex) {
        Ok(Some(program)) => format!(
            "XDP program id {} is attached there ({} mode); end the process that holds it, or, if none does, \
             'ip link set dev {ifname} xdp off'",
            program.id,
            program.mode_name()
        ),
        Ok(None) => "a bond or bridge above it may have an XDP program; try again, or detach that one".to_owned(),
        Err(errno) => {
            format!("an XDP program is attached there (asking which failed with errno {errno})")
        }
    }
}

fn map_error(operation: &str, error: &MapError) -> SteeringError {
    let errno = errno_of(error);
    let advice = match errno {
        libc::EOPNOTSUPP | libc::ENOTSOCK | libc::EBADF => {
            "the descriptor is not an AF_XDP socket with a UMEM and rings"
        }
        libc::EPERM => "keep CAP_BPF and CAP_NET_ADMIN while the program is attached",
        _ => "see the kernel log",
    };
    SteeringError::new(errno, operation, advice)
}
