//! The far end of a veth pair, where a test would need a switch and another machine.
//!
//! - [`FrameGenerator`]: one frame, millions of times a second, sent by the kernel itself;
//! - [`PacketWire`]: patterned frames both ways through AF_PACKET, each one checked and accounted for;
//! - [`XdpSink`]: counts what arrives and drops it at once.
//!
//! All of them work in the network namespace that the calling thread is in when they are made, and stay there:
//! sockets and links belong to it, and threads are started at once and inherit it.

mod bpf;
mod generator;
mod packet;
mod worker;
mod xdp_sink;

pub use generator::{FrameGenerator, GeneratorJob};
pub use packet::{PacketWire, PacketWireConfig, SendJob, WireCounters};
pub use xdp_sink::{XdpMode, XdpSink};
