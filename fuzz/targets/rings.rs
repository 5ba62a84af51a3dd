//! Descriptor rings through the pump over the model kernel; with FUZZ_RACING set, while a second thread writes to them.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mpassthru_datapath::fuzzing::{racing_ring_case, ring_case};

static RACING: LazyLock<bool> = LazyLock::new(|| std::env::var_os("FUZZ_RACING").is_some());

fuzz_target!(|bytes: &[u8]| if *RACING { racing_ring_case(bytes) } else { ring_case(bytes) });
