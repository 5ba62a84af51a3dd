"""One vring as the front-end configures it: what is known of it, and whether the device runs it.

Only this file calls `Device.start_vring` and `Device.stop_vring`, so that their alternation is checked in one place.
vhost-user.rst, "Ring states".
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from enum import Enum

from mpassthru.errors import MpassthruError, ProtocolError
from mpassthru.vhost_user.device import Device, Vring
from mpassthru.vhost_user.features import VirtioFeature
from mpassthru.vhost_user.inflight import InflightArea
from mpassthru.vhost_user.memory import MemoryTable
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG, VringAddress

log = logging.getLogger(__name__)

VRING_SIZE_MAX = 32768
"""VIRTIO 1.3 sections 2.7 and 2.8: the maximum queue size."""

SPLIT_BASE_MAX = 0xFFFF

PACKED_START = 0x8000_8000
"""The base of a packed virtqueue that nobody has used: in each half a ring offset, and the wrap counter in bit 15."""


class RingPhase(Enum):
    """Where a vring stands. Enabled or disabled is independent of it."""

    STOPPED = "stopped"
    """No kick descriptor. Everything may be set."""

    WAITING = "waiting"
    """The front-end asked for a start, but a part is missing: it starts with the message that brings it."""

    STARTED = "started"
    """The device runs it. Size and base may not be set; what else changes is changed on the fly."""


class Ring:
    """State of one vring. Owns its descriptors.

    Attributes:
        enabled: As SET_VRING_ENABLE said; None while it said nothing.
        inflight: As SET_INFLIGHT_FD said, the session's; None while it said nothing.
    """

    def __init__(self, index: int, device: Device) -> None:
        self.index = index
        self.size: int | None = None
        self.base: int | None = None
        self.address: VringAddress | None = None
        self.enabled: bool | None = None
        self.inflight: InflightArea | None = None
        self.kick_fd = -1
        self.call_fd = -1
        self.err_fd = -1
        self._device = device
        self._started = False

    @property
    def phase(self) -> RingPhase:
        """Where the vring stands."""
        if self._started:
            return RingPhase.STARTED
        return RingPhase.STOPPED if self.kick_fd < 0 else RingPhase.WAITING

    @property
    def started(self) -> bool:
        """Whether the device runs it."""
        return self._started

    def is_enabled(self, features: int) -> bool:
        """What the front-end said; before that, enabled only if it cannot say so (protocol features not acked)."""
        if self.enabled is not None:
            return self.enabled
        return not features & VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES

    def set_size(self, size: int) -> None:
        """SET_VRING_NUM.

        Raises:
            ProtocolError: no size that a virtqueue may have, or the vring runs.
        """
        if not 0 < size <= VRING_SIZE_MAX:
            raise ProtocolError(f"vring {self.index} of {size} entries; 1 to {VRING_SIZE_MAX} are possible")
        if self._started and size != self.size:
            raise ProtocolError(f"vring {self.index} is running; stop it with GET_VRING_BASE first")
        self.size = size

    def set_base(self, base: int) -> None:
        """SET_VRING_BASE.

        Raises:
            ProtocolError: the vring runs.
        """
        if self._started:
            raise ProtocolError(f"vring {self.index} is running; stop it with GET_VRING_BASE first")
        self.base = base

    def set_kick(self, fd: int) -> None:
        """Own a new kick descriptor; -1 for none. The vring is not running."""
        self.kick_fd = _replace(self.kick_fd, fd)

    def set_call(self, fd: int) -> None:
        """Own a new call descriptor; -1 for none."""
        self.call_fd = _replace(self.call_fd, fd)

    def set_err(self, fd: int) -> None:
        """Own a new err descriptor; -1 for none."""
        self.err_fd = _replace(self.err_fd, fd)

    def lies_at(self, address: VringAddress) -> bool:
        """Whether the three parts of the ring are where `address` says."""
        known = self.address
        return known is not None and address == replace(
            known, flags=address.flags, log_guest_address=address.log_guest_address
        )

    async def change_log(self, address: VringAddress) -> None:
        """Log writes to the used ring of a running vring as `address` says, which differs in nothing else."""
        if address != self.address:
            logs = address.flags & VHOST_VRING_F_LOG
            await self._device.set_vring_log(self.index, address.log_guest_address if logs else None)
            self.address = address

    async def start_if_ready(self, memory: MemoryTable, features: int | None) -> None:
        """Start a waiting vring if nothing is missing.

        Raises:
            ProtocolError: what is known cannot run: a ring outside memory, a size that is not a power of two.
            MpassthruError: the device could not start it.
        """
        if self.phase is not RingPhase.WAITING:
            return
        if features is None or self.size is None or self.base is None or self.address is None or not memory:
            log.debug("vring %d: kick descriptor set, waiting for the rest of its configuration", self.index)
            return
        vring = self._vring(self.size, self.base, self.address, features)
        self._check(vring, memory)
        self._started = True  # also while starting: a start that is cancelled is followed by a stop
        try:
            await self._device.start_vring(self.index, vring)
        except MpassthruError:
            self._started = False
            raise

    async def pause(self) -> None:
        """Stop the vring for a moment; `start_if_ready` continues where it was."""
        if self._started:
            self.base = await self._device.stop_vring(self.index)
            self._started = False

    async def stop(self) -> None:
        """Stop the vring until the next SET_VRING_KICK. Call and err descriptors stay: front-ends set them ahead."""
        await self.pause()
        self.set_kick(-1)

    def forget(self) -> None:
        """Back to how a stopped vring begins. Call and err descriptors stay."""
        self.size = self.base = self.address = self.enabled = None

    def close(self) -> None:
        """Close every descriptor."""
        self.set_kick(-1)
        self.set_call(-1)
        self.set_err(-1)

    def lies_in(self, memory: MemoryTable, features: int | None) -> bool:
        """Whether the three parts of the ring, as far as known, are in memory."""
        return not self._outside(memory, is_packed(features))

    def _vring(self, size: int, base: int, address: VringAddress, features: int) -> Vring:
        packed = is_packed(features)
        offset = self.inflight.record_offset(self.index, size, packed=packed) if self.inflight else None
        return Vring(
            size=size,
            base=base,
            desc_user_address=address.desc_user_address,
            used_user_address=address.used_user_address,
            avail_user_address=address.avail_user_address,
            flags=address.flags,
            log_guest_address=address.log_guest_address,
            features=features,
            enabled=self.is_enabled(features),
            kick_fd=self.kick_fd,
            call_fd=self.call_fd,
            err_fd=self.err_fd,
            inflight_fd=self.inflight.fd if self.inflight and offset is not None else -1,
            inflight_offset=offset or 0,
        )

    def _check(self, vring: Vring, memory: MemoryTable) -> None:
        packed = is_packed(vring.features)
        if not packed and vring.size & (vring.size - 1):
            raise ProtocolError(f"vring {self.index} of {vring.size} entries; a split virtqueue has a power of two")
        if not packed and vring.base > SPLIT_BASE_MAX:
            raise ProtocolError(f"vring {self.index} starts at {vring.base}; avail indices have 16 bits")
        if packed and vring.base & 0x7FFF >= vring.size:
            raise ProtocolError(f"vring {self.index} starts at {vring.base:#x}, outside its {vring.size} descriptors")
        if outside := self._outside(memory, packed):
            raise ProtocolError(f"vring {self.index}: {outside} is outside the memory that was sent")

    def _outside(self, memory: MemoryTable, packed: bool) -> str:
        """Name the first part of the ring that is not in memory; empty if all are, or are not known yet."""
        if self.size is None or self.address is None:
            return ""
        # VIRTIO 1.3 section 2.7; in the packed layout (2.8) the rings are event suppression structures.
        for part, start, size_bytes in (
            ("descriptor table", self.address.desc_user_address, 16 * self.size),
            ("avail ring", self.address.avail_user_address, 4 if packed else 6 + 2 * self.size),
            ("used ring", self.address.used_user_address, 4 if packed else 6 + 8 * self.size),
        ):
            if not memory.covers(start, size_bytes):
                return f"{part} at {start:#x}+{size_bytes:#x}"
        return ""


def is_packed(features: int | None) -> bool:
    """Whether the acknowledged features choose packed virtqueues."""
    return bool((features or 0) & VirtioFeature.VIRTIO_F_RING_PACKED)


def _replace(old_fd: int, new_fd: int) -> int:
    if old_fd >= 0:
        os.close(old_fd)
    return new_fd
