//! How fast the built-in guest is when its device costs next to nothing: an upper bound for every bench that uses it.
//!
//! `cargo run --release -p mpassthru-testing --example guest_rate`
//!
//! The device, on a thread of its own, uses every available buffer at once: tx frames vanish, rx buffers come back
//! with 60 bytes of a frame that is never written. Prints frames per second for each role.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use mpassthru_testing::driver::RingLayout;
use mpassthru_testing::guest::{BufferLayout, Counters, Guest, GuestConfig, Payload, RxRole, SourceConfig, features};
use mpassthru_testing::memory::{GuestMemory, GuestPhysAddr, RegionConfig};
use mpassthru_testing::pattern::{Mac, Stream};
use mpassthru_testing::{Error, Result};

const FRAME_BYTES: usize = 60;
const HEADER_BYTES: usize = 12;
const MEASURE: Duration = Duration::from_secs(1);
const MAC: Mac = [2, 0, 0, 0, 0, 1];

/// Uses whatever is available, with a fixed length.
struct Device {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    used_bytes: u32,
    index: u16,
}

impl Device {
    fn read_u16(&self, address: GuestPhysAddr) -> Result<u16> {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn turn(&mut self) -> Result<()> {
        let avail_idx = self.read_u16(self.layout.avail.plus(2))?;
        // Acquire: entries after the index. Pairs with the driver's Release store of avail.idx.
        fence(Ordering::Acquire);
        if avail_idx == self.index {
            std::hint::spin_loop();
            return Ok(());
        }
        while self.index != avail_idx {
            let slot = u64::from(self.index % self.layout.size);
            let head = self.read_u16(self.layout.avail.plus(4 + 2 * slot))?;
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
            entry[4..].copy_from_slice(&self.used_bytes.to_le_bytes());
            self.memory.write(self.layout.used.plus(4 + 8 * slot), &entry)?;
            self.index = self.index.wrapping_add(1);
        }
        // Release: entries before the index. Pairs with the driver's Acquire load of used.idx.
        fence(Ordering::Release);
        self.memory.write(self.layout.used.plus(2), &self.index.to_le_bytes())
    }
}

fn guest() -> Result<Guest> {
    Guest::new(GuestConfig {
        regions: vec![RegionConfig::memfd(0, 16 << 20)],
        ring_region: 0,
        queue_pairs: 1,
        queue_size: 256,
        features: features::VIRTIO_F_VERSION_1 | features::VIRTIO_F_EVENT_IDX,
        rx: BufferLayout::default(),
        tx: BufferLayout::default(),
        polling: true,
        canaries: false,
        capture_frames: 0,
    })
}

/// Runs one role for a while; returns frames per second as `count` counts them.
fn measure(role: RxRole, payload: Option<Payload>, count: fn(&Counters) -> u64) -> Result<f64> {
    let guest = guest()?;
    // Headers say "one buffer"; the frames are whatever is in there.
    for chain in 0..256u16 {
        let address = guest.ring(0)?.descriptor(chain).address;
        guest.memory().write(GuestPhysAddr(address + 10), &[1])?;
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let device = |index: usize, used_bytes: u32| -> Result<Device> {
            let layout = *guest.ring(index)?.layout();
            Ok(Device { memory: Arc::clone(guest.memory()), layout, used_bytes, index: 0 })
        };
        let mut rx = device(0, (HEADER_BYTES + FRAME_BYTES) as u32)?;
        let mut tx = device(1, 0)?;
        let stop = &stop;
        let is_source = payload.is_some();
        let serving = scope.spawn(move || -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                if is_source { tx.turn()? } else { rx.turn()? }
            }
            Ok(())
        });
        guest.start(0, role, payload.map(SourceConfig::new), true)?;
        let started = Instant::now();
        std::thread::sleep(MEASURE);
        let frames = count(&guest.counters(0)?);
        let rate = frames as f64 / started.elapsed().as_secs_f64();
        guest.park()?;
        stop.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| Error::Config("the device panicked".to_string()))??;
        let violations = guest.violations(0)?;
        assert_eq!(violations, mpassthru_testing::guest::Violations::default());
        Ok(rate)
    })
}

fn main() -> Result<()> {
    let stream = |size| Stream { seed: 1, destination: MAC, source: MAC, sizes: vec![size] };
    let tx: fn(&Counters) -> u64 = |counters| counters.tx_frames;
    let rx: fn(&Counters) -> u64 = |counters| counters.rx_frames;
    let runs = [
        ("sink", RxRole::Sink, None, rx),
        ("check, 60 bytes, all foreign", RxRole::Check, None, rx),
        ("source, fixed, 60 bytes", RxRole::Idle, Some(Payload::Fixed(vec![vec![0; 60]])), tx),
        ("source, fixed, 1514 bytes", RxRole::Idle, Some(Payload::Fixed(vec![vec![0; 1514]])), tx),
        ("source, pattern, 60 bytes", RxRole::Idle, Some(Payload::Pattern(stream(60))), tx),
        ("source, pattern, 1514 bytes", RxRole::Idle, Some(Payload::Pattern(stream(1514))), tx),
    ];
    for (name, role, payload, count) in runs {
        println!("{name:30} {:7.2} Mframes/s", measure(role, payload, count)? / 1e6);
    }
    Ok(())
}
