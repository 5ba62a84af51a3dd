//! The steps of a case: what a driver, a wire, a kernel and a control plane may do, in any order.

use std::sync::Arc;

use arbitrary::Result;

use super::Case;
use super::model::{Ring, Side};
use crate::fd::EventFd;
use crate::guest_memory::UmemAddr;
use crate::pump::{Command, VringConfig};
use crate::virtqueue::{QueueConfig, start_position};
use crate::xsk::test_kernel::Received;
use crate::xsk::{BindMode, Contiguity, DriverRules};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const MRG_RXBUF: u64 = 1 << 15;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const HASH_REPORT: u64 = 1 << 57;
/// GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6.
const RX_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 54 | 1 << 55;
/// CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO.
const TX_OFFLOADS: u64 = 1 | 7 << 11 | 1 << 56;
/// Lengths around which things change.
const LENGTHS: [u32; 24] = [
    0,
    1,
    9,
    10,
    11,
    12,
    13,
    14,
    20,
    26,
    60,
    64,
    128,
    600,
    1514,
    1524,
    1536,
    1600,
    2012,
    2048,
    3852,
    4096,
    0x8000,
    u32::MAX,
];

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

impl Case<'_> {
    pub(super) fn step(&mut self) -> Result<()> {
        match self.byte()? % 54 {
            0..=11 => self.post(),
            12..=14 => self.post_many(),
            15 => self.spoil_descriptor(),
            16 => self.spoil_index(),
            17 => self.spoil_entry(),
            18..=19 => self.set_wishes(),
            20 => self.poke(),
            21..=27 => {
                self.observe(|pump| pump.work());
                self.check_reads();
                Ok(())
            }
            28 => {
                self.observe(|pump| pump.arm(true));
                self.observe(|pump| pump.arm(false));
                Ok(())
            }
            29..=31 => self.receive(),
            32..=33 => self.receive_stream(),
            34..=35 => self.send(),
            36..=38 => self.complete(),
            39 => {
                self.while_attached(|case| case.world.kernel.drop_in_program());
                Ok(())
            }
            40 => self.wakeups(),
            41 => self.enable(),
            42 => {
                let tx = self.bytes.arbitrary()?;
                self.stop(tx);
                Ok(())
            }
            43..=44 => {
                let tx = self.bytes.arbitrary()?;
                self.start(tx)
            }
            45 => self.inject(),
            46 => {
                self.detach();
                Ok(())
            }
            47 => {
                self.attach();
                Ok(())
            }
            48..=49 => self.migrate(),
            _ => self.ask(),
        }
    }

    pub(super) fn byte(&mut self) -> Result<u8> {
        self.bytes.arbitrary()
    }

    /// One in `n`.
    pub(super) fn rarely(&mut self, n: u8) -> Result<bool> {
        Ok(self.byte()? % n == n - 1)
    }

    /// The driver's limits: copy mode has its own, zero-copy mode one of what NICs have.
    pub(super) fn choose_rules(&mut self) -> Result<()> {
        let frame_max = self.world.plan.frame_max;
        if self.world.plan.mode == BindMode::Copy {
            return Ok(());
        }
        let align = [1, 1, 4, 64][usize::from(self.byte()? % 4)];
        let rules = DriverRules {
            direct: !self.rarely(8)?,
            rx_write_max: frame_max,
            rx_write_align: align,
            rx_buffers_min: 0,
            rx_write_before: [0, 0, 10, 12, 20][usize::from(self.byte()? % 5)],
            tx_frame_max: frame_max,
            tx_frame_min: [0, 14, 60][usize::from(self.byte()? % 3)],
            tx_pieces_max: [1, 2, 8, 18][usize::from(self.byte()? % 4)],
            contiguity: [Contiguity::NotNeeded, Contiguity::WithinBackingPage, Contiguity::WithinBasePage]
                [usize::from(self.byte()? % 3)],
        };
        if let Some(xsk) = &mut self.world.xsk {
            xsk.rules = rules.within_a_chunk();
        }
        Ok(())
    }

    // ---- control plane -----------------------------------------------------------------------------------------

    /// Starts a queue that is stopped: mostly where its rings belong, of a size that fits.
    pub(super) fn start(&mut self, tx: bool) -> Result<()> {
        if self.ring(tx).is_some() {
            return Ok(());
        }
        let plan = self.world.plan;
        let place = u64::from(tx) * plan.queue_bytes;
        let exponent = u32::from(self.byte()?) % (plan.size_max.ilog2() + 1);
        // Three is never a size; more than there is room for would not be where the model looks for it.
        let size = if self.rarely(64)? { self.bytes.arbitrary::<u32>()? | 3 } else { 1u32 << exponent };
        let bits = self.byte()?;
        let flag = |bit: u8, feature: u64| if bits & bit != 0 { feature } else { 0 };
        let features = flag(1, MRG_RXBUF) | flag(2, EVENT_IDX) | flag(4, VERSION_1) | flag(8 & bits >> 1, HASH_REPORT);
        let features = features | if self.rarely(4)? { 0 } else { TX_OFFLOADS | RX_OFFLOADS };
        let entries = u64::from(size.min(plan.size_max));
        let mut ring =
            Ring { size: entries, desc: place, avail: place + 16 * entries, used: 0, event_idx: bits & 2 != 0 };
        ring.used = (ring.avail + 6 + 2 * entries).next_multiple_of(4);
        let wild = self.rarely(32)?;
        if wild {
            self.exact = false;
            ring.desc = self.somewhere()?;
            ring.avail = self.somewhere()?;
            ring.used = self.somewhere()?;
        }
        let side = &self.sides[usize::from(tx)];
        let base = if bits & 0x20 != 0 { self.bytes.arbitrary()? } else { side.base };
        if !wild && bits & 0x20 != 0 {
            // A driver that starts afresh, its indices where it says.
            self.world.write(ring.avail_idx(), &base.to_le_bytes());
            self.world.write(ring.used_idx(), &base.to_le_bytes());
        }
        let config = VringConfig {
            queue: QueueConfig {
                size,
                base: base.into(),
                desc: self.world.user(ring.desc),
                avail: self.world.user(ring.avail),
                used: self.world.user(ring.used),
                event_idx: false,
                packed: false,
            },
            features,
            enabled: bits & 0x40 == 0,
            kick: EventFd::new().expect("an eventfd"),
            call: (bits & 0x80 == 0).then(|| EventFd::new().expect("an eventfd")),
            err: None,
            record: None,
            log: self.world.migration.as_ref().map(|m| m.write_log(&self.world, ring.used)),
        };
        let next_desc = side.next_desc;
        let index_at = |at: u64| if at < plan.total_bytes() { self.world.read_u16(at) } else { 0 };
        let used_idx = index_at(ring.used_idx());
        let position = start_position(base, used_idx, index_at(ring.avail_idx()), size as u16);
        let started = Side { position, used_idx, next_desc, base, ..Side::default() };
        let memory = Arc::clone(self.world.memory());
        let command = Command::Start { tx, memory, config: Box::new(config) };
        self.sides[usize::from(tx)] = Side { ring: Some(ring), ..started };
        let result = self.observe(|pump| pump.execute(command));
        let sound = size.is_power_of_two();
        if result.is_err() {
            assert!(wild || !sound, "a sound queue starts: {result:?}");
            self.sides[usize::from(tx)] = Side { base, next_desc, ..Side::default() };
        } else {
            assert!(wild || sound, "a queue of {size} started");
        }
        Ok(())
    }

    /// Any place for a ring, mostly in the first region.
    fn somewhere(&mut self) -> Result<u64> {
        let place = u64::from(self.bytes.arbitrary::<u16>()?) * 4;
        Ok(if self.rarely(8)? { 1 << 40 | place } else { place % self.world.plan.first_region_bytes() })
    }

    fn enable(&mut self) -> Result<()> {
        let (tx, enabled) = (self.bytes.arbitrary()?, self.bytes.arbitrary()?);
        let runs = self.ring(tx).is_some();
        let result = self.observe(|pump| pump.execute(Command::Enable { tx, enabled }));
        assert_eq!(result.is_ok(), runs, "only a running queue is enabled");
        Ok(())
    }

    fn inject(&mut self) -> Result<()> {
        let len = usize::from(self.bytes.arbitrary::<u16>()? % 4096);
        // Refused without a socket, without room, and for what is no frame.
        let _sent = self.observe(|pump| pump.execute(Command::Inject { frame: vec![0x42; len] }));
        Ok(())
    }

    // ---- driver ------------------------------------------------------------------------------------------------

    fn length(&mut self) -> Result<u32> {
        let choice = self.byte()?;
        Ok(match choice {
            0..=191 => LENGTHS[usize::from(choice) % (LENGTHS.len() - 1)],
            192..=250 => u32::from(self.bytes.arbitrary::<u16>()?),
            _ => LENGTHS[LENGTHS.len() - 1],
        })
    }

    /// A guest-physical address for `len` bytes: mostly in the buffers.
    fn address(&mut self, len: u32) -> Result<u64> {
        let plan = self.world.plan;
        let choice = self.byte()?;
        let fine = u64::from(self.bytes.arbitrary::<u16>()?);
        let edges = plan.edges();
        self.last_address = match choice {
            0..=179 => plan.buffers_at() + fine % 0x5c00,
            // The same memory again, or a neighbour that some completions cannot be told from.
            180..=199 => self.last_address ^ fine & 1,
            200..=229 => edges[usize::from(choice) % 5].saturating_sub(fine % (u64::from(len).min(0x2000) + 2)),
            230..=249 => edges[3] + fine % 0x1c00,
            250..=252 => fine * 4,
            _ => self.bytes.arbitrary()?,
        };
        Ok(self.last_address)
    }

    fn publish(&mut self, ring: &Ring, head: u16) {
        let index = self.world.read_u16(ring.avail_idx());
        self.world.write(ring.avail_entry(index), &head.to_le_bytes());
        self.world.write(ring.avail_idx(), &index.wrapping_add(1).to_le_bytes());
    }

    /// Posts a chain as drivers do, of odd buffers.
    fn post(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        self.post_behind(tx, &ring, &[])
    }

    /// Posts a chain of these buffers, by address and length, and odd ones behind them.
    pub(super) fn post_behind(&mut self, tx: bool, ring: &Ring, front: &[(u64, u32)]) -> Result<()> {
        let indirect = self.rarely(4)?;
        let odd = if self.rarely(16)? { u64::from(self.byte()?) + 1 } else { u64::from(self.byte()? % 4) + 1 };
        let pieces = (front.len() as u64 + odd).min(ring.size) as u16;
        let first = self.sides[usize::from(tx)].next_desc;
        let slot = |index: u16| (u64::from(first.wrapping_add(index)) % ring.size) as u16;
        let table = self.world.plan.tables_at() + u64::from(self.byte()?) * 16;
        let direction = if tx { 0 } else { F_WRITE };
        for index in 0..pieces {
            let (address, len) = match front.get(usize::from(index)) {
                Some(&buffer) => buffer,
                None => {
                    let len = self.length()?;
                    (self.address(len)?, len)
                }
            };
            let more = if index + 1 < pieces { F_NEXT } else { 0 };
            let next = if indirect { index + 1 } else { slot(index + 1) };
            let place = if indirect { table + 16 * u64::from(index) } else { ring.desc + 16 * u64::from(slot(index)) };
            self.world.write(place, &Descriptor { address, len, flags: direction | more, next }.bytes());
        }
        if indirect {
            let len = 16 * u32::from(pieces);
            let own = Descriptor { address: table, len, flags: F_INDIRECT, next: 0 };
            self.world.write(ring.desc + 16 * u64::from(slot(0)), &own.bytes());
        }
        self.sides[usize::from(tx)].next_desc = first.wrapping_add(if indirect { 1 } else { pieces });
        self.publish(ring, slot(0));
        Ok(())
    }

    /// Posts many buffers of one length, as a driver that fills its ring.
    fn post_many(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        let count = u64::from(self.byte()?) * (ring.size / 256).clamp(1, 8);
        let (len, step) = (self.length()?, u64::from(self.bytes.arbitrary::<u16>()? % 4096));
        let start = self.address(len)?;
        let flags = if tx { 0 } else { F_WRITE };
        for i in 0..count.min(ring.size) {
            let head = (u64::from(self.sides[usize::from(tx)].next_desc) % ring.size) as u16;
            let address = start.wrapping_add(i * step % 0x4000);
            let descriptor = Descriptor { address, len, flags, next: 0 };
            self.world.write(ring.desc + 16 * u64::from(head), &descriptor.bytes());
            self.publish(&ring, head);
            let side = &mut self.sides[usize::from(tx)];
            side.next_desc = side.next_desc.wrapping_add(1);
        }
        Ok(())
    }

    /// Any descriptor at any place of the table, or of the indirect tables; also one that the device has.
    fn spoil_descriptor(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        let index = u64::from(self.bytes.arbitrary::<u16>()?);
        let place = if self.rarely(4)? {
            self.world.plan.tables_at() + index % (self.world.plan.tables_bytes / 16) * 16
        } else {
            ring.desc + index % ring.size * 16
        };
        let len = if self.rarely(4)? { 16 * u32::from(self.byte()?) } else { self.length()? };
        let address = if self.rarely(4)? { self.world.plan.tables_at() } else { self.address(len)? };
        let flags = if self.rarely(8)? { self.bytes.arbitrary()? } else { u16::from(self.byte()? % 8) };
        let next = self.bytes.arbitrary::<u16>()? % (2 * ring.size).min(0xffff) as u16;
        self.world.write(place, &Descriptor { address, len, flags, next }.bytes());
        Ok(())
    }

    fn spoil_index(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        let by = if self.rarely(4)? { self.bytes.arbitrary()? } else { i16::from(self.bytes.arbitrary::<i8>()?) };
        let index = self.world.read_u16(ring.avail_idx()).wrapping_add_signed(by);
        self.world.write(ring.avail_idx(), &index.to_le_bytes());
        Ok(())
    }

    fn spoil_entry(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        let index = self.world.read_u16(ring.avail_idx()).wrapping_sub(u16::from(self.byte()?));
        let head = self.bytes.arbitrary::<u16>()?;
        let head = if self.rarely(8)? { head } else { (u64::from(head) % ring.size) as u16 };
        self.world.write(ring.avail_entry(index), &head.to_le_bytes());
        Ok(())
    }

    /// Which calls the driver wants: flags and event index.
    fn set_wishes(&mut self) -> Result<()> {
        let tx = self.bytes.arbitrary()?;
        let Some(ring) = self.ring(tx) else { return Ok(()) };
        let flags = u16::from(self.byte()? % 4);
        let event = self.world.read_u16(ring.used_idx()).wrapping_add(u16::from(self.byte()? % 8)).wrapping_sub(2);
        self.world.write(ring.avail, &flags.to_le_bytes());
        self.world.write(ring.used_event(), &event.to_le_bytes());
        Ok(())
    }

    /// Any bytes anywhere but in used rings, which are the device's.
    fn poke(&mut self) -> Result<()> {
        let at = u64::from(self.bytes.arbitrary::<u32>()?) % self.world.plan.total_bytes();
        let bytes: [u8; 4] = self.bytes.arbitrary()?;
        let rings = [self.ring(false), self.ring(true)];
        if !rings.iter().flatten().any(|ring| (at..at + 4).any(|offset| ring.may_write(offset))) {
            self.world.write(at, &bytes);
        }
        Ok(())
    }

    // ---- wire and kernel ---------------------------------------------------------------------------------------

    fn while_attached(&mut self, act: impl FnOnce(&mut Self)) {
        if self.pump.xsk.is_some() {
            act(self);
            self.check_memory();
        }
    }

    /// Frames arrive. The NIC writes all that its rules let it, which is more than the frame.
    fn receive(&mut self) -> Result<()> {
        let count = if self.rarely(4)? { self.byte()? } else { self.byte()? % 4 + 1 };
        let frame_max = self.world.plan.frame_max;
        let len = if self.rarely(2)? { frame_max } else { u32::from(self.bytes.arbitrary::<u16>()?) % (frame_max + 8) };
        let shift = if self.rarely(8)? { u64::from(self.byte()? & 0x1f) } else { 0 };
        let room = self.world.plan.room;
        let shift = shift.min(u64::from(room.saturating_sub(len)));
        let frame: Vec<u8> = (0..len).map(|i| (i ^ 0x35) as u8).collect();
        self.arrive(&vec![frame; usize::from(count)], shift);
        Ok(())
    }

    /// Frames arrive, those in one piece `shift` bytes further on than computed.
    pub(super) fn arrive(&mut self, frames: &[Vec<u8>], shift: u64) {
        let room = self.world.plan.room as usize;
        self.while_attached(|case| {
            for frame in frames {
                if let Received::At(at) = case.world.kernel.receive(frame, shift)
                    && frame.len() <= room
                {
                    case.write_around(UmemAddr(at.0 - shift), shift + frame.len() as u64);
                }
            }
        });
    }

    fn write_around(&self, start: UmemAddr, len: u64) {
        let Some(rules) = self.pump.xsk.as_ref().map(|xsk| xsk.rules) else { return };
        let memory = self.world.memory();
        let before = u64::from(rules.rx_write_before);
        memory.write(UmemAddr(start.0 - before), &vec![0xee; before as usize]);
        let end = (start.0 + u64::from(rules.rx_write_max)).next_multiple_of(u64::from(rules.rx_write_align));
        memory.write(start.plus(len), &vec![0xee; (end - start.0 - len) as usize]);
    }

    fn send(&mut self) -> Result<()> {
        let budget = if self.rarely(2)? { usize::MAX } else { usize::from(self.byte()?) };
        self.while_attached(|case| {
            case.world.kernel.send(budget);
        });
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        let (count, index) = (self.byte()?, usize::from(self.byte()?));
        self.while_attached(|case| {
            for _ in 0..count {
                let sending = case.world.kernel.sending();
                if sending == 0 {
                    break;
                }
                let frame = case.world.kernel.complete(index % sending);
                let source = frame[6..12].try_into().expect("a frame has an Ethernet header");
                assert!(case.pump.lock.allows(source), "a frame left with the source {source:02x?}");
            }
        });
        Ok(())
    }

    fn wakeups(&mut self) -> Result<()> {
        let (tx, fill) = (self.bytes.arbitrary()?, self.bytes.arbitrary()?);
        self.while_attached(|case| {
            case.world.kernel.ask_for_tx_wakeup(tx);
            case.world.kernel.ask_for_fill_wakeup(fill);
        });
        Ok(())
    }
}
