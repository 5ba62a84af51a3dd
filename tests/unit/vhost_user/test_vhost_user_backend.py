"""One device behind one socket: front-ends one after the other, and how each side's ends are told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vhost_user_fakes import FEATURES, FakeDevice, memory_fd, open_fds, region

from mpassthru.errors import HostError, ProtocolError, RefusedError
from mpassthru.vhost_user import Backend, Frontend
from mpassthru.vhost_user.connection import Connection
from mpassthru.vhost_user.message import U64, Empty, VringState


@asynccontextmanager
async def serving(path: Path, device: FakeDevice) -> AsyncIterator[Backend]:
    before = open_fds()
    backend = Backend(device)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        task = asyncio.create_task(backend.serve(listener))
        try:
            yield backend
        finally:
            task.cancel()
            await asyncio.wait([task], timeout=5)
            assert task.cancelled()
    assert backend.session is None
    assert open_fds() == before


async def test_next_front_end_is_served_when_the_last_is_gone(tmp_path: Path) -> None:
    path, fd = tmp_path / "socket", memory_fd()
    async with serving(path, device := FakeDevice()) as backend:
        for connection in (1, 2):
            with await Frontend.connect(path) as frontend:
                await frontend.negotiate(FEATURES, -1)
                await frontend.set_mem_table([region(fd)])
                assert backend.counters.connections == connection
                assert len(device.regions) == 1
        assert backend.counters.messages == 12
    os.close(fd)


async def test_second_front_end_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(path, FakeDevice()):
        with await Frontend.connect(path) as first, await Frontend.connect(path) as second:
            await first.get_features()
            waiting = asyncio.create_task(second.get_features())
            await first.get_features()
            assert not waiting.done()
            first.close()
            assert await waiting == FEATURES


async def test_broken_front_end_costs_one_line_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "socket"
    async with serving(path, FakeDevice()) as backend:
        with await Frontend.connect(path) as frontend:
            await frontend.set_features(1 << 50)
            with pytest.raises(ProtocolError):
                await frontend.get_features()
        with await Frontend.connect(path) as frontend:
            assert await frontend.get_features() == FEATURES
        assert backend.counters.protocol_errors == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "connection ended by ProtocolError: SET_FEATURES: not offered: bit 50"
    ]


async def test_device_failure_ends_one_connection_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "socket"
    device = FakeDevice(failures={"set_features": HostError(12, "no memory")})
    async with serving(path, device) as backend:
        with await Frontend.connect(path) as frontend:
            await frontend.set_features(0)
            with pytest.raises(ProtocolError):
                await frontend.get_features()
        with await Frontend.connect(path) as frontend:
            await frontend.negotiate(FEATURES, -1)
        assert backend.counters.protocol_errors == 0
    assert "connection ended by HostError: SET_FEATURES: no memory" in caplog.text


async def test_connected_socket_is_served_alone() -> None:
    backend = Backend(FakeDevice())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    task = asyncio.create_task(backend.serve_connection(theirs))
    with Frontend.from_socket(ours) as frontend:
        await frontend.negotiate(FEATURES, -1)
        other, refused = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with pytest.raises(RefusedError, match="one at a time"):
            await backend.serve_connection(refused)
        assert other.recv(1) == b""
        other.close()
    await asyncio.wait_for(task, 5)
    assert backend.session is None


async def test_listener_that_cannot_accept_is_a_host_error() -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener, pytest.raises(HostError, match="cannot accept a front-end"):
        await Backend(FakeDevice()).serve(listener)


# ---- the front-end helper --------------------------------------------------------------------------------------


async def test_nobody_listening_is_a_host_error_that_says_where(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(HostError, match=f"cannot connect to {tmp_path}/none"):
        await Frontend.connect(tmp_path / "none")
    assert open_fds() == before


async def answer(sock: socket.socket, request: int, payload: U64 | VringState | Empty, *, reply: bool = True) -> None:
    connection = Connection(sock)
    message = await connection.receive()
    assert message is not None
    await connection.send(request, payload, reply=reply)


@pytest.mark.parametrize(
    ("request_", "payload", "reply", "reason"),
    [
        (2, U64(0), True, "answered with SET_FEATURES"),
        (1, U64(0), False, "answered with GET_FEATURES, flags 0x1"),
        (1, Empty(), True, "u64 of 0 bytes"),
    ],
)
async def test_wrong_answer_is_a_protocol_error(request_: int, payload: U64, reply: bool, reason: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, Frontend.from_socket(ours) as frontend:
        answering = asyncio.create_task(answer(theirs, request_, payload, reply=reply))
        with pytest.raises(ProtocolError, match=reason):
            await frontend.get_features()
        await answering


async def test_base_of_another_vring_is_a_protocol_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, Frontend.from_socket(ours) as frontend:
        answering = asyncio.create_task(answer(theirs, 11, VringState(2, 0)))
        with pytest.raises(ProtocolError, match="asked for vring 1, answered for vring 2"):
            await frontend.get_vring_base(1)
        await answering


async def test_silent_back_end_is_a_timeout() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, Frontend.from_socket(ours, timeout_s=0.01) as frontend, pytest.raises(TimeoutError):
        await frontend.get_features()
