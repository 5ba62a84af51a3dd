"""What a session refuses: messages that are not offered, and malformed ones."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from session_steps import NO_ACK, encodable, ends_with, hangs_up, negotiated, start
from vhost_user_fakes import (
    FEATURES,
    FakeDevice,
    connected,
    open_fds,
    region,
)

from mpassthru.errors import HostError, ProtocolError
from mpassthru.vhost_user import (
    SUPPORTED_PROTOCOL_FEATURES,
    Backend,
    Frontend,
    MemoryRegion,
    Request,
    Session,
    StillInUseError,
)
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.handlers import HANDLERS, NOT_OFFERED, NOT_OFFERED_WITH_REPLY
from mpassthru.vhost_user.message import U64, Empty, VringFile, encode_message, request_name


@pytest.mark.parametrize("request_", [*NOT_OFFERED, 0, 44, 0xFFFF_FFFF], ids=request_name)
async def test_message_that_is_not_offered_is_refused_with_its_reason(request_: int, event: int) -> None:
    async with negotiated() as (frontend, _, session, task):
        connection = frontend._connection
        await connection.send(request_, U64(0), need_reply=True, fds=[event])
        if request_ in NOT_OFFERED_WITH_REPLY:
            await hangs_up(frontend, task, f"{request_name(request_)}: .* was not offered", ProtocolError)
        else:
            message = await connection.receive()
            assert message is not None
            assert (message.request, message.payload) == (request_, U64(1).encode())
            assert session.counters.refusals == 1
    async with negotiated(protocol_features=NO_ACK) as (frontend, _, _, task):
        await frontend._connection.send(request_, U64(0), need_reply=True)
        await hangs_up(frontend, task, f"{request_name(request_)}: .*(was not offered|is known)", ProtocolError)


@pytest.mark.parametrize("request_", [request for request, rule in HANDLERS.items() if rule.needs], ids=request_name)
async def test_message_of_a_feature_the_device_lacks_is_refused(request_: int) -> None:
    rule = HANDLERS[request_]
    device = FakeDevice(protocol_features=int(SUPPORTED_PROTOCOL_FEATURES & ~rule.needs))
    async with negotiated(device) as (frontend, _, _, task):
        await frontend._connection.send(request_, U64(0), need_reply=False)
        await hangs_up(frontend, task, f"{request_name(request_)}: {rule.needs.name} was not offered", ProtocolError)


def test_every_message_is_handled_or_known_to_be_not_offered() -> None:
    assert {*HANDLERS, *NOT_OFFERED} == set(Request)
    assert not {*HANDLERS} & {*NOT_OFFERED}


@pytest.mark.parametrize("request_", HANDLERS, ids=request_name)
async def test_wrong_payload_size_ends_the_connection(request_: int, event: int) -> None:
    rule = HANDLERS[request_]
    async with negotiated() as (frontend, _, _, task):
        fds = [event] * rule.fds[0]
        await frontend._connection.send(request_, encodable(bytes(300)), fds=fds)
        await hangs_up(frontend, task, f"{request_name(request_)}: .*bytes", ProtocolError)


@pytest.mark.parametrize("request_", HANDLERS, ids=request_name)
async def test_wrong_number_of_descriptors_ends_the_connection(request_: int, event: int) -> None:
    rule = HANDLERS[request_]
    payloads = {"VringFile": VringFile(0, has_fd=True), "RegionTable": encodable(bytes(8))}
    payload = payloads.get(rule.payload.__name__, encodable(bytes(getattr(rule.payload, "LAYOUT", EMPTY).size)))
    counts = [0] if rule.fds[0] == 1 or rule.payload is VringFile else []
    if rule.fds[-1] < 8:
        counts.append(rule.fds[-1] + 1)
    for count in [*counts, 8]:
        async with negotiated() as (frontend, _, _, task):
            await frontend._connection.send(request_, payload, fds=[event] * count)
            await hangs_up(frontend, task, f"{request_name(request_)}: .*{count} descriptors", ProtocolError)


EMPTY = struct.Struct("")


async def test_descriptor_against_the_payloads_word_ends_the_connection(event: int) -> None:
    async with negotiated() as (frontend, _, _, task):
        await frontend._connection.send(Request.VHOST_USER_SET_VRING_CALL, VringFile(0, has_fd=False), fds=[event])
        await hangs_up(frontend, task, "SET_VRING_CALL: vring 0: 1 descriptors came along", ProtocolError)


async def test_reply_from_the_front_end_ends_the_connection() -> None:
    async with negotiated() as (frontend, _, session, task):
        await frontend._connection.send(Request.VHOST_USER_GET_FEATURES, Empty(), reply=True)
        await hangs_up(frontend, task, "GET_FEATURES: a reply, to nothing that was asked", ProtocolError)
        assert session.counters.protocol_errors == 1


async def test_acknowledgement_is_not_given_before_it_was_negotiated() -> None:
    async with connected(FakeDevice()) as (frontend, _, _):
        connection = frontend._connection
        await connection.send(Request.VHOST_USER_SET_OWNER, Empty(), need_reply=True)
        await connection.send(Request.VHOST_USER_GET_FEATURES, Empty(), need_reply=True)
        message = await connection.receive()
        assert message is not None
        assert message.request == Request.VHOST_USER_GET_FEATURES


async def test_front_end_that_hangs_up_before_its_reply_is_an_ordinary_end() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    ours.send(encode_message(Request.VHOST_USER_GET_FEATURES, Empty()) * 3)
    ours.close()
    await Session(Connection(theirs), FakeDevice()).run()
    assert open_fds() == before


async def test_stop_that_fails_at_the_end_does_not_keep_the_rest_from_being_done(
    fd: int, event: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = FakeDevice()
    async with negotiated(device) as (frontend, _, _, task):
        await frontend.set_mem_table([region(fd)])
        await start(frontend, 0, event)
        await start(frontend, 1, event)
        device.failures["stop_vring"] = HostError(5, "stuck")
        device.calls.clear()
        frontend.close()
        with pytest.raises(AssertionError):  # the fake's: memory must not go while vring 0 runs
            await asyncio.wait_for(asyncio.shield(task), 5)
        assert device.calls == ["stop_vring 0", "stop_vring 1"]
        assert "vring 0 at the end of the connection: stuck" in caplog.text
        device.running.clear()
        device.regions.clear()


@pytest.mark.parametrize("step", ["stop_vring", "map_memory"])
async def test_device_that_cannot_be_taken_back_is_told_of_and_serves_no_other_front_end(
    fd: int, event: int, step: str, tmp_path: Path
) -> None:
    class Forgetful(FakeDevice):
        """Fails at a step, and has done it all the same: the fake asserts that memory goes after all vrings."""

        async def stop_vring(self, index: int) -> int:
            base = await super().stop_vring(index)
            if step == "stop_vring":
                raise HostError(16, "still held")
            return base

        async def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
            await super().map_memory(regions)
            if step == "map_memory" and not regions:
                raise HostError(16, "still held")

    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        serving = asyncio.create_task(Backend(Forgetful()).serve(listener))
        with await Frontend.connect(path) as frontend:
            await frontend.negotiate(FEATURES, -1)
            await frontend.set_mem_table([region(fd)])
            await start(frontend, 0, event)
        with pytest.raises(StillInUseError, match="what the front-end gave is still in use: still held"):
            await asyncio.wait_for(serving, 5)


async def test_memory_that_is_overlapping_ends_the_connection(fd: int) -> None:
    async with negotiated(protocol_features=NO_ACK) as (frontend, device, _, task):
        await frontend.set_mem_table([region(fd), region(fd)])
        await ends_with(task, "SET_MEM_TABLE: region .* overlap")
        assert not device.regions
