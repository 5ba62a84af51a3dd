//! rx against a model kernel and a driver that trusts nobody.

mod bench;
mod bursts;
mod disabled;
mod fit;
mod log;
mod merging;
mod reserve;
mod waiting;
