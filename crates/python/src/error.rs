//! The one error map from Rust to Python: every exception of ours is made here.

use pyo3::prelude::*;

mod python {
    pyo3::import_exception!(mpassthru.errors, HostError);
}

/// `mpassthru.errors.HostError`: a system call failed. `message` is the whole line, with its advice.
pub(crate) fn host_error(errno: i32, message: String) -> PyErr {
    python::HostError::new_err((errno, message))
}
