//! The kernel's side of an AF_XDP socket, for tests of the pump: the four rings in a memfd, and what
//! `net/xdp/xsk.c` and `xsk_buff_pool.c` do with them in copy mode (kernel-facts, sections 3 and 6).
//!
//! It trusts nobody: a fill entry or tx descriptor that the real one would refuse ends the test, for there it would
//! vanish. A datagram socket stands in for the socket's descriptor, so that wake-ups are real system calls: each is a
//! message to [`TestKernel`].

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::socket::Rings;
use super::{
    BindMode, CHUNK_BYTES, COMPLETION_RING_DESCS, DriverRules, OFFSET_SHIFT, RX_RING_DESCS, TX_RING_DESCS, UmemLayout,
    XskSocket,
};
use crate::fixture::memfd;
use crate::guest_memory::{GuestMemory, UmemAddr};

/// As in Linux 6.18.
const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset { producer: 0, consumer: 64, desc: 320, flags: 256 };
/// MAX_SKB_FRAGS + 1.
const PIECES_MAX: usize = 18;

/// What became of a frame from the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// It is in the rx ring, and its first piece starts here.
    At(UmemAddr),
    /// No fill entry.
    NoBuffer,
    /// Longer than the UMEM's frames.
    Oversize,
    /// No room in the rx ring; its buffer is used for the next frame.
    RingFull,
}

/// A packet between the tx ring and the completion ring.
#[derive(Debug)]
struct Packet {
    pieces: Vec<(u64, u32)>,
}

/// The kernel, as one socket sees it.
#[derive(Debug)]
pub(crate) struct TestKernel {
    memory: Arc<GuestMemory>,
    layout: UmemLayout,
    /// Longest frame, in several pieces where it is longer than those of the layout (XDP_USE_SG).
    frame_max: u32,
    mode: BindMode,
    fill: Consumer<u64>,
    completion: Producer<u64>,
    rx: Producer<libc::xdp_desc>,
    tx: Consumer<libc::xdp_desc>,
    /// Fill entries whose frame was dropped or passed: used again before new ones, the last one first.
    free_list: Vec<u64>,
    sending: VecDeque<Packet>,
    wakeups: UnixDatagram,
    /// The socket's own descriptor, to make it readable or not.
    socket: UnixDatagram,
}

impl TestKernel {
    /// A kernel and a socket bound to it, with the rules of copy mode.
    pub fn bind(memory: &Arc<GuestMemory>, layout: UmemLayout, mode: BindMode) -> (Self, XskSocket) {
        Self::bind_for(layout.frame_max, memory, layout, mode)
    }

    /// As [`bind`](Self::bind), for frames of up to `frame_max` bytes.
    pub fn bind_for(
        frame_max: u32,
        memory: &Arc<GuestMemory>,
        layout: UmemLayout,
        mode: BindMode,
    ) -> (Self, XskSocket) {
        // A file as large as the highest of the rings' offsets; sparse.
        let rings = memfd("test-kernel-rings", libc::XDP_UMEM_PGOFF_COMPLETION_RING + (1 << 20));
        let fd = rings.as_raw_fd();
        let (wakeups, socket) = UnixDatagram::pair().unwrap();
        wakeups.set_nonblocking(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        let kernel = Self {
            memory: Arc::clone(memory),
            layout,
            frame_max,
            mode,
            fill: Consumer::map(fd, &OFFSETS, libc::XDP_UMEM_PGOFF_FILL_RING, RX_RING_DESCS).unwrap(),
            completion: Producer::map(fd, &OFFSETS, libc::XDP_UMEM_PGOFF_COMPLETION_RING, COMPLETION_RING_DESCS)
                .unwrap(),
            rx: Producer::map(fd, &OFFSETS, libc::XDP_PGOFF_RX_RING as u64, RX_RING_DESCS).unwrap(),
            tx: Consumer::map(fd, &OFFSETS, libc::XDP_PGOFF_TX_RING as u64, TX_RING_DESCS).unwrap(),
            free_list: Vec::new(),
            sending: VecDeque::new(),
            wakeups,
            socket: socket.try_clone().unwrap(),
        };
        let offsets = libc::xdp_mmap_offsets { rx: OFFSETS, tx: OFFSETS, fr: OFFSETS, cr: OFFSETS };
        let rules = DriverRules { tx_frame_max: frame_max, ..DriverRules::copy_mode(layout.frame_max, PIECES_MAX) };
        let mut socket = XskSocket::over(
            Rings::map(fd, &offsets, RX_RING_DESCS).unwrap(),
            socket.into(),
            mode,
            layout,
            rules,
            memory.end(),
        );
        socket.frame_max = frame_max;
        (kernel, socket)
    }

    /// A fill entry for a frame: one that was freed, else the next of the fill ring.
    fn allocate(&mut self) -> Option<u64> {
        if let Some(entry) = self.free_list.pop() {
            return Some(entry);
        }
        (self.fill.peek() > 0).then(|| {
            let entry = self.fill.read();
            self.fill.release();
            assert!(
                entry.checked_add(CHUNK_BYTES).is_some_and(|end| end <= self.memory.len_bytes()),
                "fill entry {entry:#x} would vanish without a trace"
            );
            entry
        })
    }

    /// Number of buffers that it has for frames to come.
    pub fn buffers(&self) -> usize {
        self.fill.peek() as usize + self.free_list.len()
    }

    /// A frame arrives from the wire, and the XDP program redirects it to the socket. If it comes in one piece, it starts
    /// `shift` bytes further on than computed.
    pub fn receive(&mut self, frame: &[u8], shift: u64) -> Received {
        if frame.len() > self.layout.frame_max as usize {
            return self.receive_pieces(frame);
        }
        let Some(fill) = self.allocate() else { return Received::NoBuffer };
        let offset = self.layout.frame_offset() + shift;
        let at = UmemAddr(fill + offset);
        assert!(at < self.memory.end(), "a frame at {at:?} would be in pages that are no longer the guest's");
        self.memory.write(at, frame);
        if self.rx.free(1) == 0 {
            self.free_list.push(fill);
            return Received::RingFull;
        }
        self.rx.write(libc::xdp_desc { addr: fill | offset << OFFSET_SHIFT, len: frame.len() as u32, options: 0 });
        self.rx.submit();
        Received::At(at)
    }

    /// A driver that has lost its way answers with a buffer that it does not have, or that the rx ring has already.
    pub fn answer_unasked(&mut self, fill: UmemAddr, len: u32) {
        assert!(self.rx.free(1) > 0, "the rx ring has room");
        self.rx.write(libc::xdp_desc { addr: fill.0 | self.layout.frame_offset() << OFFSET_SHIFT, len, options: 0 });
        self.rx.submit();
    }

    /// As [`answer_unasked`](Self::answer_unasked), the other way.
    pub fn complete_unasked(&mut self, addr: UmemAddr) {
        assert!(self.completion.free(1) > 0, "the completion ring has room");
        self.completion.write(addr.0);
        self.completion.submit();
    }

    /// A frame that takes several fill entries (`net/xdp/xsk.c`: __xsk_rcv).
    fn receive_pieces(&mut self, frame: &[u8]) -> Received {
        if self.frame_max <= self.layout.frame_max {
            return Received::Oversize;
        }
        self.receive_first_pieces(frame, 0)
    }

    /// The pieces of a frame, and none of the last `lost`, as from a kernel that has lost its way.
    pub fn receive_first_pieces(&mut self, frame: &[u8], lost: usize) -> Received {
        let pieces = frame.chunks(self.layout.frame_max as usize);
        if self.free_list.len() + (self.fill.peek() as usize) < pieces.len() {
            return Received::NoBuffer;
        }
        if (self.rx.free(pieces.len() as u32) as usize) < pieces.len() {
            return Received::RingFull;
        }
        let offset = self.layout.frame_offset();
        let mut first = None;
        let last = pieces.len() - 1;
        for (index, piece) in pieces.enumerate().take(last + 1 - lost) {
            let fill = self.allocate().unwrap();
            let at = UmemAddr(fill + offset);
            self.memory.write(at, piece);
            let options = if index < last { libc::XDP_PKT_CONTD } else { 0 };
            self.rx.write(libc::xdp_desc { addr: fill | offset << OFFSET_SHIFT, len: piece.len() as u32, options });
            first.get_or_insert(at);
        }
        self.rx.submit();
        Received::At(first.unwrap())
    }

    /// The XDP program drops or passes a frame that has been put into a buffer already.
    pub fn drop_in_program(&mut self) {
        if let Some(entry) = self.allocate() {
            self.free_list.push(entry);
        }
    }

    /// Works on the tx ring as one sendto does: up to `budget_descs` descriptors. Returns the number of packets taken.
    pub fn send(&mut self, budget_descs: usize) -> usize {
        let mut taken = 0;
        let mut left = budget_descs;
        loop {
            let Some(packet) = self.next_packet(left) else { break taken };
            left -= packet.pieces.len();
            self.sending.push_back(packet);
            taken += 1;
        }
    }

    /// The next packet of the tx ring, if its descriptors fit `room`. Checks all that the kernel checks
    /// (`net/xdp/xsk_queue.h`: xp_unaligned_validate_desc).
    fn next_packet(&mut self, room: usize) -> Option<Packet> {
        let mut pieces = Vec::new();
        let mut more = true;
        let available = self.tx.peek() as usize;
        while more && pieces.len() < available.min(room) {
            let desc = self.tx.read();
            let end = desc.addr.checked_add(u64::from(desc.len)).unwrap();
            assert!(desc.len > 0 && u64::from(desc.len) <= CHUNK_BYTES, "length of {desc:?}");
            assert!(end <= self.memory.len_bytes(), "{desc:?} is outside the UMEM");
            assert_eq!(desc.options & !libc::XDP_PKT_CONTD, 0, "options of {desc:?}");
            more = desc.options & libc::XDP_PKT_CONTD != 0;
            pieces.push((desc.addr, desc.len));
        }
        assert!(pieces.len() <= PIECES_MAX, "a packet of {} pieces would be refused", pieces.len());
        if more {
            // Nothing there, or the budget cuts a packet in two: the kernel leaves it for the next call.
            assert!(pieces.len() >= room || pieces.is_empty(), "a packet without an end");
            self.tx.unread(pieces.len() as u32);
            return None;
        }
        self.tx.release();
        Some(Packet { pieces })
    }

    /// Number of packets taken and not completed.
    pub fn sending(&self) -> usize {
        self.sending.len()
    }

    /// Every piece that may still be read: of packets in the tx ring and of those that are being sent.
    pub fn pieces_to_read(&mut self) -> Vec<(u64, u32)> {
        let count = self.tx.peek();
        let mut pieces: Vec<_> = (0..count).map(|_| self.tx.read()).map(|desc| (desc.addr, desc.len)).collect();
        self.tx.unread(count);
        pieces.extend(self.sending.iter().flat_map(|packet| &packet.pieces));
        pieces
    }

    /// Completes the packet that was taken `index` packets after the oldest one. Returns its bytes as they are now:
    /// the device may read them until then.
    pub fn complete(&mut self, index: usize) -> Vec<u8> {
        let packet = self.sending.remove(index).unwrap();
        let mut frame = Vec::new();
        for (addr, len) in packet.pieces {
            frame.extend((0..u64::from(len)).map(|i| self.memory.read::<1>(UmemAddr(addr + i))[0]));
            assert!(self.completion.free(1) > 0, "the completion ring has room for all that is in the kernel's hands");
            self.completion.write(if self.mode == BindMode::Copy { addr & !1 } else { addr });
        }
        self.completion.submit();
        frame
    }

    /// The socket closes: whatever either side had is forgotten, and the rings are as good as new for the next one.
    pub fn close(&mut self, xsk: &mut XskSocket) {
        while self.fill.peek() > 0 {
            self.fill.read();
            self.fill.release();
        }
        while self.tx.peek() > 0 {
            self.tx.read();
            self.tx.release();
        }
        while xsk.rx_peek() > 0 {
            xsk.rx_read();
            xsk.rx_release();
        }
        while xsk.completion_peek() > 0 {
            xsk.completion_read();
            xsk.completion_release();
        }
        self.free_list.clear();
        self.sending.clear();
        self.tx.set_needs_wakeup(false);
        self.fill.set_needs_wakeup(false);
        messages(&self.wakeups);
        messages(&self.socket);
    }

    /// Asks to be woken for the tx ring, or not to be.
    pub fn ask_for_tx_wakeup(&self, on: bool) {
        self.tx.set_needs_wakeup(on);
    }

    /// Asks to be woken for the fill ring, or not to be. Sends a message that a wake-up takes.
    pub fn ask_for_fill_wakeup(&mut self, on: bool) {
        self.fill.set_needs_wakeup(on);
        self.wakeups.send(&[]).unwrap();
    }

    /// Makes the socket readable while there are frames in the rx ring, as poll() says of the real one.
    pub fn update_readiness(&mut self) {
        messages(&self.socket);
        if self.rx.pending() > 0 {
            self.wakeups.send(&[]).unwrap();
        }
    }

    /// Refuses every send from now on, as if the interface were down.
    pub fn refuse_sends(&self) {
        self.wakeups.shutdown(Shutdown::Both).unwrap();
    }

    /// Number of sends since the last time this was asked.
    pub fn tx_wakeups(&self) -> usize {
        messages(&self.wakeups)
    }
}

/// Reads all messages; their number.
fn messages(from: &UnixDatagram) -> usize {
    let message = || match from.recv(&mut [0; 1]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        received => Some(received.unwrap()),
    };
    std::iter::from_fn(message).count()
}
