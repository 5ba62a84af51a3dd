"""The Rust core. One flat module; see `crates/python`.

File descriptors passed in stay the caller's: what is kept is duplicated.
Numbers named `*_address` are in the address space that the name says.
"""

from typing import Literal, final

VringIndex = int
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
    """A virtqueue ready to run. Ring addresses are the front-end's (SET_VRING_ADDR); `call_fd`/`err_fd` may be -1."""

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
    ) -> VringConfig: ...

@final
class SocketConfig:
    """How a queue pair's AF_XDP socket is bound. `frame_max_bytes` bounds what may be written to a guest buffer."""

    def __new__(
        cls,
        *,
        socket_fd: int,
        ifindex: int,
        queue_id: int,
        mode: Literal["copy", "zero-copy"],
        frame_max_bytes: int,
    ) -> SocketConfig: ...

@final
class Event:
    """Something that happened on an engine thread.

    kind:
        ``completed``: the operation `token` ended; `value` is its result, or `error` is set.
        ``fault``: virtqueue `vring` was stopped; `error` is a QueueFault.
        ``kicked-empty``: virtqueue `vring` was kicked while its rings hold nothing but zeros (told once per start):
            if that lasts, the front-end's memory is not shared with us.
        ``host-error``: the socket of queue pair `vring` // 2 no longer works; `error` is a HostError.
    """

    @property
    def kind(self) -> Literal["completed", "fault", "kicked-empty", "host-error"]: ...
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

    def __new__(cls, *, queue_pairs: int, poll: Literal["busy", "adaptive", "interrupt"] = "adaptive") -> Engine: ...
    @property
    def event_fd(self) -> int: ...
    def drain_events(self) -> list[Event]: ...
    def map_memory(self, regions: list[MemoryRegion]) -> None:
        """Replace the guest's memory map. Every virtqueue must be stopped and every socket detached.

        Raises:
            HostError: a region cannot be mapped; the old map is gone and no memory is mapped.
            RefusedError: the regions overlap, or make a UMEM that the kernel cannot take.
        """
    def attach_socket(self, queue_pair: int, config: SocketConfig) -> int:
        """Register the UMEM on the socket, map its rings and bind it; the event's value is 1 for zero-copy, 0 for copy."""
    def detach_socket(self, queue_pair: int) -> int:
        """Give every buffer back to its virtqueue, unmap the rings and close the socket. Value: 0."""
    def start_vring(self, index: int, config: VringConfig) -> int:
        """Start a virtqueue. Value: 0."""
    def stop_vring(self, index: int) -> int:
        """Stop a virtqueue; value: the ring base (next avail index).

        Stopping an rx virtqueue with buffers in the kernel's hands detaches the socket too, for only closing it
        gives them back; `socket_attached` tells.
        """
    def set_vring_enabled(self, index: int, enabled: bool) -> int: ...
    def set_vring_call(self, index: int, fd: int) -> int:
        """Replace the call eventfd; -1 for none. The driver is notified once, in case one was missed."""
    def set_vring_err(self, index: int, fd: int) -> int: ...
    def socket_attached(self, queue_pair: int) -> bool: ...
    def send_frame(self, queue_pair: int, frame: bytes) -> int:
        """Send one frame of ours to the wire (a RARP after migration). Value: 0."""
    def counters(self) -> dict[str, object]:
        """The port's counters as plain data, shaped as `mpassthru.report.PortReport`'s `rx` and `tx`."""
    def close(self) -> None:
        """Stop the threads, give every buffer back, close every socket, unmap guest memory."""

# ---- steering: the XDP program (crates/steering) -----------------------------------------------------------

@final
class SteeringProgram:
    """The XDP program of one interface, its XSKMAP and its counters. Goes away with its owner (bpf_link)."""

    @staticmethod
    def attach(ifindex: int, *, xdp_mode: Literal["native", "generic"], queue_count: int) -> SteeringProgram:
        """Load the program and attach it to the interface.

        Raises:
            HostError: EBUSY/EEXIST if an XDP program is there; EPERM without CAP_BPF and CAP_NET_ADMIN;
                EOPNOTSUPP if the driver has no native XDP.
        """
    def steer_queue(
        self,
        queue_id: int,
        *,
        steer: Literal["passthru", "mac"],
        mac: bytes = b"",
        broadcast: bool = True,
        multicast: bool = True,
    ) -> None:
        """Claim a hardware queue. Unclaimed queues pass every frame to the host."""
    def release_queue(self, queue_id: int) -> None: ...
    def set_socket(self, queue_id: int, socket_fd: int) -> None:
        """Put a bound AF_XDP socket into the XSKMAP. While the slot is empty the queue's frames are dropped."""
    def clear_socket(self, queue_id: int) -> None: ...
    def counters(self) -> dict[int, dict[str, int]]:
        """By claimed queue: `redirected`, `passed`, and drops as `dropped_no_guest`, ... (see bpf/README.md)."""
    def close(self) -> None: ...
