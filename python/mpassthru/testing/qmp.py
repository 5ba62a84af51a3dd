"""A client of QEMU's machine protocol: one JSON object per line, each command answered in order, events in between.

See QEMU's docs/interop/qmp-spec. Only what the harness needs: one command at a time, and waiting for an event.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from contextlib import suppress
from typing import Any

from mpassthru.testing.child import ChildError

_LINE_MAX_BYTES = 1 << 20  # query-qmp-schema answers in one line of some 200 kB


class QmpClient:
    """One QMP session over a connected socket, which it owns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: deque[dict[str, Any]] = deque()
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, connected: socket.socket) -> QmpClient:
        """Take over a connected socket; QEMU need not be at its other end yet."""
        return cls(*await asyncio.open_connection(sock=connected, limit=_LINE_MAX_BYTES))

    async def negotiate(self) -> None:
        """Wait for QEMU's greeting and enter command mode.

        Raises:
            ChildError: QEMU ended, or what answers is not QEMU.
        """
        greeting = await self._receive()
        if "QMP" not in greeting:
            raise ChildError(f"expected a QMP greeting, got {greeting}")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result. Argument names may have `_` for QMP's `-`.

        Raises:
            ChildError: QEMU refused the command, or ended.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        async with self._lock:
            self._writer.write(json.dumps(request).encode() + b"\n")
            with suppress(ConnectionError):  # QEMU is gone: receiving says so
                await self._writer.drain()
            while True:
                answer = await self._receive()
                if "event" in answer:
                    self._events.append(answer)
                elif "error" in answer:
                    raise ChildError(f"QMP command {command} failed: {answer['error'].get('desc')}")
                else:
                    return answer["return"]

    async def wait_event(self, name: str) -> dict[str, Any]:
        """Return the oldest event of that name not returned yet, waiting for one; other events are kept.

        Raises:
            ChildError: QEMU ended.
        """
        async with self._lock:
            for event in self._events:
                if event["event"] == name:
                    self._events.remove(event)
                    return event
            while (event := await self._receive())["event"] != name:
                self._events.append(event)
            return event

    async def _receive(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise ChildError("QEMU closed its QMP connection")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """End the session."""
        self._writer.close()
