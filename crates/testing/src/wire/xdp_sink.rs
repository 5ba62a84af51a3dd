//! Counts every frame that an interface receives, and drops it before the network stack sees it.

use std::os::fd::OwnedFd;

use super::bpf::{self, Instruction, XDP_DROP};
use crate::error::Result;

/// Where the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver (XDP_FLAGS_DRV_MODE).
    Native,
    /// In the network stack, on any interface (XDP_FLAGS_SKB_MODE).
    Generic,
}

impl XdpMode {
    fn flags(self) -> u32 {
        match self {
            Self::Generic => 1 << 1,
            Self::Native => 1 << 2,
        }
    }
}

/// The sink of one interface; detached when dropped. Counts are exact.
#[derive(Debug)]
pub struct XdpSink {
    _link: OwnedFd,
    counters: OwnedFd,
}

impl XdpSink {
    /// Attaches to an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`crate::Error::System`]: EBUSY if an XDP program is there, EPERM without CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
    pub fn attach(ifindex: u32, mode: XdpMode) -> Result<Self> {
        let counters = bpf::create_counters::<2>()?;
        let (context, length, data, values, one) = (1, 2, 3, 4, 5);
        let mut program = vec![
            Instruction::load_u32(length, context, 4),
            Instruction::load_u32(data, context, 0),
            Instruction::subtract(length, data),
        ];
        program.extend(Instruction::load_map_value(values, &counters));
        program.extend([
            Instruction::move_immediate(one, 1),
            Instruction::atomic_add_u64(values, 0, one),
            Instruction::atomic_add_u64(values, 8, length),
            Instruction::move_immediate(0, XDP_DROP),
            Instruction::EXIT,
        ]);
        let program = bpf::load_xdp("mpt_sink", &program)?;
        Ok(Self { _link: bpf::attach_xdp(&program, ifindex, mode.flags())?, counters })
    }

    /// Frames and bytes counted so far.
    ///
    /// # Errors
    /// [`crate::Error::System`] if the kernel refuses to read the map.
    pub fn counters(&self) -> Result<(u64, u64)> {
        let [frames, bytes] = bpf::read_counters(&self.counters)?;
        Ok((frames, bytes))
    }
}
