"""The Rust core. One flat module; see `crates/python`.

File descriptors passed in stay the caller's: what is kept is duplicated.
Numbers named `*_address` are in the address space that the name says.
"""

from typing import Literal, final

from mpassthru.steering import Filter
from mpassthru.testing.guest_config import GuestConfig, Pattern, Source

__all__ = [
    "Engine",
    "Event",
    "FrameGenerator",
    "GuestDriver",
    "GuestRing",
    "MemoryRegion",
    "PacketWire",
    "SocketConfig",
    "SteeringProgram",
    "VringConfig",
    "XdpSink",
    "ZeroCopyRules",
]

_VringIndex = int
"""0-based: rx of queue pair n is 2n, tx is 2n + 1 (VIRTIO 1.3 section 5.1.2)."""

# ---- engine: the data plane of one port (crates/datapath) -------------------------------------------------

@final
class MemoryRegion:
    """One region of guest memory, as VHOST_USER_SET_MEM_TABLE describes it. Addresses and sizes in bytes."""

    def __new__(
        cls, *, guest_phys_address: int, size_bytes: int, user_address: int, mmap_offset: int, fd: int
    ) -> MemoryRegion: ...

@final
class VringConfig:
    """A virtqueue ready to run. Ring addresses are the front-end's (SET_VRING_ADDR); `call_fd`/`err_fd` may be -1.

    `record_fd`, if not -1, is a memfd with the record of what is in flight, `record_offset` bytes from its start.
    `log_buffers` (VHOST_F_LOG_ALL) and `log_used_address` (VHOST_VRING_F_LOG, guest-physical) say which of its writes
    to guest memory go into the migration log, if there is one.
    """

    def __new__(
        cls,
        *,
        size: int,
        base: int,
        desc_user_address: int,
        avail_user_address: int,
        used_user_address: int,
        features: int,
        enabled: bool,
        kick_fd: int,
        call_fd: int = -1,
        err_fd: int = -1,
        record_fd: int = -1,
        record_offset: int = 0,
        log_buffers: bool = False,
        log_used_address: int | None = None,
    ) -> VringConfig: ...

@final
class ZeroCopyRules:
    """What a driver's zero-copy mode does to memory, and what it takes; see `mpassthru.rules.ZeroCopyRules`."""

    def __new__(
        cls,
        *,
        direct: bool,
        rx_write_max_bytes: int,
        rx_write_align_bytes: int,
        rx_write_before_bytes: int,
        rx_buffers_min: int,
        tx_frame_max_bytes: int,
        tx_frame_min_bytes: int,
        tx_pieces_max: int,
        contiguity: Literal["backing-page", "base-page"],
    ) -> ZeroCopyRules: ...

@final
class SocketConfig:
    """How a queue pair's AF_XDP socket is bound; in mode `packet`, a packet socket that is bound already.

    `room_bytes` is the room for a frame in each of the UMEM's chunks: what the kernel (copy mode) writes at most, or
    what the NIC is told that there is (zero-copy mode, which needs `zero_copy_rules`). Left out, it is
    `frame_max_bytes`, the longest frame; in copy mode that may be longer, and takes several chunks.
    """

    def __new__(
        cls,
        *,
        socket_fd: int,
        ifindex: int,
        queue_id: int,
        mode: Literal["packet", "copy", "zero-copy"],
        frame_max_bytes: int,
        room_bytes: int | None = None,
        zero_copy_rules: ZeroCopyRules | None = None,
    ) -> SocketConfig: ...
    @property
    def mode(self) -> Literal["packet", "copy", "zero-copy"]: ...

@final
class Event:
    """Something that happened on an engine thread.

    kind:
        ``completed``: the operation `token` ended; `value` is its result, or `error` is set.
        ``fault``: virtqueue `vring` was stopped; `error` is a QueueFault.
        ``kicked-empty``: virtqueue `vring` was kicked twice while its rings held nothing but zeros (told once): if that
            lasts, the front-end's memory is not shared with us.
        ``distrusted``: the kernel answered queue pair `vring` // 2 with a buffer that it did not have. Its socket is
            closed, and counts as attached until it is detached; `value` is 1 if it was in zero-copy mode, `error` is a
            HostError.
        ``host-error``: the socket of queue pair `vring` // 2 no longer works; `error` is a HostError.
    """

    @property
    def kind(self) -> Literal["completed", "fault", "kicked-empty", "distrusted", "host-error"]: ...
    @property
    def token(self) -> int: ...
    @property
    def vring(self) -> int: ...
    @property
    def value(self) -> int: ...
    @property
    def error(self) -> Exception | None: ...

@final
class Engine:
    """Guest memory, virtqueues and sockets of one port; one thread per queue pair, asleep while there is no work.

    Operations that return a token run on an engine thread: their end is an `Event`, announced on `event_fd`
    (an eventfd, non-blocking; read it, then call `drain_events`).
    """

    def __new__(
        cls,
        *,
        queue_pairs: int,
        poll: Literal["busy", "adaptive", "interrupt"] = "adaptive",
        source_addresses: tuple[bytes, ...] | None = None,
    ) -> Engine:
        """Start the threads. Frames from the guest have one of these source addresses, or are dropped (`spoofed`)."""
    @property
    def event_fd(self) -> int: ...
    def drain_events(self) -> list[Event]: ...
    def map_memory(self, regions: list[MemoryRegion]) -> None:
        """Replace the guest's memory map. Every virtqueue must be stopped and every socket detached.

        Raises:
            HostError: a region cannot be mapped; the old map is gone and no memory is mapped.
            RefusedError: the regions overlap, or make a UMEM that the kernel cannot take.
        """
    def add_memory(self, regions: list[MemoryRegion]) -> list[int] | None:
        """Add regions to the memory map while virtqueues run. Their frames are copied until sockets are newer.

        Returns:
            A token for each queue pair, which has the regions when that ends; value: 0. None, with nothing done, if
            everything has to be mapped anew instead (`map_memory`).

        Raises:
            HostError: a region cannot be mapped; nothing has changed.
            RefusedError: regions overlap, or no memory is mapped yet.
        """
    def prepare_socket(self, queue_pair: int, config: SocketConfig) -> int:
        """Register all of guest memory on a socket that is to take the place of the pair's present one. Value: 0.

        Takes long; the present one goes on meanwhile. One that was prepared before is closed.
        """
    def attach_prepared(self, queue_pair: int) -> int:
        """Bind the socket that was prepared. Value: as `attach_socket`.

        Raises:
            RefusedError: none was prepared.
        """
    def discard_prepared(self, queue_pair: int) -> None:
        """Close the socket that was prepared, if there is one."""
    def socket_lacks_memory(self, queue_pair: int) -> bool:
        """Whether memory was added after the UMEM of the queue pair's socket was registered."""
    def attach_socket(self, queue_pair: int, config: SocketConfig) -> int:
        """Register the UMEM on the socket, map its rings and bind it. Value: 1 for zero-copy, 0 for copy."""
    def detach_socket(self, queue_pair: int) -> int:
        """Let frames leave, unmap the rings and close the socket. Value: 0.

        Its buffers go back to the guest when their virtqueue stops, when the next socket is attached, or by `reclaim`:
        in zero-copy mode the NIC may write to them until the queue is seen free.
        """
    def reclaim(self, queue_pair: int) -> int:
        """Give the guest back what a closed socket had of it; nothing is done under a socket. Value: 0.

        In zero-copy mode the queue is seen free before.
        """
    def guest_address(self, queue_pair: int) -> bytes | None:
        """The station address that the guest sends from; None as long as it has sent nothing."""
    def start_vring(self, index: int, config: VringConfig) -> int:
        """Start a virtqueue; value: the number of heads that an earlier back-end had in flight, by the record."""
    def stop_vring(self, index: int) -> int:
        """Stop a virtqueue; value: the ring base (next avail index).

        Fails with HostError EBUSY while a socket has buffers of it, for only closing the socket gives those back:
        detach it, then stop again.
        """
    def set_vring_enabled(self, index: int, enabled: bool) -> int: ...
    def set_vring_call(self, index: int, fd: int) -> int:
        """Replace the call eventfd; -1 for none. The driver is notified once, in case one was missed."""
    def set_vring_err(self, index: int, fd: int) -> int: ...
    def map_log(self, fd: int, *, size_bytes: int = 0, offset: int = 0) -> None:
        """Replace the migration log: a bitmap of 4 KiB guest-physical pages; -1 for none.

        Virtqueues that run keep the log that they have until `set_vring_log`.

        Raises:
            HostError: it cannot be mapped; the old one stays.
            RefusedError: it has no room for all of guest memory; the old one stays.
        """
    def set_log_fd(self, fd: int) -> None:
        """The eventfd that is signalled when pages have been marked; -1 for none. For virtqueues as with `map_log`."""
    def mark_all(self) -> None:
        """Mark all of guest memory in the migration log.

        Raises:
            RefusedError: there is no log, or no guest memory.
        """
    def set_vring_log(self, index: int, log_buffers: bool, log_used_address: int | None) -> int:
        """Log these writes of a running virtqueue to the log as it is now, and mark what is outstanding. Value: 0."""
    def socket_attached(self, queue_pair: int) -> bool: ...
    def send_frame(self, queue_pair: int, frame: bytes) -> int:
        """Send one frame of ours to the wire (a RARP after migration). Value: 0."""
    def counters(self) -> dict[str, object]:
        """The port's counters as plain data, shaped as `mpassthru.report.PortReport`'s `rx` and `tx`."""
    def close(self) -> None:
        """Stop the threads, close every socket, unmap guest memory.

        Stop the virtqueues first: one that still runs is left as a crash would leave it.
        """

# ---- steering: the XDP program (crates/steering) -----------------------------------------------------------

@final
class SteeringProgram:
    """The XDP program of one interface, its XSKMAP and its counters. Goes away with its owner (bpf_link)."""

    @staticmethod
    def attach(
        ifindex: int, *, xdp_mode: Literal["native", "generic"], queue_count: int, frags: bool = False
    ) -> SteeringProgram:
        """Load the program and attach it to the interface.

        Args:
            ifindex: Of the interface.
            xdp_mode: Where it runs.
            queue_count: Receive queues that it has room for.
            frags: It takes frames in several buffers; without it drivers refuse MTUs that need them.

        Raises:
            HostError: EBUSY/EEXIST if an XDP program is there; EPERM without CAP_BPF and CAP_NET_ADMIN;
                EOPNOTSUPP if the driver has no native XDP.
        """
    def steer_queue(self, queue_id: int, *, steer: Literal["passthru", "mac"]) -> None:
        """Claim a hardware queue. Unclaimed queues pass every frame to the host.

        Of a queue that is steered by `mac` the frames that the filter names are the guest's, the rest is the host's;
        without a filter, none is the guest's.
        """
    def set_filter(self, filter: Filter) -> None:
        """Replace the filter at once for all queues: a frame is judged by the old one or by the new one.

        Takes some 10 ms, until no frame is judged by the old one any more.

        Raises:
            HostError: ENOMEM; the old one stays.
            ValueError: A table is too long, an address is of the other kind, or a VLAN does not exist.
        """
    def release_queue(self, queue_id: int) -> None: ...
    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        """Put a bound AF_XDP socket into the XSKMAP. While the slot is empty the queue's frames are dropped."""
    def clear_socket(self, queue_id: int) -> None: ...
    def counters(self) -> dict[int, dict[str, int]]:
        """By claimed queue: `redirected`, `passed`, and drops as `dropped_no_guest`, ... (see bpf/README.md)."""
    def close(self) -> None: ...

# ---- testing: the built-in guest (crates/testing); use mpassthru.testing -----------------------------------

@final
class GuestDriver:
    """Memory, rings and driver threads of the built-in guest: the half of it that is not vhost-user.

    A queue pair is driven by a thread of its own once started. Addresses are guest-physical.
    """

    def __new__(cls, config: GuestConfig, features: int) -> GuestDriver:
        """Make memory, lay out rings and buffers, post every rx buffer. `features` are those negotiated.

        Raises:
            RefusedError: the parts of the configuration do not fit together.
            HostError: no such memory, or not enough of it.
        """
    def regions(self) -> list[tuple[int, int, int, int, int]]:
        """Guest-physical address, size in bytes, user address, mmap offset and fd (which stays the driver's)."""
    def ring(self, index: _VringIndex) -> GuestRing: ...
    def start(
        self,
        queue_pair: int,
        *,
        rx: Literal["idle", "sink", "echo", "check"],
        source: Source | None = None,
        polling: bool | None = None,
    ) -> None:
        """Run a queue pair; one that runs changes its roles. `polling` None is the configuration's."""
    def park(self) -> None:
        """End every thread. Posted buffers stay posted."""
    def settle(self, bases: list[int]) -> None:
        """Park, and count as violations what a device that stopped at these ring bases still owes."""
    def reset(self) -> None:
        """Park, clear the rings and post every rx buffer anew, from ring base 0. Counters go on."""
    def counters(self, queue_pair: int | None = None) -> dict[str, int]:
        """One queue pair's counters, or the sum; `check_*` are always over all queue pairs."""
    def violations(self, queue_pair: int | None = None) -> dict[str, int]:
        """What the device did that no device may do, by name."""
    def changed_gap_bytes(self) -> int:
        """Changed bytes of memory that is neither ring nor buffer. Needs `canaries`."""
    def take_captured(self) -> list[tuple[bytes, bytes]]:
        """Virtio-net header and frame of each."""
    def read(self, guest_phys_address: int, length: int) -> bytes: ...
    def write(self, guest_phys_address: int, data: bytes) -> None: ...

@final
class GuestRing:
    """One virtqueue of the built-in guest, field by field and without any check: for tests that misbehave.

    Slots and indices are taken modulo the ring's size; flags are VIRTQ_DESC_F_* and so on (VIRTIO 1.3 section 2.7).
    Those of a packed virtqueue (section 2.8) are reached by `packed_descriptor` and `set_packed_descriptor` alone: what
    belongs to the other layout raises RefusedError.
    """

    @property
    def index(self) -> _VringIndex: ...
    @property
    def size(self) -> int: ...
    @property
    def desc_address(self) -> int: ...
    @property
    def avail_address(self) -> int: ...
    @property
    def used_address(self) -> int: ...
    def user_address(self, guest_phys_address: int) -> int:
        """The front-end's user address of a guest-physical one."""
    @property
    def kick_fd(self) -> int: ...
    @property
    def call_fd(self) -> int: ...
    @property
    def err_fd(self) -> int: ...
    def kick(self) -> None: ...
    def set_descriptor(self, index: int, *, address: int, length: int, flags: int = 0, next: int = 0) -> None: ...
    def set_indirect_descriptor(
        self, table_address: int, index: int, *, address: int, length: int, flags: int = 0, next: int = 0
    ) -> None: ...
    def descriptor(self, index: int) -> tuple[int, int, int, int]:
        """Address, length, flags and next."""
    def set_avail_entry(self, slot: int, head: int) -> None: ...
    @property
    def avail_idx(self) -> int: ...
    def set_avail_idx(self, index: int) -> None: ...
    def set_avail_flags(self, flags: int) -> None: ...
    def set_used_event(self, index: int) -> None: ...
    @property
    def used_idx(self) -> int: ...
    def used_entry(self, slot: int) -> tuple[int, int]:
        """Id and length."""
    @property
    def used_flags(self) -> int: ...
    @property
    def avail_event(self) -> int: ...
    def set_packed_descriptor(self, slot: int, *, address: int, length: int, id: int, flags: int = 0) -> None:
        """Write a descriptor of a packed virtqueue, its flags last."""
    def packed_descriptor(self, slot: int) -> tuple[int, int, int, int]:
        """Address, length, buffer id and flags."""
    def take_calls(self) -> int:
        """Call notifications since last taken. A running queue pair that sleeps takes them itself."""
    def take_errors(self) -> int:
        """Times the device announced, on the err eventfd, that it gave the queue up; since last taken."""

@final
class FrameGenerator:
    """Sends copies of one frame out of an interface of the caller's network namespace, by BPF_PROG_TEST_RUN."""

    def __new__(cls, ifindex: int, frame: bytes) -> FrameGenerator: ...
    def start(
        self, *, count: int | None = None, duration_s: float | None = None, rate_frames_per_s: float | None = None
    ) -> None: ...
    def stop(self) -> None: ...
    def is_active(self) -> bool:
        """Whether it is sending; raises, once, what sending failed with."""
    @property
    def sent(self) -> int: ...

@final
class PacketWire:
    """Sends and checks patterned frames through AF_PACKET, on an interface of the caller's network namespace."""

    def __new__(cls, ifindex: int, *, all_ethertypes: bool = False, capture_frames: int = 0) -> PacketWire: ...
    def start_sending(
        self,
        pattern: Pattern,
        *,
        count: int,
        first_sequence: int | None = None,
        rate_frames_per_s: float | None = None,
    ) -> None: ...
    def stop_sending(self) -> None: ...
    def is_sending(self) -> bool:
        """Whether it is sending; raises, once, what sending or receiving failed with."""
    def send_frame(self, frame: bytes) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def reset_check(self) -> None: ...
    def take_captured(self) -> list[bytes]: ...

@final
class XdpSink:
    """Counts and drops, by XDP, what an interface of the caller's network namespace receives; until deleted."""

    @staticmethod
    def attach(ifindex: int, *, xdp_mode: Literal["native", "generic"]) -> XdpSink: ...
    def counters(self) -> tuple[int, int]:
        """Frames and bytes."""
