//! The far end of a veth pair (`mpassthru_testing::wire`).

use std::time::Duration;

use mpassthru_testing::wire::{self, GeneratorJob, PacketWireConfig, SendJob};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::{PyPattern, set_check_counts, to_python};

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<FrameGenerator>()?;
    module.add_class::<PacketWire>()?;
    module.add_class::<XdpSink>()
}

/// Sends copies of one frame out of an interface, by the kernel's own hand.
#[pyclass(frozen, module = "mpassthru._core")]
struct FrameGenerator(wire::FrameGenerator);

#[pymethods]
impl FrameGenerator {
    #[new]
    fn new(py: Python<'_>, ifindex: u32, frame: Vec<u8>) -> PyResult<Self> {
        py.detach(|| wire::FrameGenerator::new(ifindex, frame)).map(Self).map_err(to_python)
    }

    #[pyo3(signature = (*, count = None, duration_s = None, rate_frames_per_s = None))]
    fn start(&self, count: Option<u64>, duration_s: Option<f64>, rate_frames_per_s: Option<f64>) -> PyResult<()> {
        let duration = duration_s.map(Duration::try_from_secs_f64).transpose();
        let duration = duration.map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.0.start(GeneratorJob { count, duration, rate_frames_per_s }).map_err(to_python)
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn is_active(&self) -> PyResult<bool> {
        self.0.is_active().map_err(to_python)
    }

    #[getter]
    fn sent(&self) -> u64 {
        self.0.sent()
    }
}

/// Patterned frames through AF_PACKET, both ways.
#[pyclass(frozen, module = "mpassthru._core")]
struct PacketWire(wire::PacketWire);

#[pymethods]
impl PacketWire {
    #[new]
    #[pyo3(signature = (ifindex, *, all_ethertypes = false, capture_frames = 0))]
    fn new(py: Python<'_>, ifindex: u32, all_ethertypes: bool, capture_frames: usize) -> PyResult<Self> {
        let config = PacketWireConfig { ifindex, all_ethertypes, capture_frames };
        py.detach(|| wire::PacketWire::new(config)).map(Self).map_err(to_python)
    }

    #[pyo3(signature = (pattern, *, count, first_sequence = None, rate_frames_per_s = None))]
    fn start_sending(
        &self,
        pattern: PyPattern,
        count: u64,
        first_sequence: Option<u32>,
        rate_frames_per_s: Option<f64>,
    ) -> PyResult<()> {
        let job = SendJob { stream: pattern.into(), count, first_sequence, rate_frames_per_s };
        self.0.start_sending(job).map_err(to_python)
    }

    fn stop_sending(&self) {
        self.0.stop_sending();
    }

    fn is_sending(&self) -> PyResult<bool> {
        self.0.is_sending().map_err(to_python)
    }

    fn send_frame(&self, py: Python<'_>, frame: Vec<u8>) -> PyResult<()> {
        py.detach(|| self.0.send_frame(&frame)).map_err(to_python)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = py.detach(|| self.0.counters()).map_err(to_python)?;
        let values = PyDict::new(py);
        values.set_item("sent", counters.sent)?;
        values.set_item("sent_bytes", counters.sent_bytes)?;
        values.set_item("send_retries", counters.send_retries)?;
        values.set_item("received", counters.received)?;
        values.set_item("received_bytes", counters.received_bytes)?;
        values.set_item("kernel_drops", counters.kernel_drops)?;
        set_check_counts(&values, counters.check)?;
        Ok(values)
    }

    fn reset_check(&self, py: Python<'_>) {
        py.detach(|| self.0.reset_check());
    }

    fn take_captured<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        self.0.take_captured().iter().map(|frame| PyBytes::new(py, frame)).collect()
    }
}

/// Counts and drops what an interface receives.
#[pyclass(frozen, module = "mpassthru._core")]
struct XdpSink(wire::XdpSink);

#[pymethods]
impl XdpSink {
    #[staticmethod]
    #[pyo3(signature = (ifindex, *, xdp_mode))]
    fn attach(py: Python<'_>, ifindex: u32, xdp_mode: &str) -> PyResult<Self> {
        let mode = match xdp_mode {
            "native" => wire::XdpMode::Native,
            "generic" => wire::XdpMode::Generic,
            _ => return Err(PyValueError::new_err(format!("xdp_mode is native or generic, not {xdp_mode:?}"))),
        };
        py.detach(|| wire::XdpSink::attach(ifindex, mode)).map(Self).map_err(to_python)
    }

    fn counters(&self) -> PyResult<(u64, u64)> {
        self.0.counters().map_err(to_python)
    }
}
