//! The built-in guest and the far end of the wire (`crates/testing`), for `mpassthru.testing`.

mod wire;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use mpassthru_testing::driver::{Descriptor, PackedDescriptor, RawPackedRing, RawRing, RingLayout};
use mpassthru_testing::guest::{self, Guest, GuestConfig, Payload, RxRole, SourceConfig};
use mpassthru_testing::memory::{Backing, GuestPhysAddr, RegionConfig};
use mpassthru_testing::pattern::{CheckCounts, Stream};
use mpassthru_testing::{Error, pattern};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::error::host_error;

pyo3::import_exception!(mpassthru.errors, RefusedError);

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<GuestDriver>()?;
    module.add_class::<GuestRing>()?;
    wire::register(module)
}

fn to_python(error: Error) -> PyErr {
    match error {
        Error::System { errno, .. } => host_error(errno, error.to_string()),
        Error::Config(message) => RefusedError::new_err(message),
    }
}

/// What the fields of the Python dataclasses in `mpassthru.testing.guest` look like from here.
#[derive(FromPyObject)]
struct PyRegion {
    guest_phys_address: u64,
    size_bytes: u64,
    backing: String,
    mmap_offset_bytes: u64,
}

impl PyRegion {
    fn config(&self) -> PyResult<RegionConfig> {
        let backing = match self.backing.as_str() {
            "memfd" => Backing::Memfd,
            "huge-memfd" => Backing::HugeMemfd,
            "private-memfd" => Backing::PrivateMemfd,
            "file" => Backing::File,
            other => return Err(PyValueError::new_err(format!("no memory is called {other:?}"))),
        };
        Ok(RegionConfig {
            guest_phys_address: GuestPhysAddr(self.guest_phys_address),
            size_bytes: self.size_bytes,
            backing,
            mmap_offset_bytes: self.mmap_offset_bytes,
        })
    }
}

#[derive(FromPyObject)]
struct PyBufferLayout {
    count: u16,
    pieces: Vec<u32>,
    stride_bytes: u32,
    offset_bytes: u32,
    region: usize,
    indirect: bool,
}

impl From<PyBufferLayout> for guest::BufferLayout {
    fn from(layout: PyBufferLayout) -> Self {
        let PyBufferLayout { count, pieces, stride_bytes, offset_bytes, region, indirect } = layout;
        Self { count, pieces, stride_bytes, offset_bytes, region, indirect }
    }
}

#[derive(FromPyObject)]
struct PyGuestConfig {
    regions: Vec<PyRegion>,
    ring_region: usize,
    queue_pairs: u16,
    queue_size: u16,
    rx: PyBufferLayout,
    tx: PyBufferLayout,
    polling: bool,
    canaries: bool,
    capture_frames: usize,
}

#[derive(FromPyObject)]
pub(crate) struct PyPattern {
    seed: u16,
    destination: pattern::Mac,
    source: pattern::Mac,
    sizes: Vec<u16>,
}

impl From<PyPattern> for Stream {
    fn from(pattern: PyPattern) -> Self {
        let PyPattern { seed, destination, source, sizes } = pattern;
        Self { seed, destination, source, sizes }
    }
}

#[derive(FromPyObject)]
struct PySource {
    frames: Vec<Vec<u8>>,
    pattern: Option<PyPattern>,
    count: Option<u64>,
    rate_frames_per_s: Option<f64>,
    burst: u16,
    first_sequence: Option<u32>,
    headers: Vec<Vec<u8>>,
}

impl PySource {
    fn config(self, queue_pair: usize) -> SourceConfig {
        let payload = match self.pattern {
            // Each queue pair sends a stream of its own, so that each can be accounted for.
            Some(pattern) => {
                let seed = pattern.seed.wrapping_add(queue_pair as u16);
                Payload::Pattern(Stream { seed, ..pattern.into() })
            }
            None => Payload::Fixed(self.frames),
        };
        SourceConfig {
            payload,
            count: self.count,
            rate_frames_per_s: self.rate_frames_per_s,
            burst: self.burst,
            first_sequence: self.first_sequence,
            headers: self.headers,
        }
    }
}

/// The built-in guest's memory, rings and driver threads.
#[pyclass(frozen, module = "mpassthru._core")]
struct GuestDriver(Arc<Guest>);

#[pymethods]
impl GuestDriver {
    #[new]
    fn new(py: Python<'_>, config: PyGuestConfig, features: u64) -> PyResult<Self> {
        let config = GuestConfig {
            regions: config.regions.iter().map(PyRegion::config).collect::<PyResult<_>>()?,
            ring_region: config.ring_region,
            queue_pairs: config.queue_pairs,
            queue_size: config.queue_size,
            features,
            rx: config.rx.into(),
            tx: config.tx.into(),
            polling: config.polling,
            canaries: config.canaries,
            capture_frames: config.capture_frames,
        };
        py.detach(|| Guest::new(config)).map(|guest| Self(Arc::new(guest))).map_err(to_python)
    }

    fn regions(&self) -> Vec<(u64, u64, u64, u64, RawFd)> {
        let describe = |region: &mpassthru_testing::memory::Region| {
            let config = region.config();
            let (address, size) = (config.guest_phys_address.0, config.size_bytes);
            (address, size, region.user_address(), config.mmap_offset_bytes, region.file().as_raw_fd())
        };
        self.0.memory().regions().iter().map(describe).collect()
    }

    fn ring(&self, index: usize) -> PyResult<GuestRing> {
        let layout = *self.0.layout(index).map_err(to_python)?;
        Ok(GuestRing { guest: Arc::clone(&self.0), layout, index })
    }

    #[pyo3(signature = (queue_pair, *, rx, source = None, polling = None))]
    fn start(
        &self,
        py: Python<'_>,
        queue_pair: usize,
        rx: &str,
        source: Option<PySource>,
        polling: Option<bool>,
    ) -> PyResult<()> {
        let role = match rx {
            "idle" => RxRole::Idle,
            "sink" => RxRole::Sink,
            "echo" => RxRole::Echo,
            "check" => RxRole::Check,
            other => {
                return Err(PyValueError::new_err(format!("the rx role is idle, sink, echo or check, not {other:?}")));
            }
        };
        let source = source.map(|source| source.config(queue_pair));
        let polling = polling.unwrap_or(self.0.config().polling);
        py.detach(|| self.0.start(queue_pair, role, source, polling)).map_err(to_python)
    }

    fn park(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.park()).map_err(to_python)
    }

    fn settle(&self, py: Python<'_>, bases: Vec<u32>) -> PyResult<()> {
        py.detach(|| self.0.settle(&bases)).map_err(to_python)
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.reset()).map_err(to_python)
    }

    #[pyo3(signature = (queue_pair = None))]
    fn counters<'py>(&self, py: Python<'py>, queue_pair: Option<usize>) -> PyResult<Bound<'py, PyDict>> {
        let mut counters = guest::Counters::default();
        for pair in self.pairs(queue_pair) {
            counters.add(&self.0.counters(pair).map_err(to_python)?);
        }
        let values = PyDict::new(py);
        for (name, value) in counters.named() {
            values.set_item(name, value)?;
        }
        set_check_counts(&values, py.detach(|| self.0.check_counts()))?;
        Ok(values)
    }

    #[pyo3(signature = (queue_pair = None))]
    fn violations<'py>(&self, py: Python<'py>, queue_pair: Option<usize>) -> PyResult<Bound<'py, PyDict>> {
        let mut violations = guest::Violations::default();
        for pair in self.pairs(queue_pair) {
            violations.add(&self.0.violations(pair).map_err(to_python)?);
        }
        let values = PyDict::new(py);
        for (name, value) in violations.named() {
            values.set_item(name, value)?;
        }
        Ok(values)
    }

    fn changed_gap_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.0.changed_gap_bytes()).map_err(to_python)
    }

    fn take_captured<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let captured = self.0.take_captured();
        captured.iter().map(|it| (PyBytes::new(py, &it.header), PyBytes::new(py, &it.frame))).collect()
    }

    fn read<'py>(&self, py: Python<'py>, guest_phys_address: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, length, |bytes| {
            self.0.memory().read(GuestPhysAddr(guest_phys_address), bytes).map_err(to_python)
        })
    }

    fn write(&self, guest_phys_address: u64, data: &[u8]) -> PyResult<()> {
        self.0.memory().write(GuestPhysAddr(guest_phys_address), data).map_err(to_python)
    }
}

impl GuestDriver {
    fn pairs(&self, queue_pair: Option<usize>) -> std::ops::Range<usize> {
        queue_pair.map_or(0..usize::from(self.0.config().queue_pairs), |pair| pair..pair + 1)
    }
}

fn set_check_counts(values: &Bound<'_, PyDict>, counts: CheckCounts) -> PyResult<()> {
    let CheckCounts { good, corrupt, duplicate, reordered, foreign, missing } = counts;
    values.set_item("check_good", good)?;
    values.set_item("check_corrupt", corrupt)?;
    values.set_item("check_duplicate", duplicate)?;
    values.set_item("check_reordered", reordered)?;
    values.set_item("check_foreign", foreign)?;
    values.set_item("check_missing", missing)
}

/// One virtqueue of the built-in guest, field by field.
#[pyclass(frozen, module = "mpassthru._core")]
struct GuestRing {
    guest: Arc<Guest>,
    layout: RingLayout,
    index: usize,
}

#[pymethods]
impl GuestRing {
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    #[getter]
    fn size(&self) -> u16 {
        self.layout.size
    }

    #[getter]
    fn desc_address(&self) -> u64 {
        self.layout.desc.0
    }

    #[getter]
    fn avail_address(&self) -> u64 {
        self.layout.avail.0
    }

    #[getter]
    fn used_address(&self) -> u64 {
        self.layout.used.0
    }

    fn user_address(&self, guest_phys_address: u64) -> PyResult<u64> {
        self.guest.memory().user_address(GuestPhysAddr(guest_phys_address)).map_err(to_python)
    }

    #[getter]
    fn kick_fd(&self) -> PyResult<RawFd> {
        Ok(self.events()?.kick.as_fd().as_raw_fd())
    }

    #[getter]
    fn call_fd(&self) -> PyResult<RawFd> {
        Ok(self.events()?.call.as_fd().as_raw_fd())
    }

    #[getter]
    fn err_fd(&self) -> PyResult<RawFd> {
        Ok(self.events()?.err.as_fd().as_raw_fd())
    }

    fn kick(&self) -> PyResult<()> {
        self.events()?.kick.signal();
        Ok(())
    }

    #[pyo3(signature = (index, *, address, length, flags = 0, next = 0))]
    fn set_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) -> PyResult<()> {
        self.split()?.set_descriptor(index, Descriptor { address, len: length, flags, next });
        Ok(())
    }

    #[pyo3(signature = (table_address, index, *, address, length, flags = 0, next = 0))]
    fn set_indirect_descriptor(
        &self,
        table_address: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) -> PyResult<()> {
        let descriptor = Descriptor { address, len: length, flags, next };
        self.split()?.set_indirect(GuestPhysAddr(table_address), index, descriptor).map_err(to_python)
    }

    fn descriptor(&self, index: u16) -> PyResult<(u64, u32, u16, u16)> {
        let Descriptor { address, len, flags, next } = self.split()?.descriptor(index);
        Ok((address, len, flags, next))
    }

    fn set_avail_entry(&self, slot: u16, head: u16) -> PyResult<()> {
        self.split()?.set_avail_entry(slot, head);
        Ok(())
    }

    #[getter]
    fn avail_idx(&self) -> PyResult<u16> {
        Ok(self.split()?.avail_idx())
    }

    fn set_avail_idx(&self, index: u16) -> PyResult<()> {
        self.split()?.set_avail_idx(index);
        Ok(())
    }

    fn set_avail_flags(&self, flags: u16) -> PyResult<()> {
        self.split()?.set_avail_flags(flags);
        Ok(())
    }

    fn set_used_event(&self, index: u16) -> PyResult<()> {
        self.split()?.set_used_event(index);
        Ok(())
    }

    #[getter]
    fn used_idx(&self) -> PyResult<u16> {
        Ok(self.split()?.used_idx())
    }

    fn used_entry(&self, slot: u16) -> PyResult<(u32, u32)> {
        let entry = self.split()?.used_entry(slot);
        Ok((entry.id, entry.len))
    }

    #[getter]
    fn used_flags(&self) -> PyResult<u16> {
        Ok(self.split()?.used_flags())
    }

    #[getter]
    fn avail_event(&self) -> PyResult<u16> {
        Ok(self.split()?.avail_event())
    }

    #[pyo3(signature = (slot, *, address, length, id, flags = 0))]
    fn set_packed_descriptor(&self, slot: u16, address: u64, length: u32, id: u16, flags: u16) -> PyResult<()> {
        let slot = slot % self.layout.size;
        self.packed()?.set_descriptor(slot, PackedDescriptor { address, len: length, id, flags });
        Ok(())
    }

    fn packed_descriptor(&self, slot: u16) -> PyResult<(u64, u32, u16, u16)> {
        let PackedDescriptor { address, len, id, flags } = self.packed()?.descriptor(slot % self.layout.size);
        Ok((address, len, id, flags))
    }

    fn take_calls(&self) -> PyResult<u64> {
        Ok(self.events()?.call.take())
    }

    fn take_errors(&self) -> PyResult<u64> {
        Ok(self.events()?.err.take())
    }
}

impl GuestRing {
    fn split(&self) -> PyResult<&RawRing> {
        self.guest.ring(self.index).map_err(to_python)
    }

    fn packed(&self) -> PyResult<&RawPackedRing> {
        self.guest.packed_ring(self.index).map_err(to_python)
    }

    fn events(&self) -> PyResult<&guest::QueueEvents> {
        self.guest.events(self.index).map_err(to_python)
    }
}
