"""A vhost-user relay between a front-end and a back-end that loses what the back-end marks in the migration log.

The back-end is given another file of the same size instead of the front-end's: it marks, and nobody sees it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mpassthru.vhost_user import Request
from mpassthru.vhost_user.connection import Connection


@dataclass(frozen=True)
class Verbatim:
    """A payload that is passed on as it came."""

    data: bytes

    def encode(self) -> bytes:
        return self.data


class LogLosingRelay:
    """The relay; `lost_logs` counts the logs that it took away."""

    def __init__(self) -> None:
        self.lost_logs = 0

    async def serve(self, listener: socket.socket, backend_path: Path) -> None:
        """Carry one front-end's messages to the back-end, and the answers back, until either of them is gone."""
        loop = asyncio.get_running_loop()
        frontend, _ = await loop.sock_accept(listener)
        backend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with Connection(frontend) as near, Connection(backend) as far:
            await loop.sock_connect(backend, str(backend_path))
            async with asyncio.TaskGroup() as ways:
                there = ways.create_task(self._carry(near, far))
                back = ways.create_task(self._carry(far, near))
                await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
                there.cancel()
                back.cancel()

    async def _carry(self, source: Connection, sink: Connection) -> None:
        while (message := await source.receive()) is not None:
            with message:
                if message.request == Request.VHOST_USER_SET_LOG_BASE and message.fds:
                    self._replace(message.fds)
                await sink.send(
                    message.request,
                    cast(Any, Verbatim(message.payload)),
                    reply=message.is_reply,
                    need_reply=message.needs_reply,
                    fds=message.fds,
                )

    def _replace(self, fds: list[int]) -> None:
        self.lost_logs += 1
        decoy = os.memfd_create("decoy")
        os.ftruncate(decoy, os.fstat(fds[0]).st_size)
        os.close(fds[0])
        fds[0] = decoy


@asynccontextmanager
async def log_losing_relay(path: Path, backend_path: Path) -> AsyncIterator[LogLosingRelay]:
    """Listen on `path` for the length of the block."""
    relay = LogLosingRelay()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        serving = asyncio.create_task(relay.serve(listener, backend_path))
        try:
            yield relay
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
