//! tx against a model kernel and a driver that trusts nobody.

mod bench;
mod bursts;
mod completions;
mod offload;
mod source_lock;
mod verdicts;
mod wakeups;
