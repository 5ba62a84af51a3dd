"""GET_INFLIGHT_FD and SET_INFLIGHT_FD: the area that a front-end keeps for back-ends to come."""

from __future__ import annotations

import fcntl
import os

import pytest
from vhost_user_fakes import FEATURES, FakeDevice, connected, memory_fd, region, ring_address

from mpassthru.errors import ProtocolError, RefusedError
from mpassthru.vhost_user import Frontend, InflightArea, ProtocolFeature
from mpassthru.vhost_user.inflight import record_bytes
from mpassthru.vhost_user.message import Inflight

PROTOCOL_FEATURES = (
    ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK | ProtocolFeature.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
)


async def start(frontend: Frontend, index: int, size: int = 256) -> None:
    fd, event = memory_fd(), os.eventfd(0)
    try:
        await frontend.set_mem_table([region(fd)])
        await frontend.set_vring_num(index, size)
        await frontend.set_vring_base(index, 0)
        await frontend.set_vring_addr(ring_address(index))
        await frontend.set_vring_kick(index, event)
    finally:
        os.close(fd)
        os.close(event)


async def test_area_is_made_once_and_goes_from_back_end_to_back_end() -> None:
    device = FakeDevice()
    async with connected(FakeDevice()) as (first, _, _), connected(device) as (second, _, _):
        await first.negotiate(FEATURES, PROTOCOL_FEATURES)
        await second.negotiate(FEATURES, PROTOCOL_FEATURES)
        area = await first.get_inflight_fd(4, 256)
        os.pwrite(area.fd, b"kept", record_bytes(256, packed=False))
        await second.set_inflight_fd(area)
        area.close()

        await start(second, 1)

        vring = device.running[1]
        assert vring.inflight_offset == record_bytes(256, packed=False)
        assert os.pread(vring.inflight_fd, 4, vring.inflight_offset) == b"kept"


async def test_area_cannot_be_shrunk_by_anybody() -> None:
    async with connected(FakeDevice()) as (frontend, _, _):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        area = await frontend.get_inflight_fd(4, 256)
        assert area.description == Inflight(4 * record_bytes(256, packed=True), 0, 4, 256)
        assert os.fstat(area.fd).st_size == area.description.size_bytes
        seals = fcntl.fcntl(area.fd, fcntl.F_GET_SEALS)
        area.close()
    assert seals & fcntl.F_SEAL_SHRINK
    assert seals & fcntl.F_SEAL_SEAL


async def test_vring_without_a_record_in_the_area_has_none() -> None:
    device = FakeDevice()
    async with connected(device) as (frontend, _, _):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        area = await frontend.get_inflight_fd(1, 256)
        await frontend.set_inflight_fd(area)
        await start(frontend, 1)
        assert device.running[1].inflight_fd == -1
        area.close()


async def test_vring_larger_than_its_record_is_refused() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        area = await frontend.get_inflight_fd(4, 128)
        await frontend.set_inflight_fd(area)
        with pytest.raises(ProtocolError):
            await start(frontend, 0)
        with pytest.raises(ProtocolError, match=r"SET_VRING_KICK: vring 0 of 256 entries; the area .* made for 128"):
            await task
        area.close()


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (Inflight(4 * record_bytes(256, packed=False) - 1, 0, 4, 256), "its records take"),
        (Inflight(4 * record_bytes(256, packed=False), 4, 4, 256), "not a multiple of 8"),
        (Inflight(4 * record_bytes(256, packed=True), 8, 4, 256), "beyond its file"),
        (Inflight(1 << 63, 1 << 63, 4, 256), "beyond its file"),
        (Inflight(4 * record_bytes(256, packed=False), 0, 5, 256), "an area for 5 vrings"),
        (Inflight(4 * record_bytes(256, packed=False), 0, 0, 256), "an area for 0 vrings"),
        (Inflight(4 * record_bytes(256, packed=False), 0, 4, 0), "vrings of 0 entries"),
        (Inflight(4 * record_bytes(256, packed=False), 0, 4, 65535), "vrings of 65535 entries"),
    ],
)
async def test_area_that_cannot_be_is_a_protocol_error(description: Inflight, reason: str) -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        made = await frontend.get_inflight_fd(4, 256)
        with pytest.raises(ProtocolError):
            await frontend.set_inflight_fd(InflightArea(description, made.fd))
        with pytest.raises(ProtocolError, match=f"SET_INFLIGHT_FD: .*{reason}"):
            await task
        made.close()


async def test_area_that_is_no_file_is_a_protocol_error() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        event = os.eventfd(0)
        with pytest.raises(ProtocolError):
            await frontend.set_inflight_fd(InflightArea(Inflight(record_bytes(256, packed=False), 0, 1, 256), event))
        os.close(event)
        with pytest.raises(ProtocolError, match="beyond its file"):
            await task


async def test_without_the_feature_nothing_is_handed_out() -> None:
    device = FakeDevice(
        protocol_features=int(ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK),
    )
    async with connected(device) as (frontend, _, _):
        await frontend.negotiate(FEATURES, PROTOCOL_FEATURES)
        area = InflightArea.make(4, 256)
        with pytest.raises(RefusedError):
            await frontend.set_inflight_fd(area)
        area.close()
