"""The engine as seen from asyncio: tokens become awaitables, faults become calls.

The engine announces its events on an eventfd; they are drained on the loop. Every token is waited for by exactly one
caller. An event can not be lost between an operation and its wait: both happen without going back to the loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpassthru._core import Engine, Event, MemoryRegion, SocketConfig, VringConfig


class AsyncEngine:
    """Awaitable operations on an `Engine`.

    Args:
        engine: The engine; closed by `close`.
        on_trouble: Called on the loop for each event that ends no operation.
    """

    def __init__(self, engine: Engine, on_trouble: Callable[[Event], None]) -> None:
        self.engine = engine
        self._on_trouble = on_trouble
        self._pending: dict[int, asyncio.Future[int]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(engine.event_fd, self._drain)

    async def attach_socket(self, queue_pair: int, config: SocketConfig) -> int:
        """Bind a queue pair's socket; 1 for zero-copy mode, 0 for copy mode."""
        return await self._end_of(self.engine.attach_socket(queue_pair, config))

    async def detach_socket(self, queue_pair: int) -> None:
        """Close a queue pair's socket."""
        await self._end_of(self.engine.detach_socket(queue_pair))

    async def start_vring(self, index: int, config: VringConfig) -> None:
        """Start a virtqueue."""
        await self._end_of(self.engine.start_vring(index, config))

    async def stop_vring(self, index: int) -> int:
        """Stop a virtqueue and return its ring base."""
        return await self._end_of(self.engine.stop_vring(index))

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        """Let a virtqueue move frames, or not."""
        await self._end_of(self.engine.set_vring_enabled(index, enabled))

    async def set_vring_call(self, index: int, fd: int) -> None:
        """Replace a virtqueue's call eventfd."""
        await self._end_of(self.engine.set_vring_call(index, fd))

    async def set_vring_err(self, index: int, fd: int) -> None:
        """Replace a virtqueue's err eventfd."""
        await self._end_of(self.engine.set_vring_err(index, fd))

    async def send_frame(self, queue_pair: int, frame: bytes) -> None:
        """Send one frame of ours to the wire."""
        await self._end_of(self.engine.send_frame(queue_pair, frame))

    def map_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Replace the guest's memory map."""
        self.engine.map_memory(list(regions))

    def socket_attached(self, queue_pair: int) -> bool:
        """Whether a queue pair has a socket."""
        return self.engine.socket_attached(queue_pair)

    def close(self) -> None:
        """Give everything back; waiting callers are cancelled."""
        self._loop.remove_reader(self.engine.event_fd)
        self.engine.close()
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    async def _end_of(self, token: int) -> int:
        future: asyncio.Future[int] = self._loop.create_future()
        self._pending[token] = future
        return await future

    def _drain(self) -> None:
        try:
            os.read(self.engine.event_fd, 8)
        except BlockingIOError:
            return
        for event in self.engine.drain_events():
            if event.kind == "completed":
                self._complete(event)
            else:
                self._on_trouble(event)

    def _complete(self, event: Event) -> None:
        future = self._pending.pop(event.token, None)
        if future is None or future.done():
            return  # the caller was cancelled: its session is over, the operation happened all the same
        if event.error is not None:
            future.set_exception(event.error)
        else:
            future.set_result(event.value)
