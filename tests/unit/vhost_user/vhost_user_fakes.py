"""A device that checks what the session does to it, and helpers to build guest memory."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mpassthru.errors import MpassthruError
from mpassthru.vhost_user import (
    SUPPORTED_PROTOCOL_FEATURES,
    Frontend,
    MemoryRegion,
    Session,
    VirtioFeature,
    Vring,
    VringAddress,
)
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.message import VHOST_VRING_F_LOG

FEATURES = int(
    VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES
    | VirtioFeature.VIRTIO_F_VERSION_1
    | VirtioFeature.VIRTIO_F_INDIRECT_DESC
    | VirtioFeature.VIRTIO_F_EVENT_IDX
    | VirtioFeature.VIRTIO_NET_F_MRG_RXBUF
    | VirtioFeature.VIRTIO_NET_F_MTU
    | VirtioFeature.VIRTIO_NET_F_MQ
)
MEMORY_BYTES = 1 << 20
USER_BASE = 0x7F00_0000_0000


def open_fds() -> int:
    """Descriptors that this process holds."""
    return len(os.listdir("/proc/self/fd"))


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@dataclass
class FakeDevice:
    """Asserts on every call that the session keeps its promises; remembers the rest.

    `failures` maps a method's name to the error that its next call raises.
    """

    features: int = FEATURES
    protocol_features: int = int(SUPPORTED_PROTOCOL_FEATURES)
    queue_pairs_max: int = 2
    running: dict[int, Vring] = field(default_factory=dict)
    starting: dict[int, Vring] = field(default_factory=dict)
    regions: list[MemoryRegion] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    failures: dict[str, MpassthruError] = field(default_factory=dict)
    acked: int | None = None
    status: int = 0
    logs: bool = False
    mtu_bytes: int = 0
    rarp: bytes = b""
    next_base: int = 0
    can_add: bool = True
    block_at: int = -1
    """The number of the call that never returns; -1 for none."""
    blocked: asyncio.Event = field(default_factory=asyncio.Event)

    async def set_features(self, features: int) -> None:
        assert not self.running
        assert not self.starting
        await self._called("set_features")
        self.acked = features

    async def log_writes(self, on: bool) -> None:
        await self._called(f"log_writes {on}")

    async def set_log(self, fd: int, size_bytes: int, mmap_offset: int) -> None:
        assert fd == -1 or is_open(fd)
        if fd >= 0 or self.logs:
            await self._called(f"set_log {size_bytes} {mmap_offset}")
        self.logs = fd >= 0

    async def set_log_fd(self, fd: int) -> None:
        assert fd == -1 or is_open(fd)

    async def set_vring_log(self, index: int, log_guest_address: int | None) -> None:
        assert index in self.running
        await self._called(f"set_vring_log {index} {log_guest_address}")
        flags = 0 if log_guest_address is None else VHOST_VRING_F_LOG
        self._change(index, flags=flags, log_guest_address=log_guest_address or 0)

    async def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
        assert not self.running
        assert not self.starting
        assert all(is_open(region.fd) for region in regions)
        await self._called("map_memory")
        self.regions = list(regions)

    async def add_memory(self, regions: Sequence[MemoryRegion]) -> bool:
        assert regions
        assert all(is_open(region.fd) for region in regions)
        await self._called("add_memory")
        if self.can_add:
            self.regions += regions
        return self.can_add

    async def start_vring(self, index: int, vring: Vring) -> None:
        assert index not in self.running
        assert self.regions
        assert is_open(vring.kick_fd)
        assert all(fd == -1 or is_open(fd) for fd in (vring.call_fd, vring.err_fd))
        assert index not in self.starting
        self.starting[index] = vring
        try:
            await self._called(f"start_vring {index}")
        except MpassthruError:
            del self.starting[index]
            raise
        self.running[index] = self.starting.pop(index)

    async def stop_vring(self, index: int) -> int:
        held = self.starting if index in self.starting else self.running
        vring = held[index]
        await self._called(f"stop_vring {index}")
        del held[index]
        return (vring.base + self.next_base) & 0xFFFF

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        vring = self.running[index]
        assert vring.enabled != enabled
        await self._called(f"set_vring_enabled {index} {enabled}")
        self._change(index, enabled=enabled)

    async def set_vring_call(self, index: int, fd: int) -> None:
        assert fd == -1 or is_open(fd)
        assert index in self.running
        await self._called(f"set_vring_call {index}")
        self._change(index, call_fd=fd)

    async def set_vring_err(self, index: int, fd: int) -> None:
        assert fd == -1 or is_open(fd)
        assert index in self.running
        await self._called(f"set_vring_err {index}")
        self._change(index, err_fd=fd)

    async def set_mtu(self, mtu_bytes: int) -> None:
        await self._called("set_mtu")
        self.mtu_bytes = mtu_bytes

    async def send_rarp(self, mac: bytes) -> None:
        await self._called("send_rarp")
        self.rarp = mac

    async def set_status(self, status: int) -> None:
        assert status or not self.running
        await self._called("set_status")
        self.status = status

    async def reset(self) -> None:
        assert not self.running
        await self._called("reset")

    def _change(self, index: int, **changes: int) -> None:
        vring = self.running[index]
        kept = {name: getattr(vring, name) for name in Vring.__dataclass_fields__}
        self.running[index] = Vring(**(kept | changes))

    async def _called(self, call: str) -> None:
        number = len(self.calls)
        self.calls.append(call)
        if number == self.block_at:
            self.blocked.set()
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        if error := self.failures.pop(call.partition(" ")[0], None):
            raise error


def memory_fd(size_bytes: int = MEMORY_BYTES) -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size_bytes)
    return fd


def region(fd: int, *, slot: int = 0, size_bytes: int = MEMORY_BYTES) -> MemoryRegion:
    """Memory at the `slot`th MiB, in guest and user addresses alike."""
    start = slot * MEMORY_BYTES
    return MemoryRegion(start, size_bytes, USER_BASE + start, 0, fd)


def ring_address(index: int, *, shift: int = 0, flags: int = 0, log_guest_address: int = 0) -> VringAddress:
    """Rings of up to 256 entries, each vring in 16 KiB of its own."""
    start = USER_BASE + index * 0x4000 + shift
    return VringAddress(index, flags, start, start + 0x2000, start + 0x1000, log_guest_address)


@asynccontextmanager
async def connected(device: FakeDevice) -> AsyncIterator[tuple[Frontend, Session, asyncio.Task[None]]]:
    """A front-end and the session that answers it; both are gone afterwards, and so is every descriptor."""
    before = open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    session = Session(Connection(theirs), device)
    task = asyncio.create_task(session.run())
    frontend = Frontend.from_socket(ours)
    try:
        yield frontend, session, task
    finally:
        frontend.close()
        await asyncio.wait([task], timeout=5)
        assert task.done()
        if not task.cancelled():
            task.exception()
    assert not device.running
    assert not device.regions
    assert open_fds() <= before
