//! A thread that waits for jobs, does one at a time, and can be told to stop in the middle of one.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::eventfd::{EventFd, wait_readable};

/// What the thread and its owner share.
#[derive(Debug)]
pub(super) struct Signals {
    stop: AtomicBool,
    wake: EventFd,
    is_active: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Signals {
    /// Whether the current job is to end.
    pub fn must_stop(&self) -> bool {
        // Relaxed: a hint looked at again and again. Pairs with `Worker::stop`.
        self.stop.load(Ordering::Relaxed)
    }

    /// Sleeps for `limit`, less if told to stop meanwhile.
    pub fn sleep(&self, limit: Duration) -> Result<()> {
        wait_readable(&[self.wake.as_fd()], Some(limit))?;
        let _ = self.wake.take();
        Ok(())
    }

    /// Readable once told to stop.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}

/// A thread for jobs of one kind. Ends its job and its thread when dropped.
#[derive(Debug)]
pub(super) struct Worker<Job> {
    jobs: Option<mpsc::Sender<Job>>,
    signals: Arc<Signals>,
    thread: Option<JoinHandle<()>>,
}

impl<Job: Send + 'static> Worker<Job> {
    /// Starts the thread, in the network namespace of the calling one, with every signal blocked.
    pub fn spawn(name: &str, mut work: impl FnMut(Job, &Signals) -> Result<()> + Send + 'static) -> Result<Self> {
        let signals = Arc::new(Signals {
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
            is_active: AtomicBool::new(false),
            error: Mutex::default(),
        });
        let (jobs, inbox) = mpsc::channel();
        let shared = Arc::clone(&signals);
        let serve = move || {
            block_signals();
            for job in inbox {
                if let Err(error) = work(job, &shared) {
                    *shared.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
                // Release: what the job did is visible to whoever sees it ended. Pairs with `is_active`.
                shared.is_active.store(false, Ordering::Release);
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.to_string())
            .spawn(serve)
            .map_err(|error| Error::os(format!("start thread {name}"), error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
        Ok(Self { jobs: Some(jobs), signals, thread: Some(thread) })
    }

    /// Hands a job over.
    pub fn start(&self, job: Job) -> Result<()> {
        // AcqRel: see `is_active`; one job at a time.
        if self.signals.is_active.swap(true, Ordering::AcqRel) {
            return Err(Error::config("the last job is still running: wait for it or stop it"));
        }
        self.signals.stop.store(false, Ordering::Relaxed);
        let _ = self.signals.wake.take();
        let dead = || Error::config("the thread panicked");
        self.jobs.as_ref().ok_or_else(dead)?.send(job).map_err(|_| dead())
    }

    /// Tells the current job to end; `is_active` says when it has.
    pub fn stop(&self) {
        self.signals.stop.store(true, Ordering::Relaxed);
        self.signals.wake.signal();
    }

    /// Whether a job is running.
    pub fn is_active(&self) -> bool {
        // Acquire: pairs with the Release store at a job's end.
        self.signals.is_active.load(Ordering::Acquire)
    }

    /// Fails, once, with what the last job failed with.
    pub fn check(&self) -> Result<()> {
        match self.signals.error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

impl<Job> Drop for Worker<Job> {
    fn drop(&mut self) {
        self.jobs = None;
        self.signals.stop.store(true, Ordering::Relaxed);
        self.signals.wake.signal();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by its thread; there is nobody to tell here.
            let _ = thread.join();
        }
    }
}

/// A signal would end BPF_PROG_TEST_RUN early with an unknown number of frames sent; they are the main thread's.
fn block_signals() {
    // SAFETY: the set is initialized by sigfillset before use; only this thread's mask changes.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}

/// Lets a given number of frames a second pass.
#[derive(Debug)]
pub(super) struct Pace {
    rate_frames_per_s: Option<f64>,
    started: std::time::Instant,
}

impl Pace {
    pub fn new(rate_frames_per_s: Option<f64>) -> Result<Self> {
        if rate_frames_per_s.is_some_and(|rate| !(rate > 0.0 && rate.is_finite())) {
            return Err(Error::config("a rate must be above zero"));
        }
        Ok(Self { rate_frames_per_s, started: std::time::Instant::now() })
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// How many of `most` frames are due after `sent`; sleeps a millisecond or less if none is.
    pub fn wait(&self, sent: u64, most: u64, signals: &Signals) -> Result<u64> {
        let Some(rate) = self.rate_frames_per_s else { return Ok(most) };
        let due = (rate * self.elapsed().as_secs_f64()) as u64 + 1;
        if due > sent {
            return Ok(most.min(due - sent));
        }
        signals.sleep(Duration::from_secs_f64((1.0 / rate).min(0.001)))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::Instant;

    fn wait_idle(worker: &Worker<u64>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while worker.is_active() {
            assert!(Instant::now() < deadline, "the job did not end");
            std::thread::yield_now();
        }
    }

    #[test]
    fn test_jobs_run_one_at_a_time_and_end_when_told() {
        let sum = Arc::new(AtomicU64::new(0));
        let shared = Arc::clone(&sum);
        let worker = Worker::spawn("test", move |job: u64, signals: &Signals| {
            while job == 0 && !signals.must_stop() {
                signals.sleep(Duration::from_secs(10))?;
            }
            shared.fetch_add(job + 1, Ordering::Relaxed);
            if job == 7 { Err(Error::config("seven")) } else { Ok(()) }
        })
        .unwrap();
        worker.start(0).unwrap();
        assert!(worker.start(1).is_err(), "one at a time");
        worker.stop();
        wait_idle(&worker);
        worker.start(7).unwrap();
        wait_idle(&worker);
        assert_eq!(sum.load(Ordering::Relaxed), 1 + 8);
        assert_eq!(worker.check().unwrap_err().to_string(), "seven");
        assert!(worker.check().is_ok(), "told once");
    }

    #[test]
    fn test_drop_ends_a_running_job() {
        let worker = Worker::spawn("test", |_: u64, signals: &Signals| {
            while !signals.must_stop() {
                signals.sleep(Duration::from_secs(10))?;
            }
            Ok(())
        })
        .unwrap();
        worker.start(0).unwrap();
        drop(worker);
    }
}
