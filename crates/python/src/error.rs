//! The one error map from Rust to Python: every exception of ours is made here.

use mpassthru_datapath::error as datapath;
use pyo3::prelude::*;

mod python {
    pyo3::import_exception!(mpassthru.errors, HostError);
    pyo3::import_exception!(mpassthru.errors, QueueFault);
    pyo3::import_exception!(mpassthru.errors, RefusedError);
}

/// `mpassthru.errors.HostError`: a system call failed. `message` is the whole line, with its advice.
pub(crate) fn host_error(errno: i32, message: String) -> PyErr {
    python::HostError::new_err((errno, message))
}

/// The datapath's host error, errno kept.
pub(crate) fn host_error_of(error: &datapath::HostError) -> PyErr {
    host_error(error.errno, error.to_string())
}

/// `mpassthru.errors.QueueFault`.
pub(crate) fn fault_error(fault: &datapath::QueueFault) -> PyErr {
    python::QueueFault::new_err(fault.to_string())
}

/// Any error of the datapath, as its kind.
pub(crate) fn datapath_error(error: datapath::Error) -> PyErr {
    match error {
        datapath::Error::Host(error) => host_error_of(&error),
        datapath::Error::Fault(fault) => fault_error(&fault),
        datapath::Error::Refused(message) => python::RefusedError::new_err(message),
    }
}
