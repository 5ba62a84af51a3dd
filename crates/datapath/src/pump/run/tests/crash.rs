use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::{Bench, Command, PollMode, Pump, QUEUE_SIZE, SourceLock};
use crate::fixture::{PACKED_START, memfd, split, was_signalled};
use crate::pump::VringConfig;
use crate::virtqueue::{InflightRecord, record_bytes};
use crate::xsk::test_kernel::TestKernel;

/// A guest whose back-ends end without notice, and the files that outlive them. rx and tx.
struct Machine {
    bench: Bench,
    packed: bool,
    records: [OwnedFd; 2],
    kernel: TestKernel,
    /// Where the queues are started, if they are packed.
    bases: [u32; 2],
}

impl Machine {
    fn new(packed: bool) -> Self {
        let mut bench = if packed { Bench::packed(PollMode::Interrupt) } else { Bench::new(PollMode::Interrupt) };
        let kernel = bench.attach();
        let records = [(); 2].map(|()| memfd("record", record_bytes(u32::from(QUEUE_SIZE), packed)));
        let mut machine = Self { bench, packed, records, kernel, bases: [PACKED_START; 2] };
        assert_eq!(machine.start(), [0, 0]);
        machine
    }

    /// Starts both queues; how many heads of each were in flight.
    fn start(&mut self) -> [u64; 2] {
        [false, true].map(|tx| {
            let file = self.records[usize::from(tx)].as_raw_fd();
            let record = InflightRecord::map(file, 0, u32::from(QUEUE_SIZE), self.packed).unwrap();
            let mut config = VringConfig { record: Some(record), ..self.bench.vring(tx) };
            // As QEMU after a crash: the used index of a split ring; for a packed one where it was started the last time.
            config.queue.base = match self.packed {
                false => u32::from(split(&self.bench.drivers[usize::from(tx)]).used_idx()),
                true => self.bases[usize::from(tx)],
            };
            let memory = self.bench.guest.memory.clone();
            self.bench.pump.execute(Command::Start { tx, memory, config: Box::new(config) }).unwrap()
        })
    }

    /// The process ends here, and the kernel closes its socket; another takes its place.
    fn crash(&mut self) -> [u64; 2] {
        let (commands, events, view) =
            (self.bench.commands.clone(), self.bench.events.clone(), self.bench.pump.view.clone());
        self.bench.pump = Pump::new(0, PollMode::Interrupt, SourceLock::open(), commands, events, view);
        self.kernel = self.bench.attach();
        self.start()
    }

    /// Stops a queue; where in its ring, if it is one of [`QUEUE_SIZE`] that has not gone round.
    fn stop(&mut self, tx: bool) -> u32 {
        let base = self.bench.stop(tx) as u32;
        self.bases[usize::from(tx)] = base;
        if self.packed { base & 0x7fff } else { base }
    }

    fn outstanding(&self) -> [u16; 2] {
        [self.bench.drivers[0].outstanding(), self.bench.drivers[1].outstanding()]
    }
}

#[test]
fn test_frames_whose_completions_overtook_others_are_sent_once_more_by_the_next_process() {
    for packed in [false, true] {
        let mut machine = Machine::new(packed);
        machine.bench.post(true, 6, 72);
        machine.bench.pump.work();
        assert_eq!(machine.kernel.send(6), 6);
        for index in [4, 2, 1] {
            machine.kernel.complete(index);
        }
        machine.bench.pump.work();
        assert_eq!(machine.bench.take(true), 3);

        assert_eq!(machine.crash(), [0, 3]);
        machine.bench.pump.work();
        assert_eq!(machine.kernel.send(6), 3, "heads 0, 3 and 5, and no other");
        (0..3).for_each(|_| drop(machine.kernel.complete(0)));
        machine.bench.pump.work();
        assert_eq!((machine.bench.take(true), machine.outstanding()), (3, [0, 0]));
    }
}

#[test]
fn test_posted_buffers_are_posted_again_whatever_was_received_in_between() {
    for packed in [false, true] {
        let mut machine = Machine::new(packed);
        machine.bench.post(false, 2, 1000); // these wait for a slab frame
        machine.bench.post(false, 5, 1600);
        machine.bench.pump.work();
        machine.kernel.drop_in_program();
        machine.kernel.drop_in_program();
        machine.kernel.receive(&[1; 60], 0);
        machine.bench.pump.work();
        assert_eq!(machine.bench.take(false), 1);

        assert_eq!(machine.crash()[0], 6);
        machine.bench.pump.work();
        for _ in 0..5 {
            machine.kernel.receive(&[2; 60], 0);
            machine.bench.pump.work();
        }
        assert_eq!(machine.bench.take(false), 5);
        machine.bench.pump.execute(Command::Detach).unwrap();
        // One short buffer is left, too little for the longest frame.
        machine.stop(false);
    }
}

#[test]
fn test_a_queue_that_is_stopped_after_a_crash_gives_every_buffer_back() {
    for packed in [false, true] {
        let mut machine = Machine::new(packed);
        machine.bench.post(true, 4, 72);
        machine.bench.post(false, 4, 1600);
        machine.bench.pump.work();
        machine.kernel.send(4);
        machine.kernel.complete(2);
        machine.bench.pump.work();
        assert_eq!(machine.bench.take(true), 1);

        assert_eq!(machine.crash(), [4, 3]);
        machine.bench.pump.execute(Command::Detach).unwrap();
        assert_eq!(machine.stop(false), 0);
        assert_eq!(machine.stop(true), 4);
        assert_eq!(machine.outstanding(), [4, 0]);
        assert_eq!(machine.start(), [0, 0], "nothing is in flight after an orderly stop");
    }
}

#[test]
fn test_heads_that_nobody_took_again_before_the_stop_are_given_back_too() {
    for packed in [false, true] {
        let mut machine = Machine::new(packed);
        machine.bench.post(true, 3, 72);
        machine.bench.pump.work();
        machine.kernel.send(3);
        machine.kernel.complete(1);
        machine.bench.pump.work();
        assert_eq!(machine.bench.take(true), 1);

        let (commands, events) = (machine.bench.commands.clone(), machine.bench.events.clone());
        machine.bench.pump = Pump::new(0, PollMode::Interrupt, SourceLock::open(), commands, events, Arc::default());
        assert_eq!(machine.start()[1], 2, "without a socket nothing is taken");
        assert_eq!(machine.stop(true), 2, "the last one stays in the ring");
        assert_eq!(machine.outstanding(), [0, 1]);
        machine.stop(false);
        assert_eq!(machine.start(), [0, 0], "what is in the ring is not in flight");
    }
}

#[test]
fn test_a_driver_that_missed_its_call_is_called_by_the_next_process() {
    for packed in [false, true] {
        let mut machine = Machine::new(packed);
        machine.crash();
        for vring in [&machine.bench.pump.rx.as_ref().unwrap().vring, &machine.bench.pump.tx.as_ref().unwrap().vring] {
            assert!(was_signalled(vring.call.as_ref().unwrap()));
        }
    }
}
