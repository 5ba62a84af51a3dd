//! `mpassthru._core`: the one seam between Python and Rust.
//!
//! PyO3 only: each file wraps one crate (`engine` → datapath, `steering`, `guest` → testing). What may block
//! goes through `py.detach`; Rust threads never attach to Python.

mod engine;
mod error;
mod guest;
mod steering;

use pyo3::prelude::*;

/// The Rust core of mpassthru; its Python face is described in `_core.pyi`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    engine::register(module)?;
    steering::register(module)?;
    guest::register(module)
}
