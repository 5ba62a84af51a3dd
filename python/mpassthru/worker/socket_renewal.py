"""Sockets that know of memory that was added while they ran.

A socket's UMEM is what guest memory was when it was registered. Memory that comes later is used at once, but its frames
are copied. So each socket is replaced by one with all of the memory: registered while the present one goes on, for
pinning takes long, and exchanged at a moment when nothing flows, or after `LATEST_S` all the same. The exchange takes
as long as the kernel takes to let go of a queue, 30 to 60 ms: frames that arrive meanwhile are lost, no head is.
docs/decisions/0010.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Sequence
from typing import Final, Protocol

from mpassthru.errors import HostError, MpassthruError
from mpassthru.worker.async_engine import AsyncEngine

QUIET_S: Final = 0.02
"""Nothing has flowed for so long: a moment to exchange a socket in."""
LATEST_S: Final = 1.0
"""A guest whose traffic never ceases is not copied for longer than this."""


class SocketOwner(Protocol):
    """Who has the sockets: `mpassthru.worker.device.PortDevice`."""

    queue_pairs_max: int

    async def prepare_socket(self, queue_pair: int) -> None:
        """Make a socket with all of guest memory, and keep it."""

    async def replace_sockets(self, queue_pairs: Sequence[int]) -> None:
        """Exchange sockets."""


class SocketRenewal:
    """Exchanges the sockets of a port, in the background, until none lacks memory.

    Args:
        owner: Of the sockets.
        engine: Knows which of them lack memory, and whether anything flows.
        notice: Called with one line if it does not come to pass.
    """

    def __init__(self, owner: SocketOwner, engine: AsyncEngine, notice: Callable[[str], None]) -> None:
        self._owner = owner
        self._engine = engine
        self._notice = notice
        self._renewing: asyncio.Task[None] | None = None
        self._step: asyncio.Task[None] | None = None
        """What the engine is at, and has to end whoever waits for it."""

    def start(self) -> None:
        """Memory was added. Returns at once."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def stop(self) -> None:
        """Return when nothing goes on any more: the engine has no memory for a socket that nobody knows of."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        if self._step is not None:
            await asyncio.wait({self._step})
            self._step.exception()  # whatever it was, the socket that it was about is no longer wanted

    async def _renew(self) -> None:
        try:
            while lacking := self._lacking():
                for batch in await self._prepared(lacking):
                    await self._take(self._owner.replace_sockets(batch))
        except MpassthruError as error:
            self._notice(f"memory was added, and sockets cannot be renewed to use it in place: {error}")

    def _lacking(self) -> list[int]:
        return [pair for pair in range(self._owner.queue_pairs_max) if self._engine.socket_lacks_memory(pair)]

    async def _prepared(self, lacking: list[int]) -> list[list[int]]:
        """Prepare the exchange and wait for a good moment; which queue pairs are to be exchanged at a time."""
        try:
            await self._take(self._owner.prepare_socket(lacking[0]))
        except HostError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # The memlock limit does not allow for the memory twice: the old sockets have to go first, all of them.
            await self._quiet_moment()
            return [lacking]
        await self._quiet_moment()
        # The first one brings a UMEM that the others share.
        return [[pair] for pair in lacking]

    async def _take(self, step: Coroutine[None, None, None]) -> None:
        self._step = asyncio.create_task(step)
        await asyncio.shield(self._step)

    async def _quiet_moment(self) -> None:
        frames = -1
        for _ in range(round(LATEST_S / QUIET_S)):
            before, frames = frames, self._engine.frames()
            if frames == before:
                return
            await asyncio.sleep(QUIET_S)
