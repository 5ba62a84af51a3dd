"""Negotiation, and messages about the device as a whole, in legal and illegal state, from both ends."""

from __future__ import annotations

import asyncio
import socket

import pytest
from session_steps import NO_ACK, PROTOCOL_FEATURES, ends_with, negotiated, start
from vhost_user_fakes import (
    FEATURES,
    FakeDevice,
    connected,
    open_fds,
    region,
)

from mpassthru.errors import ProtocolError, RefusedError
from mpassthru.vhost_user import (
    SUPPORTED_PROTOCOL_FEATURES,
    Request,
    Session,
    VirtioFeature,
)
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.message import Empty, encode_message


async def test_negotiation_reaches_the_device() -> None:
    async with negotiated() as (frontend, device, session, _):
        assert device.acked == FEATURES == frontend.features == session.features
        assert session.protocol_features == SUPPORTED_PROTOCOL_FEATURES
        assert await frontend.get_queue_num() == 2
        assert await frontend.get_max_mem_slots() == 32
        assert session.counters.messages == 7


async def test_feature_that_was_not_offered_ends_the_connection() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.set_features(1 << 34)
        await ends_with(task, "SET_FEATURES: not offered: VIRTIO_F_RING_PACKED")


async def test_logging_is_refused_by_a_device_without_it() -> None:
    async with connected(FakeDevice(features=FEATURES)) as (frontend, _, task):
        await frontend.set_features(FEATURES | VirtioFeature.VHOST_F_LOG_ALL)
        await ends_with(task, "SET_FEATURES: not offered: VHOST_F_LOG_ALL")


async def test_protocol_feature_that_was_not_offered_ends_the_connection() -> None:
    async with connected(FakeDevice()) as (frontend, _, task):
        await frontend.set_protocol_features(1 << 7)
        await ends_with(task, "SET_PROTOCOL_FEATURES: not offered: VHOST_USER_PROTOCOL_F_CRYPTO_SESSION")


async def test_protocol_features_are_refused_by_a_device_without_them() -> None:
    async with connected(FakeDevice(features=1 << 32)) as (frontend, _, task):
        with pytest.raises(ProtocolError):
            await frontend.get_protocol_features()
        await ends_with(task, "GET_PROTOCOL_FEATURES: VHOST_USER_F_PROTOCOL_FEATURES was not offered")


async def test_repeated_owner_and_features_are_accepted() -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_owner()
        await frontend.set_features(FEATURES)
        assert device.calls == ["set_features", "set_features"]


async def test_messages_without_end_leave_other_tasks_their_turn() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        ours.sendall(encode_message(Request.VHOST_USER_SET_OWNER, Empty()) * 50)
        ours.shutdown(socket.SHUT_WR)
        session = asyncio.create_task(Session(Connection(theirs), FakeDevice()).run())
        turns = 0
        while not session.done():
            await asyncio.sleep(0)
            turns += 1

    assert turns >= 50


async def test_same_features_leave_running_vrings_alone(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_features(FEATURES)
        assert device.calls == []


async def test_other_features_restart_running_vrings_where_they_are(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        device.calls.clear()
        await frontend.set_features(PROTOCOL_FEATURES)
        assert device.calls == ["stop_vring 0", "set_features", "start_vring 0"]
        assert (device.running[0].features, device.running[0].base) == (PROTOCOL_FEATURES, 15)


async def test_status_is_kept_and_zero_stops_every_vring(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.set_status(15)
        assert await frontend.get_status() == 15
        await frontend.set_status(0)
        assert not device.running
        assert await frontend.get_vring_base(0) == 15


async def test_status_has_eight_bits() -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend.set_status(0x100)
        await ends_with(task, "SET_STATUS: a device status of 0x100")


async def test_reset_device_forgets_vrings_and_keeps_memory(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, session, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.set_status(15)
        await frontend.reset_device()
        assert device.calls[-2:] == ["stop_vring 0", "reset"]
        assert len(session.memory) == 1
        assert await frontend.get_status() == 0
        assert await frontend.get_vring_base(0) == 0
        await frontend.set_features(FEATURES)
        await frontend.set_vring_kick(0, event)
        assert not device.running
        await frontend.reset_device()
        await start(frontend, 0, event)
        assert not device.running
        await frontend.get_vring_base(0)
        await frontend.set_features(FEATURES)
        await start(frontend, 0, event)
        assert device.running[0].base == 10


async def test_reset_owner_disables_where_the_front_end_can_enable_again(fd: int, event: int) -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await frontend.reset_owner()
        assert not device.running[0].enabled
    async with connected(device := FakeDevice()) as (frontend, _, _):
        await frontend.set_features(0)
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event, enable=False)
        await frontend.reset_owner()
        await frontend.get_features()
        assert device.running[0].enabled


async def test_mtu_and_rarp_reach_the_device() -> None:
    async with negotiated() as (frontend, device, _, _):
        await frontend.set_mtu(1500)
        await frontend.send_rarp(b"\x52\x54\x00\x12\x34\x56")
        assert device.mtu_bytes == 1500
        assert device.rarp == b"\x52\x54\x00\x12\x34\x56"


@pytest.mark.parametrize("mtu_bytes", [0, 67, 65536, 2**64 - 1])
async def test_impossible_mtu_is_refused(mtu_bytes: int) -> None:
    async with negotiated() as (frontend, _, _, _):
        with pytest.raises(RefusedError, match="NET_SET_MTU"):
            await frontend.set_mtu(mtu_bytes)


async def test_backend_request_socket_is_kept_and_replaced() -> None:
    async with negotiated() as (frontend, _, _, _):
        ours, theirs = socket.socketpair()
        await frontend.set_backend_req_fd(theirs.fileno())
        held = open_fds()
        await frontend.set_backend_req_fd(theirs.fileno())
        assert open_fds() == held
        theirs.close()
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        ours.close()
