"""A client of QEMU's machine protocol: one JSON object per line, each command answered in order, events in between.

See QEMU's docs/interop/qmp-spec. One command at a time, and waiting for an event. What answers is not trusted to be
QEMU: lines are of bounded length, kept events of bounded number, answers of the types that are asked for; whatever else
comes is an error of this module, and ends nothing but the session.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar, overload

import msgspec
from msgspec import UNSET, Raw, UnsetType

from mpassthru.errors import HostError, MpassthruError, attempting, errno_name
from mpassthru.log import printable

LINE_MAX_BYTES: Final = 1 << 20
"""The longest answer of all, to query-qmp-schema, has some 200 kB."""
EVENTS_KEPT: Final = 256
"""Events that nobody waits for are forgotten, the oldest first."""

_Result = TypeVar("_Result")


class QmpError(MpassthruError):
    """A command was not carried out."""


class QmpClosedError(QmpError):
    """QEMU ended, or its side of the session."""


class QmpProtocolError(QmpError):
    """What answers does not speak QMP, or not as expected. The session is of no use any more."""

    def __init__(self, what: str, cause: object = "") -> None:
        super().__init__(printable(f"QEMU's monitor {what}{': ' if cause else ''}{cause}"))


class QmpCommandError(QmpError):
    """QEMU refused a command; the session goes on."""


class Event(NamedTuple):
    """Something that happened in QEMU."""

    name: str
    data: Mapping[str, Any] = {}


class _Refusal(msgspec.Struct, frozen=True):
    desc: str


class _Message(msgspec.Struct, frozen=True):
    """Any line that QEMU sends; what it is shows by what it has."""

    greeting: Raw | UnsetType = msgspec.field(name="QMP", default=UNSET)
    result: Raw | UnsetType = msgspec.field(name="return", default=UNSET)
    error: _Refusal | UnsetType = UNSET
    event: str | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    id: int | None = None


_DECODER = msgspec.json.Decoder(_Message)


class QmpClient:
    """One QMP session over a connected socket, which it owns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._commands = 0
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, connected: socket.socket) -> Self:
        """Take over a connected socket; QEMU need not be at its other end yet."""
        return cls(*await asyncio.open_connection(sock=connected, limit=LINE_MAX_BYTES))

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Connect to a socket that QEMU listens on. It serves one client at a time: its greeting may take a while.

        Raises:
            HostError: nobody listens there, or we may not connect.
        """
        attempt = f"connect to QEMU's monitor {path}"
        with attempting(attempt):
            try:
                return cls(*await asyncio.open_unix_connection(path, limit=LINE_MAX_BYTES))
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise HostError(
                    error.errno or 0,
                    f"cannot {attempt} ({errno_name(error.errno)}): nobody listens there yet; "
                    f"start QEMU with -qmp unix:{path},server=on,wait=off",
                ) from error

    async def negotiate(self) -> None:
        """Wait for QEMU's greeting and enter command mode. Before the greeting nothing is sent.

        Raises:
            QmpError: QEMU ended, or what answers is not QEMU.
        """
        if isinstance((await self._receive()).greeting, UnsetType):
            raise QmpProtocolError("does not greet as QEMU does")
        await self.execute("qmp_capabilities")

    @overload
    async def execute(self, command: str, *, result: type[_Result], **arguments: Any) -> _Result: ...
    @overload
    async def execute(self, command: str, **arguments: Any) -> Any: ...
    async def execute(self, command: str, *, result: type[Any] | Any = Any, **arguments: Any) -> Any:
        """Run a command and return its result.

        Args:
            command: Its name.
            result: The type that the result has to have.
            arguments: By name, which may have `_` for QMP's `-`.

        Raises:
            QmpCommandError: QEMU refused the command.
            QmpError: QEMU ended, or the result is of another type.
        """
        async with self._lock:
            self._commands += 1
            number = self._commands
            request: dict[str, Any] = {"execute": command, "id": number}
            if arguments:
                request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
            self._writer.write(json.dumps(request).encode() + b"\n")
            with suppress(ConnectionError):  # QEMU is gone: receiving says so
                await self._writer.drain()
            answer = await self._answer_to(number)
        if not isinstance(answer.error, UnsetType):
            raise QmpCommandError(f"QEMU refused {command}: {printable(answer.error.desc)}")
        assert not isinstance(answer.result, UnsetType)
        try:
            return msgspec.json.decode(answer.result, type=result)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise QmpProtocolError(f"answered {command} with what was not expected", error) from error

    async def wait_event(self, *names: str) -> Event:
        """Return the oldest event of these names not returned yet, waiting for one; other events are kept.

        Raises:
            QmpError: QEMU ended, or does not speak QMP any more.
        """
        async with self._lock:
            for event in self._events:
                if event.name in names:
                    self._events.remove(event)
                    return event
            while True:
                heard = _event_of(await self._receive())
                if heard is not None and heard.name in names:
                    return heard
                self._keep(heard)

    async def _answer_to(self, number: int) -> _Message:
        """The answer to a command; that to an earlier one, which somebody no longer waited for, is passed over."""
        while True:
            message = await self._receive()
            if (event := _event_of(message)) is not None:
                self._keep(event)
            elif isinstance(message.result, UnsetType) and isinstance(message.error, UnsetType):
                raise QmpProtocolError("sent neither an answer nor an event")
            elif message.id == number:
                return message
            elif message.id is None:
                raise QmpProtocolError("did not say what it answers")

    def _keep(self, event: Event | None) -> None:
        if event is not None:
            self._events.append(event)

    async def _receive(self) -> _Message:
        try:
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        except ValueError as error:  # the line is longer than the limit of the reader
            raise QmpProtocolError(f"sent more than {LINE_MAX_BYTES} bytes in a line") from error
        if not line.endswith(b"\n"):
            raise QmpClosedError("QEMU closed its monitor")
        try:
            return _DECODER.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise QmpProtocolError("sent what is no message of its protocol", error) from error

    def close(self) -> None:
        """End the session."""
        self._writer.close()


def _event_of(message: _Message) -> Event | None:
    if isinstance(message.event, UnsetType):
        return None
    if isinstance(message.data, UnsetType):
        return Event(message.event)
    try:
        return Event(message.event, msgspec.json.decode(message.data, type=dict[str, Any]))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise QmpProtocolError("sent a malformed event", error) from error
