//! `SteeringProgram`: the broker's handle on the XDP program of one interface (`crates/steering`).

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use mpassthru_steering::{MacAddress, QueueCounters, Steer, SteeringError, SteeringProgram as Program, XdpMode};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::host_error;

/// The XDP program of one interface; `None` once closed.
#[pyclass(frozen, module = "mpassthru._core")]
struct SteeringProgram {
    program: Mutex<Option<Program>>,
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

    #[pyo3(
        signature = (queue_id, *, steer, mac = Vec::new(), broadcast = true, multicast = true),
        text_signature = "($self, queue_id, *, steer, mac=b'', broadcast=True, multicast=True)"
    )]
    fn steer_queue(
        &self,
        py: Python<'_>,
        queue_id: u32,
        steer: &str,
        mac: Vec<u8>,
        broadcast: bool,
        multicast: bool,
    ) -> PyResult<()> {
        let steer = match steer {
            "passthru" => Steer::Passthru,
            "mac" => Steer::Mac { mac: station_address(&mac)?, broadcast, multicast },
            _ => {
                return Err(PyValueError::new_err(format!("steer is passthru or mac, not {steer:?}")));
            }
        };
        self.with_program(py, |program| program.steer_queue(queue_id, steer))
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

fn station_address(mac: &[u8]) -> PyResult<MacAddress> {
    let address: MacAddress =
        mac.try_into().map_err(|_| PyValueError::new_err(format!("mac has 6 bytes, not {}", mac.len())))?;
    if address[0] & 1 == 1 {
        return Err(PyValueError::new_err("mac is a group address; a guest's is not"));
    }
    Ok(address)
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
