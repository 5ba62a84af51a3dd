from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from mpassthru.testing.child import ChildError
from mpassthru.testing.qmp import QmpClient

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}


@asynccontextmanager
async def session(*answers: list[dict[str, Any]]) -> AsyncIterator[tuple[QmpClient, list[dict[str, Any]]]]:
    """A client of a scripted QEMU that greets, takes qmp_capabilities, then gives `answers`; and what it was asked."""
    ours, theirs = socket.socketpair()
    commands: list[dict[str, Any]] = []

    async def play() -> None:
        reader, writer = await asyncio.open_connection(sock=theirs)
        writer.write(json.dumps(GREETING).encode() + b"\r\n")
        for lines in ([{"return": {}}], *answers):
            commands.append(json.loads(await reader.readline()))
            writer.writelines(json.dumps(line).encode() + b"\r\n" for line in lines)
        await writer.drain()
        writer.close()

    qemu = asyncio.create_task(play())
    client = await QmpClient.connect(ours)
    try:
        await client.negotiate()
        yield client, commands
    finally:
        client.close()
        await qemu


async def test_command_returns_its_result() -> None:
    async with session([{"return": {"status": "running"}}]) as (client, commands):
        assert await client.execute("query-status") == {"status": "running"}
    assert commands == [{"execute": "qmp_capabilities"}, {"execute": "query-status"}]


async def test_arguments_are_spelled_as_qmp_does() -> None:
    async with session([{"return": {}}]) as (client, commands):
        await client.execute("set_link", name="net0", link_up=False)
    assert commands[1]["arguments"] == {"name": "net0", "link-up": False}


async def test_refused_command_is_an_error() -> None:
    async with session([{"error": {"class": "GenericError", "desc": "no such device"}}]) as (client, _):
        with pytest.raises(ChildError, match="no such device"):
            await client.execute("device_del", id="x")


async def test_event_before_the_answer_is_kept() -> None:
    async with session([{"event": "STOP"}, {"return": {}}, {"event": "RESUME"}]) as (client, _):
        assert await client.execute("stop") == {}
        assert await client.wait_event("RESUME") == {"event": "RESUME"}
        assert await client.wait_event("STOP") == {"event": "STOP"}


async def test_end_of_qemu_is_an_error() -> None:
    async with session() as (client, _):
        with pytest.raises(ChildError, match="closed"):
            await client.execute("query-status")


async def test_something_else_than_qemu_is_refused() -> None:
    ours, theirs = socket.socketpair()
    client = await QmpClient.connect(ours)
    with theirs, closing(client):
        theirs.sendall(b"{}\n")
        with pytest.raises(ChildError, match="greeting"):
            await client.negotiate()
