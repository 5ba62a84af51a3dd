//! A frame source without a NIC: BPF_PROG_TEST_RUN in live-frame mode runs a program that says XDP_TX, so the kernel
//! itself sends the frame, again and again, at millions a second.
//!
//! On veth the frames leave through ndo_xdp_xmit, so the other end must run a native XDP program (a generic one is not
//! enough) or have GRO on, else the kernel throws them away. What the other end's ring cannot hold is thrown away too: count arrivals there.

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bpf::{self, Instruction, XDP_TX};
use super::worker::{Pace, Signals, Worker};
use crate::error::{Error, Result};

/// Frames in the first system call.
const RUN_START: u64 = 65_536;
/// How long each is to take: the kernel waits some 25 ms at the end of one, and a stop is noticed only then.
const RUN_GOAL: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_millis(200);
/// An argument of the call has 32 bits.
const RUN_MAX: u64 = 1 << 31;
/// What the kernel's test run takes: a page less headroom and skb_shared_info.
const FRAME_MIN_BYTES: usize = 14;
const FRAME_MAX_BYTES: usize = 3_520;

/// What to send.
#[derive(Clone, Debug, Default)]
pub struct GeneratorJob {
    /// Exactly this many frames; `None` for no such end.
    pub count: Option<u64>,
    /// For this long; `None` for no such end.
    pub duration: Option<Duration>,
    /// At most this many frames a second.
    pub rate_frames_per_s: Option<f64>,
}

/// Sends copies of one frame out of one interface.
#[derive(Debug)]
pub struct FrameGenerator {
    worker: Worker<GeneratorJob>,
    sent: Arc<AtomicU64>,
}

impl FrameGenerator {
    /// Prepares to send `frame` out of an interface of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::System`]: EPERM without CAP_NET_ADMIN and CAP_BPF; [`Error::Config`] for frames of impossible length.
    pub fn new(ifindex: u32, frame: Vec<u8>) -> Result<Self> {
        if !(FRAME_MIN_BYTES..=FRAME_MAX_BYTES).contains(&frame.len()) {
            return Err(Error::config(format!(
                "cannot generate frames of {} bytes: {FRAME_MIN_BYTES} to {FRAME_MAX_BYTES} are possible",
                frame.len()
            )));
        }
        let program = bpf::load_xdp("mpt_generate", &[Instruction::move_immediate(0, XDP_TX), Instruction::EXIT])?;
        let sent = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&sent);
        let work = move |job, signals: &Signals| generate(&program, ifindex, &frame, &job, signals, &shared);
        Ok(Self { worker: Worker::spawn("frame-generator", work)?, sent })
    }

    /// Starts sending.
    ///
    /// # Errors
    /// [`Error::Config`] if it is sending already.
    pub fn start(&self, job: GeneratorJob) -> Result<()> {
        self.worker.start(job)
    }

    /// Ends the job early; [`is_active`](Self::is_active) says when it has ended.
    pub fn stop(&self) {
        self.worker.stop();
    }

    /// Whether it is sending.
    ///
    /// # Errors
    /// What the job failed with, once.
    pub fn is_active(&self) -> Result<bool> {
        let is_active = self.worker.is_active();
        self.worker.check()?;
        Ok(is_active)
    }

    /// Frames the kernel was made to send, in all jobs.
    #[must_use]
    pub fn sent(&self) -> u64 {
        // Relaxed: a counter; exact once `is_active` said that the job has ended.
        self.sent.load(Ordering::Relaxed)
    }
}

fn generate(
    program: &OwnedFd,
    ifindex: u32,
    frame: &[u8],
    job: &GeneratorJob,
    signals: &Signals,
    total: &AtomicU64,
) -> Result<()> {
    let pace = Pace::new(job.rate_frames_per_s)?;
    let count = job.count.unwrap_or(u64::MAX);
    let (mut sent, mut run_max) = (0, RUN_START);
    while sent < count && !signals.must_stop() && job.duration.is_none_or(|limit| pace.elapsed() < limit) {
        let run = pace.wait(sent, run_max.min(count - sent), signals)?;
        if run > 0 {
            let began = Instant::now();
            bpf::run_live(program, ifindex, frame, run as u32)?;
            if began.elapsed() > *RUN_GOAL.end() {
                run_max = (run_max / 2).max(1);
            } else if run == run_max && began.elapsed() < *RUN_GOAL.start() {
                run_max = (run_max * 2).min(RUN_MAX);
            }
            sent += run;
            total.fetch_add(run, Ordering::Relaxed);
        }
    }
    Ok(())
}
