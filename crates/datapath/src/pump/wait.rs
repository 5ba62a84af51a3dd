//! Waiting for work: how long to poll before sleeping, and the sleep itself.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// How a pump waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollMode {
    /// Never sleeps: lowest latency, one core per queue pair.
    Busy,
    /// Polls for a while that has lately been worth it, then sleeps.
    Adaptive,
    /// Sleeps as soon as there is nothing to do.
    Interrupt,
}

/// Longest time that an adaptive pump polls in vain.
const SPIN_MAX: Duration = Duration::from_micros(50);
/// Shortest, so that it can find out that polling pays again.
const SPIN_MIN: Duration = Duration::from_micros(2);

/// Decides between polling on and sleeping.
#[derive(Debug)]
pub struct Spin {
    mode: PollMode,
    budget: Duration,
    idle_since: Option<Instant>,
}

impl Spin {
    /// Polls little at first.
    pub fn new(mode: PollMode) -> Self {
        Self { mode, budget: SPIN_MIN, idle_since: None }
    }

    /// There was work: if it came while polling, polling pays.
    #[inline]
    pub fn worked(&mut self) {
        if self.idle_since.take().is_some() {
            self.budget = (self.budget * 2).min(SPIN_MAX);
        }
    }

    /// There was none; whether to look again rather than sleep.
    #[inline]
    pub fn look_again(&mut self) -> bool {
        match self.mode {
            PollMode::Busy => true,
            PollMode::Interrupt => false,
            PollMode::Adaptive => {
                let now = Instant::now();
                let since = *self.idle_since.get_or_insert(now);
                now.duration_since(since) < self.budget
            }
        }
    }

    /// The pump slept: polling did not pay this time.
    pub fn slept(&mut self) {
        self.idle_since = None;
        self.budget = (self.budget / 2).max(SPIN_MIN);
    }
}

/// Sleeps until one of `fds` is readable (absent ones are -1), or for `timeout`. Returns which are readable.
pub fn sleep<const N: usize>(fds: [RawFd; N], timeout: Option<Duration>) -> [bool; N] {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let timespec =
        timeout.map(|t| libc::timespec { tv_sec: t.as_secs() as libc::time_t, tv_nsec: t.subsec_nanos().into() });
    let timespec = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `polled` is N valid entries and `timespec` is null or valid for the call.
    let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), N as libc::nfds_t, timespec, std::ptr::null()) };
    // A signal ends the sleep like a wake-up without a cause; the caller looks at everything anyway.
    if ready > 0 { polled.map(|p| p.revents & libc::POLLIN != 0) } else { [false; N] }
}

#[cfg(test)]
mod tests;
