//! `Engine`: the worker's handle on the data plane of one port (`crates/datapath`).

use std::os::fd::RawFd;

use mpassthru_datapath::engine::Engine as Port;
use mpassthru_datapath::error::HostError;
use mpassthru_datapath::fd::EventFd;
use mpassthru_datapath::guest_memory::{FileSpec, GuestPhysAddr, RegionSpec, UserAddr};
use mpassthru_datapath::pump::{self, PollMode, SourceLock};
use mpassthru_datapath::stats::{BounceReason, Counts, DropReason, Offload};
use mpassthru_datapath::virtqueue::{InflightRecord, Logged, QueueConfig};
use mpassthru_datapath::xsk::{
    BindMode, Contiguity, DriverRules, FRAME_BYTES_MAX, LONG_FRAME_BYTES_MAX, SocketParams, UmemLayout,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::{datapath_error, fault_error, host_error_of};

const VIRTIO_F_RING_PACKED: u64 = 1 << 34;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<MemoryRegion>()?;
    module.add_class::<VringConfig>()?;
    module.add_class::<ZeroCopyRules>()?;
    module.add_class::<SocketConfig>()?;
    module.add_class::<Event>()?;
    module.add_class::<Engine>()
}

/// One region of guest memory, as VHOST_USER_SET_MEM_TABLE describes it.
#[pyclass(frozen, module = "mpassthru._core")]
struct MemoryRegion(RegionSpec);

#[pymethods]
impl MemoryRegion {
    #[new]
    #[pyo3(signature = (*, guest_phys_address, size_bytes, user_address, mmap_offset, fd))]
    fn new(guest_phys_address: u64, size_bytes: u64, user_address: u64, mmap_offset: u64, fd: RawFd) -> Self {
        Self(RegionSpec {
            guest_phys: GuestPhysAddr(guest_phys_address),
            size_bytes,
            user: UserAddr(user_address),
            mmap_offset,
            fd,
        })
    }
}

/// A virtqueue ready to run.
#[pyclass(frozen, module = "mpassthru._core")]
struct VringConfig {
    queue: QueueConfig,
    features: u64,
    enabled: bool,
    kick_fd: RawFd,
    call_fd: RawFd,
    err_fd: RawFd,
    record_fd: RawFd,
    record_offset: u64,
    logged: Logged,
}

#[pymethods]
impl VringConfig {
    #[new]
    #[pyo3(signature = (*, size, base, desc_user_address, avail_user_address, used_user_address, features, enabled,
                        kick_fd, call_fd = -1, err_fd = -1, record_fd = -1, record_offset = 0, log_buffers = false,
                        log_used_address = None),
           text_signature = "(*, size, base, desc_user_address, avail_user_address, used_user_address, features, enabled, \
                             kick_fd, call_fd=-1, err_fd=-1, record_fd=-1, record_offset=0, log_buffers=False, \
                             log_used_address=None)")]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python constructor")]
    fn new(
        size: u32,
        base: u32,
        desc_user_address: u64,
        avail_user_address: u64,
        used_user_address: u64,
        features: u64,
        enabled: bool,
        kick_fd: RawFd,
        call_fd: RawFd,
        err_fd: RawFd,
        record_fd: RawFd,
        record_offset: u64,
        log_buffers: bool,
        log_used_address: Option<u64>,
    ) -> Self {
        let queue = QueueConfig {
            size,
            base,
            desc: UserAddr(desc_user_address),
            avail: UserAddr(avail_user_address),
            used: UserAddr(used_user_address),
            event_idx: false, // taken from `features` by the pump
            packed: false,
        };
        let logged = logged(log_buffers, log_used_address);
        Self { queue, features, enabled, kick_fd, call_fd, err_fd, record_fd, record_offset, logged }
    }
}

impl VringConfig {
    /// The record of what is in flight, if one is to be kept.
    fn record(&self) -> Result<Option<InflightRecord>, HostError> {
        if self.record_fd < 0 {
            return Ok(None);
        }
        let packed = self.features & VIRTIO_F_RING_PACKED != 0;
        InflightRecord::map(self.record_fd, self.record_offset, self.queue.size, packed).map(Some)
    }
}

/// What a driver's zero-copy mode does to memory, and what it takes.
#[pyclass(frozen, module = "mpassthru._core")]
struct ZeroCopyRules(DriverRules);

#[pymethods]
impl ZeroCopyRules {
    #[new]
    #[pyo3(signature = (*, direct, rx_write_max_bytes, rx_write_align_bytes, rx_write_before_bytes, rx_buffers_min,
                        tx_frame_max_bytes, tx_frame_min_bytes, tx_pieces_max, contiguity))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python constructor")]
    fn new(
        direct: bool,
        rx_write_max_bytes: u32,
        rx_write_align_bytes: u32,
        rx_write_before_bytes: u32,
        rx_buffers_min: u32,
        tx_frame_max_bytes: u32,
        tx_frame_min_bytes: u32,
        tx_pieces_max: usize,
        contiguity: &str,
    ) -> PyResult<Self> {
        let contiguity = match contiguity {
            "backing-page" => Contiguity::WithinBackingPage,
            "base-page" => Contiguity::WithinBasePage,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "contiguity is backing-page or base-page, not {contiguity:?}"
                )));
            }
        };
        if rx_write_align_bytes == 0 || tx_pieces_max == 0 || rx_write_max_bytes == 0 {
            return Err(PyValueError::new_err(
                "rx_write_max_bytes, rx_write_align_bytes and tx_pieces_max are at least 1",
            ));
        }
        if tx_frame_max_bytes > FRAME_BYTES_MAX || tx_frame_min_bytes > tx_frame_max_bytes {
            return Err(PyValueError::new_err(format!("tx frames have at most {FRAME_BYTES_MAX} bytes")));
        }
        Ok(Self(DriverRules {
            direct,
            rx_write_max: rx_write_max_bytes,
            rx_write_align: rx_write_align_bytes,
            rx_write_before: rx_write_before_bytes,
            rx_buffers_min,
            tx_frame_max: tx_frame_max_bytes,
            tx_frame_min: tx_frame_min_bytes,
            tx_pieces_max,
            contiguity,
        }))
    }
}

/// How a queue pair's AF_XDP socket is bound.
#[pyclass(frozen, module = "mpassthru._core")]
struct SocketConfig {
    socket_fd: RawFd,
    /// How to bind an AF_XDP socket; `None` for a packet socket, which is bound already.
    params: Option<SocketParams>,
    frame_max: u32,
}

#[pymethods]
impl SocketConfig {
    #[new]
    #[pyo3(signature = (*, socket_fd, ifindex, queue_id, mode, frame_max_bytes, room_bytes = None, zero_copy_rules = None))]
    fn new(
        socket_fd: RawFd,
        ifindex: u32,
        queue_id: u32,
        mode: &str,
        frame_max_bytes: u32,
        room_bytes: Option<u32>,
        zero_copy_rules: Option<&ZeroCopyRules>,
    ) -> PyResult<Self> {
        let mode = match mode {
            "packet" => return Ok(Self { socket_fd, params: None, frame_max: frame_max_bytes }),
            "copy" => BindMode::Copy,
            "zero-copy" if zero_copy_rules.is_some() => BindMode::ZeroCopy,
            "zero-copy" => return Err(PyValueError::new_err("zero-copy needs zero_copy_rules")),
            _ => return Err(PyValueError::new_err(format!("mode is packet, copy or zero-copy, not {mode:?}"))),
        };
        let room = room_bytes.unwrap_or(frame_max_bytes);
        let layout = UmemLayout::for_frames(room)
            .ok_or_else(|| PyValueError::new_err(format!("{room} bytes do not fit a chunk of 4096 bytes")))?;
        let longest = if mode == BindMode::Copy { LONG_FRAME_BYTES_MAX } else { layout.frame_max };
        if frame_max_bytes > longest {
            return Err(PyValueError::new_err(format!("frames have at most {longest} bytes, not {frame_max_bytes}")));
        }
        let zero_copy_rules = zero_copy_rules.map(|rules| rules.0);
        let frame_max = frame_max_bytes.max(layout.frame_max);
        let params = Some(SocketParams { ifindex, queue_id, mode, layout, frame_max, zero_copy_rules });
        Ok(Self { socket_fd, params, frame_max: frame_max_bytes })
    }

    #[getter]
    fn mode(&self) -> &'static str {
        match self.params {
            None => "packet",
            Some(SocketParams { mode: BindMode::Copy, .. }) => "copy",
            Some(SocketParams { mode: BindMode::ZeroCopy, .. }) => "zero-copy",
        }
    }
}

/// Something that happened on a pump thread.
#[pyclass(frozen, module = "mpassthru._core")]
struct Event {
    #[pyo3(get)]
    kind: &'static str,
    #[pyo3(get)]
    token: u64,
    #[pyo3(get)]
    vring: usize,
    #[pyo3(get)]
    value: u64,
    error: Option<PyErr>,
}

#[pymethods]
impl Event {
    #[getter]
    fn error<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.error.as_ref().map(|error| error.clone_ref(py).into_value(py).into_bound(py).into_any())
    }
}

impl From<pump::Event> for Event {
    fn from(event: pump::Event) -> Self {
        let blank = Self { kind: "", token: 0, vring: 0, value: 0, error: None };
        match event {
            pump::Event::Completed(pump::Completion { token, result: Ok(value) }) => {
                Self { kind: "completed", token, value, ..blank }
            }
            pump::Event::Completed(pump::Completion { token, result: Err(error) }) => {
                Self { kind: "completed", token, error: Some(datapath_error(error)), ..blank }
            }
            pump::Event::Fault { vring, fault } => {
                Self { kind: "fault", vring, error: Some(fault_error(&fault)), ..blank }
            }
            pump::Event::Distrusted { vring, mode, error } => {
                let value = u64::from(mode == BindMode::ZeroCopy);
                Self { kind: "distrusted", vring, value, error: Some(host_error_of(&error)), ..blank }
            }
            pump::Event::KickedEmpty { vring } => Self { kind: "kicked-empty", vring, ..blank },
            pump::Event::Host { vring, error } => {
                Self { kind: "host-error", vring, error: Some(host_error_of(&error)), ..blank }
            }
        }
    }
}

/// Guest memory, virtqueues and sockets of one port.
#[pyclass(frozen, module = "mpassthru._core")]
struct Engine(Port);

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, queue_pairs, poll = "adaptive", source_addresses = None))]
    fn new(queue_pairs: usize, poll: &str, source_addresses: Option<Vec<[u8; 6]>>) -> PyResult<Self> {
        let poll = match poll {
            "busy" => PollMode::Busy,
            "adaptive" => PollMode::Adaptive,
            "interrupt" => PollMode::Interrupt,
            _ => return Err(PyValueError::new_err(format!("poll is busy, adaptive or interrupt, not {poll:?}"))),
        };
        let lock = source_addresses.map_or_else(SourceLock::open, |addresses| SourceLock::to(&addresses));
        Port::new(queue_pairs, poll, &lock).map(Self).map_err(datapath_error)
    }

    #[getter]
    fn event_fd(&self) -> RawFd {
        self.0.events().ready_fd()
    }

    fn drain_events(&self) -> Vec<Event> {
        self.0.events().drain().into_iter().map(Event::from).collect()
    }

    fn map_memory(&self, py: Python<'_>, regions: Vec<PyRef<'_, MemoryRegion>>) -> PyResult<()> {
        let specs: Vec<_> = regions.iter().map(|region| region.0).collect();
        py.detach(|| self.0.map_memory(&specs)).map_err(datapath_error)
    }

    fn add_memory(&self, py: Python<'_>, regions: Vec<PyRef<'_, MemoryRegion>>) -> PyResult<Option<Vec<u64>>> {
        let specs: Vec<_> = regions.iter().map(|region| region.0).collect();
        py.detach(|| self.0.add_memory(&specs)).map_err(datapath_error)
    }

    fn prepare_socket(&self, queue_pair: usize, config: &SocketConfig) -> PyResult<u64> {
        let params = config.params.ok_or_else(|| PyValueError::new_err("a packet socket has nothing to prepare"))?;
        self.0.prepare_socket(queue_pair, config.socket_fd, params).map_err(datapath_error)
    }

    fn discard_prepared(&self, queue_pair: usize) -> PyResult<()> {
        self.0.discard_prepared(queue_pair).map_err(datapath_error)
    }

    fn attach_prepared(&self, queue_pair: usize) -> PyResult<u64> {
        self.0.attach_prepared(queue_pair).map_err(datapath_error)
    }

    fn socket_lacks_memory(&self, queue_pair: usize) -> PyResult<bool> {
        self.0.socket_lacks_memory(queue_pair).map_err(datapath_error)
    }

    fn attach_socket(&self, queue_pair: usize, config: &SocketConfig) -> PyResult<u64> {
        match config.params {
            Some(params) => self.0.attach_socket(queue_pair, config.socket_fd, params),
            None => self.0.attach_packet_socket(queue_pair, config.socket_fd, config.frame_max),
        }
        .map_err(datapath_error)
    }

    fn detach_socket(&self, queue_pair: usize) -> PyResult<u64> {
        self.0.detach_socket(queue_pair).map_err(datapath_error)
    }

    fn reclaim(&self, queue_pair: usize) -> PyResult<u64> {
        self.0.reclaim(queue_pair).map_err(datapath_error)
    }

    fn guest_address<'py>(&self, py: Python<'py>, queue_pair: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let address = self.0.guest_address(queue_pair).map_err(datapath_error)?;
        Ok(address.map(|address| PyBytes::new(py, &address)))
    }

    fn start_vring(&self, index: usize, config: &VringConfig) -> PyResult<u64> {
        let start = || {
            self.0.start_vring(
                index,
                pump::VringConfig {
                    queue: config.queue,
                    features: config.features,
                    enabled: config.enabled,
                    kick: EventFd::duplicate(config.kick_fd)?,
                    call: optional(config.call_fd)?,
                    err: optional(config.err_fd)?,
                    record: config.record()?,
                    log: None, // put in by the engine, which has it
                },
                config.logged,
            )
        };
        start().map_err(datapath_error)
    }

    fn stop_vring(&self, index: usize) -> PyResult<u64> {
        self.0.stop_vring(index).map_err(datapath_error)
    }

    fn set_vring_enabled(&self, index: usize, enabled: bool) -> PyResult<u64> {
        self.0.set_vring_enabled(index, enabled).map_err(datapath_error)
    }

    fn set_vring_call(&self, index: usize, fd: RawFd) -> PyResult<u64> {
        let set = || self.0.set_vring_call(index, optional(fd)?);
        set().map_err(datapath_error)
    }

    fn set_vring_err(&self, index: usize, fd: RawFd) -> PyResult<u64> {
        let set = || self.0.set_vring_err(index, optional(fd)?);
        set().map_err(datapath_error)
    }

    #[pyo3(signature = (fd, *, size_bytes = 0, offset = 0))]
    fn map_log(&self, fd: RawFd, size_bytes: u64, offset: u64) -> PyResult<()> {
        let spec = FileSpec { fd, offset, size_bytes };
        self.0.map_log((fd >= 0).then_some(&spec)).map_err(datapath_error)
    }

    fn set_log_fd(&self, fd: RawFd) -> PyResult<()> {
        let notify = optional(fd).map_err(datapath_error)?;
        self.0.set_log_notify(notify);
        Ok(())
    }

    fn mark_all(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.mark_all()).map_err(datapath_error)
    }

    fn set_vring_log(&self, index: usize, log_buffers: bool, log_used_address: Option<u64>) -> PyResult<u64> {
        self.0.set_vring_log(index, logged(log_buffers, log_used_address)).map_err(datapath_error)
    }

    fn socket_attached(&self, queue_pair: usize) -> PyResult<bool> {
        self.0.socket_attached(queue_pair).map_err(datapath_error)
    }

    fn send_frame(&self, queue_pair: usize, frame: Vec<u8>) -> PyResult<u64> {
        self.0.send_frame(queue_pair, frame).map_err(datapath_error)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (rx, tx) = py.detach(|| self.0.counts());
        let report = PyDict::new(py);
        report.set_item("rx", direction(py, &rx)?)?;
        report.set_item("tx", direction(py, &tx)?)?;
        Ok(report)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

fn logged(buffers: bool, used_ring: Option<u64>) -> Logged {
    Logged { buffers, used_ring: used_ring.map(GuestPhysAddr) }
}

fn optional(fd: RawFd) -> Result<Option<EventFd>, mpassthru_datapath::error::Error> {
    if fd < 0 { Ok(None) } else { Ok(Some(EventFd::duplicate(fd)?)) }
}

/// One direction's figures, keyed as `mpassthru.report.DirectionReport`. Reasons that never occurred are left out.
fn direction<'py>(py: Python<'py>, counts: &Counts) -> PyResult<Bound<'py, PyDict>> {
    let report = PyDict::new(py);
    report.set_item("frames", counts.frames)?;
    report.set_item("bytes", counts.bytes)?;
    report.set_item("direct", counts.direct)?;
    report.set_item("header_split", counts.header_split)?;
    report.set_item("bounced", by_reason(py, BounceReason::NAMES, &counts.bounced)?)?;
    report.set_item("dropped", by_reason(py, DropReason::NAMES, &counts.dropped)?)?;
    report.set_item("offloaded", by_reason(py, Offload::NAMES, &counts.offloaded)?)?;
    report.set_item("copied_bytes", counts.copied_bytes)?;
    report.set_item("header_bytes", counts.header_bytes)?;
    Ok(report)
}

fn by_reason<'py>(py: Python<'py>, names: &[&str], figures: &[u64]) -> PyResult<Bound<'py, PyDict>> {
    let reasons = PyDict::new(py);
    for (name, &figure) in names.iter().zip(figures).filter(|&(_, &figure)| figure > 0) {
        reasons.set_item(name, figure)?;
    }
    Ok(reasons)
}
