"""The QMP client with a QEMU that is played by its script, and with what is no QEMU at all."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpassthru.errors import HostError
from mpassthru.qmp import (
    EVENTS_KEPT,
    LINE_MAX_BYTES,
    QmpClient,
    QmpClosedError,
    QmpCommandError,
    QmpError,
    QmpProtocolError,
)

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}


class PlayedQemu:
    """The other end: hears commands, says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def heard(self) -> dict[str, Any]:
        command: dict[str, Any] = json.loads(await self._reader.readline())
        return command

    def say(self, *messages: dict[str, Any]) -> None:
        self.writer.writelines(json.dumps(message).encode() + b"\r\n" for message in messages)

    async def answer(self, **answer: Any) -> dict[str, Any]:
        command = await self.heard()
        self.say(answer | {"id": command["id"]})
        return command


@asynccontextmanager
async def strangers() -> AsyncIterator[tuple[QmpClient, PlayedQemu]]:
    """A client and the other end, which have not said anything yet."""
    ours, theirs = socket.socketpair()
    client = await QmpClient.connect(ours)
    qemu = PlayedQemu(*await asyncio.open_connection(sock=theirs))
    try:
        async with asyncio.timeout(10):
            yield client, qemu
    finally:
        client.close()
        qemu.writer.close()


@asynccontextmanager
async def session() -> AsyncIterator[tuple[QmpClient, PlayedQemu]]:
    """A client in command mode."""
    async with strangers() as (client, qemu):
        qemu.say(GREETING)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client.negotiate())
            assert (await qemu.answer(**{"return": {}}))["execute"] == "qmp_capabilities"
        yield client, qemu


async def asked(client: QmpClient, qemu: PlayedQemu, answer: bytes, **kind: Any) -> Any:
    """Ask something, and have bytes for an answer in which `ID` stands for the command's number."""
    async with asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(client.execute("query-status", **kind))
        number = str((await qemu.heard())["id"]).encode()
        qemu.writer.write(answer.replace(b"ID", number))
    return answering.result()


async def test_command_returns_its_result() -> None:
    async with session() as (client, qemu):
        assert await asked(client, qemu, b'{"return": {"status": "running"}, "id": ID}\n') == {"status": "running"}


async def test_arguments_are_spelled_as_qmp_does() -> None:
    async with session() as (client, qemu), asyncio.TaskGroup() as tasks:
        tasks.create_task(client.execute("set_link", name="net0", link_up=False))
        command = await qemu.answer(**{"return": {}})
    assert command["execute"] == "set_link"
    assert command["arguments"] == {"name": "net0", "link-up": False}


async def test_refused_command_is_an_error_and_the_next_one_is_answered() -> None:
    async with session() as (client, qemu):
        refusal = b'{"error": {"class": "GenericError", "desc": "no such\\n\\u001b[31m device"}, "id": ID}\n'
        with pytest.raises(ExceptionGroup) as refused:
            await asked(client, qemu, refusal)
        (error,) = refused.value.exceptions
        assert isinstance(error, QmpCommandError)
        assert str(error) == "QEMU refused query-status: no such  [31m device"
        assert await asked(client, qemu, b'{"return": 1, "id": ID}\n') == 1


async def test_result_is_of_the_type_that_was_asked_for() -> None:
    async with session() as (client, qemu):
        assert await asked(client, qemu, b'{"return": ["a"], "id": ID}\n', result=list[str]) == ["a"]
        with pytest.raises(ExceptionGroup) as wrong:
            await asked(client, qemu, b'{"return": [1], "id": ID}\n', result=list[str])
        (error,) = wrong.value.exceptions
        assert isinstance(error, QmpProtocolError)
        assert "Expected `str`, got `int`" in str(error)


async def test_event_before_the_answer_is_kept() -> None:
    async with session() as (client, qemu):
        assert await asked(client, qemu, b'{"event": "STOP", "data": {"x": 1}}\n{"return": {}, "id": ID}\n') == {}
        qemu.say({"event": "RESUME"})
        assert (await client.wait_event("RESUME")).data == {}
        assert await client.wait_event("STOP") == ("STOP", {"x": 1})


async def test_one_of_several_events_is_waited_for() -> None:
    async with session() as (client, qemu):
        qemu.say({"event": "RTC_CHANGE"}, {"event": "RESET"}, {"event": "STOP"})
        assert (await client.wait_event("STOP", "RESET")).name == "RESET"
        assert (await client.wait_event("STOP", "RESET")).name == "STOP"


async def test_flood_of_events_is_forgotten_but_for_the_last() -> None:
    async with session() as (client, qemu):
        events = b"".join(b'{"event": "E%d"}\n' % number for number in range(EVENTS_KEPT + 10))
        await asked(client, qemu, events + b'{"return": {}, "id": ID}\n')
        assert (await client.wait_event("E9", "E10", "E11")).name == "E10"


async def test_command_that_nobody_waited_for_does_not_confuse_the_next() -> None:
    async with session() as (client, qemu):
        late = asyncio.create_task(client.execute("query-version"))
        number = (await qemu.heard())["id"]
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        qemu.say({"return": "late", "id": number})
        assert await asked(client, qemu, b'{"return": "in time", "id": ID}\n') == "in time"


async def test_half_a_line_is_waited_for() -> None:
    async with session() as (client, qemu), asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(client.execute("query-status"))
        number = (await qemu.heard())["id"]
        qemu.writer.write(b'{"return": "who')
        await qemu.writer.drain()
        await asyncio.sleep(0)
        assert not answering.done()
        qemu.writer.write(b'le", "id": %d}\r\n' % number)
    assert answering.result() == "whole"


@pytest.mark.parametrize("last", [b"", b'{"return": {}, "id": ID}'])
async def test_end_of_qemu_is_an_error_also_in_the_middle_of_a_line(last: bytes) -> None:
    async with session() as (client, qemu):
        asking = asyncio.create_task(client.execute("query-status"))
        number = str((await qemu.heard())["id"]).encode()
        qemu.writer.write(last.replace(b"ID", number))
        qemu.writer.close()
        with pytest.raises(QmpClosedError):
            await asking
        with pytest.raises(QmpClosedError):
            await client.wait_event("STOP")


GARBAGE = [
    b"\n",
    b"{}\n",
    b"null\n",
    b"[1, 2]\n",
    b"\xff\xfe\n",
    b'{"return": {}\n',
    b'{"return": {}}\n',
    b'{"return": {}, "id": "ID"}\n',
    b'{"error": {"class": "GenericError"}, "id": ID}\n',
    b'{"error": "no", "id": ID}\n',
    b'{"error": {"desc": "parse error"}}\n',
    b'{"event": 7}\n',
    b'{"event": "STOP", "data": []}\n',
    b"[" * 100_000 + b"\n",
    b'{"return": ' + b"[" * 100_000 + b', "id": ID}\n',
    b'{"return": "' + b"x" * LINE_MAX_BYTES + b'", "id": ID}\n',
    b"x" * (2 * LINE_MAX_BYTES),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:24]))
async def test_garbage_is_one_line_of_error(garbage: bytes) -> None:
    async with session() as (client, qemu):
        with pytest.raises(ExceptionGroup) as broken:
            await asked(client, qemu, garbage)
    (error,) = broken.value.exceptions
    assert isinstance(error, QmpProtocolError)
    assert str(error).startswith("QEMU's monitor ")
    assert str(error).isprintable()
    assert len(str(error)) <= 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["return", "id", "event", "data", "error", "desc", "QMP", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40), max_size=5))
def test_whatever_comes_is_an_answer_or_an_error_of_its_own(lines: list[bytes]) -> None:
    async def play() -> None:
        async with session() as (client, qemu):
            asking = asyncio.create_task(client.execute("query-status"))
            await qemu.heard()
            qemu.writer.writelines(line + b"\n" for line in lines)
            qemu.writer.close()
            (outcome,) = await asyncio.gather(asking, return_exceptions=True)
            assert not isinstance(outcome, BaseException) or isinstance(outcome, QmpError)

    asyncio.run(play())


async def test_something_else_than_qemu_is_sent_nothing() -> None:
    async with strangers() as (client, qemu):
        qemu.say({})
        with pytest.raises(QmpProtocolError, match="does not greet"):
            await client.negotiate()
        client.close()
        with pytest.raises(json.JSONDecodeError):
            await qemu.heard()


async def test_monitor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"connect to QEMU's monitor .*/none \(ENOENT\)"):
        await QmpClient.open(tmp_path / "none")


async def test_monitor_is_connected_to_by_its_path(tmp_path: Path) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "qmp"):
        with closing(await QmpClient.open(tmp_path / "qmp")) as client, pytest.raises(QmpClosedError):
            await client.negotiate()
