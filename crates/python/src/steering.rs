//! `SteeringProgram`: the broker's handle on the XDP program of one interface (`crates/steering`).

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use mpassthru_steering::{
    Addresses, Filter, MacAddress, QueueCounters, Steer, SteeringError, SteeringProgram as Program, Vlans, XdpMode,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::host_error;

/// The XDP program of one interface; `None` once closed.
#[pyclass(frozen, module = "mpassthru._core")]
struct SteeringProgram {
    program: Mutex<Option<Program>>,
}

/// What the fields of `mpassthru.steering.Filter` look like from here.
#[derive(FromPyObject)]
struct PyFilter {
    unicast: Option<Vec<MacAddress>>,
    multicast: Option<Vec<MacAddress>>,
    broadcast: bool,
    vlans: Option<Vec<u16>>,
    host_address: Option<MacAddress>,
}

impl From<PyFilter> for Filter {
    fn from(filter: PyFilter) -> Self {
        let PyFilter { unicast, multicast, broadcast, vlans, host_address } = filter;
        let addresses = |table: Option<Vec<MacAddress>>| table.map_or(Addresses::All, Addresses::Of);
        Self {
            unicast: addresses(unicast),
            multicast: addresses(multicast),
            broadcast,
            vlans: vlans.map_or(Vlans::All, Vlans::Of),
            host_address,
        }
    }
}

#[pymethods]
impl SteeringProgram {
    #[staticmethod]
    #[pyo3(signature = (ifindex, *, xdp_mode, queue_count, frags = false))]
    fn attach(py: Python<'_>, ifindex: u32, xdp_mode: &str, queue_count: u32, frags: bool) -> PyResult<Self> {
        let mode = match xdp_mode {
            "native" => XdpMode::Native,
            "generic" => XdpMode::Generic,
            _ => {
                return Err(PyValueError::new_err(format!("xdp_mode is native or generic, not {xdp_mode:?}")));
            }
        };
        let program = py.detach(|| Program::attach(ifindex, mode, queue_count, frags)).map_err(to_python)?;
        Ok(Self { program: Mutex::new(Some(program)) })
    }

    #[pyo3(signature = (queue_id, *, steer))]
    fn steer_queue(&self, py: Python<'_>, queue_id: u32, steer: &str) -> PyResult<()> {
        let steer = match steer {
            "passthru" => Steer::Passthru,
            "mac" => Steer::Mac,
            _ => {
                return Err(PyValueError::new_err(format!("steer is passthru or mac, not {steer:?}")));
            }
        };
        self.with_program(py, |program| program.steer_queue(queue_id, steer))
    }

    fn set_filter(&self, py: Python<'_>, filter: PyFilter) -> PyResult<()> {
        let filter = Filter::from(filter);
        filter.check().map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.with_program(py, |program| program.set_filter(&filter))
    }

    fn release_queue(&self, py: Python<'_>, queue_id: u32) -> PyResult<()> {
        self.with_program(py, |program| program.release_queue(queue_id))
    }

    fn set_socket(&self, py: Python<'_>, queue_id: u32, socket_fd: RawFd) -> PyResult<()> {
        if socket_fd < 0 {
            return Err(PyValueError::new_err(format!("socket_fd is an open descriptor, not {socket_fd}")));
        }
        // SAFETY: the descriptor is not -1, and is only passed to one system call, which refuses one that is not open.
        let socket = unsafe { BorrowedFd::borrow_raw(socket_fd) };
        self.with_program(py, |program| program.set_socket(queue_id, socket))
    }

    fn clear_socket(&self, py: Python<'_>, queue_id: u32) -> PyResult<()> {
        self.with_program(py, |program| program.clear_socket(queue_id))
    }

    fn counters(&self, py: Python<'_>) -> PyResult<BTreeMap<u32, BTreeMap<&'static str, u64>>> {
        let counters = self.with_program(py, |program| program.counters())?;
        Ok(counters.into_iter().map(|(queue_id, counters)| (queue_id, by_name(counters))).collect())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| match self.take() {
            Some(program) => program.detach(),
            None => Ok(()),
        })
        .map_err(to_python)
    }
}

impl SteeringProgram {
    /// Runs `operation` with the GIL released: a map update may wait for the kernel, and a lock for another thread.
    fn with_program<T: Send>(
        &self,
        py: Python<'_>,
        operation: impl FnOnce(&mut Program) -> Result<T, SteeringError> + Send,
    ) -> PyResult<T> {
        let result = py.detach(|| {
            let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
            program.as_mut().map(operation)
        });
        match result {
            Some(result) => result.map_err(to_python),
            None => Err(host_error(libc::EBADF, "the steering program is closed (EBADF): attach a new one".to_owned())),
        }
    }

    fn take(&self) -> Option<Program> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn by_name(counters: QueueCounters) -> BTreeMap<&'static str, u64> {
    BTreeMap::from([
        ("redirected", counters.redirected),
        ("passed", counters.passed),
        ("dropped_no_guest", counters.dropped_no_guest),
    ])
}

fn to_python(error: SteeringError) -> PyErr {
    host_error(error.errno(), error.to_string())
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<SteeringProgram>()
}
