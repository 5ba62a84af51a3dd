"""The migration log: as QEMU switches it on and off under traffic, and what is refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from vhost_user_fakes import FEATURES, FakeDevice, connected, memory_fd, region, ring_address

from mpassthru.errors import HostError, MpassthruError, ProtocolError, RefusedError
from mpassthru.vhost_user import SUPPORTED_PROTOCOL_FEATURES, Frontend, ProtocolFeature, Request, VirtioFeature
from mpassthru.vhost_user.message import U64, VHOST_VRING_F_LOG

LOGGING = FEATURES | VirtioFeature.VHOST_F_LOG_ALL
LOG_BYTES = 4096


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory_fd()
    yield fd
    os.close(fd)


@asynccontextmanager
async def running(fd: int, device: FakeDevice) -> AsyncIterator[tuple[Frontend, asyncio.Task[None]]]:
    """A front-end whose two vrings run."""
    event = os.eventfd(0)
    async with connected(device) as (frontend, _, task):
        await frontend.negotiate(FEATURES, -1)
        await frontend.set_mem_table([region(fd)])
        for index in range(2):
            await frontend.set_vring_num(index, 256)
            await frontend.set_vring_base(index, 0)
            await frontend.set_vring_addr(ring_address(index))
            await frontend.set_vring_kick(index, event)
        device.calls.clear()
        yield frontend, task
    os.close(event)


async def test_logging_begins_and_ends_without_stopping_a_vring(fd: int) -> None:
    device = FakeDevice(features=LOGGING)
    async with running(fd, device) as (frontend, _):
        assert await frontend.set_log_base(fd, LOG_BYTES) == 0
        await frontend.set_features(LOGGING)
        for index in range(2):
            await frontend.set_vring_addr(
                ring_address(index, flags=VHOST_VRING_F_LOG, log_guest_address=0x3000 + index)
            )
        assert device.calls == [
            f"set_log {LOG_BYTES} 0",
            "log_writes True",
            "set_vring_log 0 12288",
            "set_vring_log 1 12289",
        ]
        device.calls.clear()
        await frontend.set_features(FEATURES)
        for index in range(2):
            await frontend.set_vring_addr(ring_address(index, log_guest_address=0x3000 + index))
        assert device.calls == ["log_writes False", "set_vring_log 0 None", "set_vring_log 1 None"]


async def test_the_same_again_changes_nothing(fd: int) -> None:
    device = FakeDevice(features=LOGGING)
    async with running(fd, device) as (frontend, _):
        await frontend.set_features(LOGGING)
        await frontend.set_vring_addr(ring_address(0, flags=VHOST_VRING_F_LOG, log_guest_address=0x3000))
        device.calls.clear()
        await frontend.set_features(LOGGING)
        await frontend.set_vring_addr(ring_address(0, flags=VHOST_VRING_F_LOG, log_guest_address=0x3000))
        assert device.calls == []


async def test_vring_that_moves_takes_its_log_along(fd: int) -> None:
    device = FakeDevice(features=LOGGING)
    async with running(fd, device) as (frontend, _):
        await frontend.set_vring_addr(ring_address(0, shift=0x100, flags=VHOST_VRING_F_LOG, log_guest_address=0x3000))
        assert device.calls == ["stop_vring 0", "start_vring 0"]
        assert device.running[0].log_used_address == 0x3000


async def test_vring_starts_with_logging_as_it_was_asked_for(fd: int) -> None:
    device, event = FakeDevice(features=LOGGING), os.eventfd(0)
    async with connected(device) as (frontend, _, _):
        await frontend.negotiate(LOGGING, -1)
        await frontend.set_mem_table([region(fd)])
        for index, flags in ((0, VHOST_VRING_F_LOG), (1, 0)):
            await frontend.set_vring_num(index, 256)
            await frontend.set_vring_base(index, 0)
            await frontend.set_vring_addr(ring_address(index, flags=flags, log_guest_address=0x3000))
            await frontend.set_vring_kick(index, event)
        assert [device.running[index].log_buffers for index in (0, 1)] == [True, True]
        assert [device.running[index].log_used_address for index in (0, 1)] == [0x3000, None]
    os.close(event)


async def test_logging_and_another_feature_restart_the_vrings(fd: int) -> None:
    device = FakeDevice(features=LOGGING)
    async with running(fd, device) as (frontend, _):
        await frontend.set_features(LOGGING & ~VirtioFeature.VIRTIO_NET_F_MTU)
        assert device.calls == ["stop_vring 0", "stop_vring 1", "set_features", "start_vring 0", "start_vring 1"]
        assert device.running[0].log_buffers


async def test_log_is_replaced_and_given_up_with_the_connection(fd: int) -> None:
    device = FakeDevice(features=LOGGING)
    async with running(fd, device) as (frontend, _):
        for size_bytes in (LOG_BYTES, 2 * LOG_BYTES):
            await frontend.set_log_base(fd, size_bytes, mmap_offset=8)
        await frontend.set_log_fd(fd)
        assert device.calls == [f"set_log {LOG_BYTES} 8", f"set_log {2 * LOG_BYTES} 8"]
        device.calls.clear()
    assert device.calls == ["stop_vring 0", "stop_vring 1", "map_memory", "set_log 0 0"]


@pytest.mark.parametrize("protocol_features", [-1, int(~ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD)])
async def test_log_without_descriptor_ends_the_connection(protocol_features: int) -> None:
    """An answer would not help: front-ends do not look into it, and go on migrating."""
    async with connected(FakeDevice(features=LOGGING)) as (frontend, _, task):
        await frontend.negotiate(LOGGING, protocol_features & int(SUPPORTED_PROTOCOL_FEATURES))
        with pytest.raises(ProtocolError, match="closed the connection"):
            await frontend.set_log_base(None, LOG_BYTES)
        with pytest.raises(ProtocolError, match="SET_LOG_BASE: a log without descriptor cannot be mapped"):
            await asyncio.wait_for(task, 5)


@pytest.mark.parametrize(
    ("failure", "ending"), [(HostError(22, "no room"), HostError), (RefusedError("too small"), ProtocolError)]
)
async def test_log_that_cannot_be_had_ends_the_connection(
    fd: int, failure: MpassthruError, ending: type[Exception]
) -> None:
    device = FakeDevice(features=LOGGING, failures={"set_log": failure})
    async with running(fd, device) as (frontend, task):
        with pytest.raises(ProtocolError, match="closed the connection"):
            await frontend.set_log_base(fd, LOG_BYTES)
        with pytest.raises(ending, match="SET_LOG_BASE: "):
            await asyncio.wait_for(task, 5)
    assert not device.running


async def test_old_front_end_that_sends_an_address_hears_what_is_missing() -> None:
    async with connected(FakeDevice(features=LOGGING)) as (frontend, _, task):
        await frontend.negotiate(LOGGING, -1)
        with pytest.raises(ProtocolError, match="closed the connection"):
            await frontend._tell(Request.VHOST_USER_SET_LOG_BASE, U64(0x7F00_0000_0000))
        with pytest.raises(ProtocolError, match="LOG_SHMFD"):
            await asyncio.wait_for(task, 5)


@pytest.mark.parametrize("name", ["ADVISE", "LISTEN", "END"])
async def test_postcopy_is_refused_with_the_reason(name: str) -> None:
    async with connected(FakeDevice(features=LOGGING)) as (frontend, _, task):
        await frontend.negotiate(FEATURES, 0)
        await frontend._tell(Request[f"VHOST_USER_POSTCOPY_{name}"], U64(0))
        with pytest.raises(ProtocolError, match="postcopy needs guest memory that is not pinned; use precopy"):
            await asyncio.wait_for(task, 5)


def test_postcopy_is_not_offered() -> None:
    assert not SUPPORTED_PROTOCOL_FEATURES & ProtocolFeature.VHOST_USER_PROTOCOL_F_PAGEFAULT
