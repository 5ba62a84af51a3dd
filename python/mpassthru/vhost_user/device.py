"""What a vhost-user session drives: the device behind it, whatever it is made of.

The session calls one method at a time and waits for it. A method reports a failure as a MpassthruError; the session
then answers the message with a non-zero acknowledgement where the front-end asked for one, and ends otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mpassthru.vhost_user.features import VirtioFeature
from mpassthru.vhost_user.memory import MemoryRegion
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG


@dataclass(frozen=True, slots=True)
class Vring:
    """A virtqueue that is ready to run.

    Attributes:
        size: Entries; a power of two unless VIRTIO_F_RING_PACKED was acknowledged.
        base: The avail index to look at first, unless a record of what is in flight says otherwise.
        desc_user_address: Descriptor table; like all ring addresses in the front-end's address space and inside the
            memory map.
        used_user_address: Used ring.
        avail_user_address: Avail ring.
        flags: VHOST_VRING_F_*.
        log_guest_address: Where writes to the used ring are logged, if VHOST_VRING_F_LOG is in `flags`.
        features: Virtio features acknowledged.
        enabled: Whether to process the ring, or only to discard what the driver sends.
        kick_fd: Readable when the driver notifies.
        call_fd: Written to notify the driver; -1 where it does not want to be.
        err_fd: Written when the ring is found broken; -1 for none.
        inflight_fd: The file of the record of what is in flight, to be taken over and kept; -1 if the front-end has
            none. vhost-user.rst, "Inflight I/O tracking".
        inflight_offset: Where in that file the record of this vring starts, in bytes.
    """

    size: int
    base: int
    desc_user_address: int
    used_user_address: int
    avail_user_address: int
    flags: int
    log_guest_address: int
    features: int
    enabled: bool
    kick_fd: int
    call_fd: int = -1
    err_fd: int = -1
    inflight_fd: int = -1
    inflight_offset: int = 0

    @property
    def log_buffers(self) -> bool:
        """Whether writes to the driver's buffers are logged."""
        return bool(self.features & VirtioFeature.VHOST_F_LOG_ALL)

    @property
    def is_logged(self) -> bool:
        """Whether anything that is written is logged."""
        return self.log_buffers or self.log_used_address is not None

    @property
    def log_used_address(self) -> int | None:
        """Where writes to the used ring are logged; None if they are not."""
        return self.log_guest_address if self.flags & VHOST_VRING_F_LOG else None


class Device(Protocol):
    """A virtio device without its transport. Descriptors passed in are valid during the call: duplicate what is kept.

    Vring indices count from 0: rx of queue pair n is 2n, tx is 2n + 1.
    """

    @property
    def features(self) -> int:
        """Virtio features offered, VHOST_USER_F_PROTOCOL_FEATURES included."""

    @property
    def protocol_features(self) -> int:
        """Protocol features offered."""

    @property
    def queue_pairs_max(self) -> int:
        """Queue pairs that a front-end may use."""

    async def set_features(self, features: int) -> None:
        """The driver chose its features. Every vring is stopped; repeated at each start of the driver."""

    async def log_writes(self, on: bool) -> None:
        """VHOST_F_LOG_ALL changed, and no other feature: log writes to the driver's buffers, also while vrings run.

        When it returns, every later write is logged, or none.
        """

    async def set_log(self, fd: int, size_bytes: int, mmap_offset: int) -> None:
        """Replace the log of written pages, also while vrings run; an `fd` of -1 for none. vhost-user.rst, "Migration".

        When it returns, nothing refers to the old log any more.
        """

    async def set_log_fd(self, fd: int) -> None:
        """Replace the descriptor that is signalled when pages have been logged; -1 for none."""

    async def set_vring_log(self, index: int, log_guest_address: int | None) -> None:
        """Log writes to the used ring of a running vring as if it started there; None to stop logging them."""

    async def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace the memory map; empty to unmap everything. Every vring is stopped.

        After a failure the session maps what was there before.
        """

    async def add_memory(self, regions: Sequence[MemoryRegion]) -> bool:
        """Add regions to the memory map while vrings run.

        Returns:
            False, with nothing done, if that cannot be: the session then stops the vrings and replaces the map. After a
            failure the map is as before.
        """

    async def start_vring(self, index: int, vring: Vring) -> None:
        """Run a stopped vring. A start that was cancelled is followed by `stop_vring`."""

    async def stop_vring(self, index: int) -> int:
        """Stop a running vring, also one that stopped by itself because it was broken.

        Returns:
            The ring base: the avail index that would have been looked at next.
        """

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        """Enable or disable a running vring."""

    async def set_vring_call(self, index: int, fd: int) -> None:
        """Replace the call descriptor of a running vring; -1 for none."""

    async def set_vring_err(self, index: int, fd: int) -> None:
        """Replace the err descriptor of a running vring; -1 for none."""

    async def set_mtu(self, mtu_bytes: int) -> None:
        """The MTU that the driver was told, 68 to 65535 bytes."""

    async def send_rarp(self, mac: bytes) -> None:
        """Announce the guest's MAC address on the network, after a migration."""

    async def set_status(self, status: int) -> None:
        """The virtio device status; 0 is a reset, with every vring stopped."""

    async def reset(self) -> None:
        """Back to the initial state (RESET_DEVICE). Every vring is stopped; memory stays mapped."""
