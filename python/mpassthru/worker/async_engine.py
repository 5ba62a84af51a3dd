"""The engine as seen from asyncio: tokens become awaitables, faults become calls.

The engine announces its events on an eventfd; they are drained on the loop. Every token is waited for by exactly one
caller. An event can not be lost between an operation and its wait: both happen without going back to the loop.
Nothing calls an operation back: a caller that is cancelled learns of it when the operation has ended, so that whoever
cleans up knows what there is to clean up (a socket that may have been bound, with the guest's buffers in it).

An operation takes milliseconds, or seconds where the kernel is slow to let go of a queue. One that does not end means
that an engine thread hangs: nothing in this process could stop that thread, or be sure of guest memory again.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mpassthru._core import Engine, Event, MemoryRegion, SocketConfig, VringConfig

OPERATION_TIMEOUT_S: Final = 30.0
"""Far more than any operation takes, the engine's own patience with the kernel included."""
ATTACH_TIMEOUT_S: Final = 180.0
"""The first socket pins all of the guest's memory, up to 64 GiB, much of which the kernel may still have to clear."""


def end_process(line: str) -> None:
    """End this process at once, threads that hang included; the broker starts another."""
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


class AsyncEngine:
    """Awaitable operations on an `Engine`, which end before whoever awaits them does.

    Args:
        engine: The engine; closed by `close`.
        on_trouble: Called on the loop for each event that ends no operation.
        on_hang: Called on the loop with one line if an operation does not end, even if its caller was cancelled.
    """

    def __init__(
        self, engine: Engine, on_trouble: Callable[[Event], None], *, on_hang: Callable[[str], None] = end_process
    ) -> None:
        self.engine = engine
        self._on_trouble = on_trouble
        self._on_hang = on_hang
        self._pending: dict[int, asyncio.Future[int]] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(engine.event_fd, self._drain)

    async def add_memory(self, regions: Sequence[MemoryRegion]) -> bool:
        """Add regions to the memory map; every queue pair has them then. False if all has to be mapped anew instead."""
        tokens = self.engine.add_memory(list(regions))
        if tokens is None:
            return False
        await asyncio.gather(*(self._end_of("add_memory", token) for token in tokens))
        return True

    async def prepare_socket(self, queue_pair: int, config: SocketConfig) -> None:
        """Register all of guest memory on a socket, for `attach_prepared`."""
        token = self.engine.prepare_socket(queue_pair, config)
        await self._end_of("prepare_socket", token, timeout_s=ATTACH_TIMEOUT_S)

    async def attach_prepared(self, queue_pair: int) -> int:
        """Bind the socket that was prepared; 1 for zero-copy mode, 0 for copy mode."""
        return await self._end_of("attach_prepared", self.engine.attach_prepared(queue_pair))

    def discard_prepared(self, queue_pair: int) -> None:
        """Close the socket that was prepared, if there is one."""
        self.engine.discard_prepared(queue_pair)

    async def reclaim(self, queue_pair: int) -> None:
        """Give the guest back what a closed socket had of it."""
        await self._end_of("reclaim", self.engine.reclaim(queue_pair))

    def guest_address(self, queue_pair: int) -> bytes | None:
        """The address that the guest sends from; None as long as it has sent nothing."""
        return self.engine.guest_address(queue_pair)

    def frames(self) -> int:
        """How many frames have been moved, both ways."""
        counters = self.engine.counters()
        return sum(counters[way]["frames"] for way in ("rx", "tx"))  # type: ignore[index]

    def socket_lacks_memory(self, queue_pair: int) -> bool:
        """Whether memory was added after the UMEM of a queue pair's socket was registered."""
        return self.engine.socket_lacks_memory(queue_pair)

    async def attach_socket(self, queue_pair: int, config: SocketConfig) -> int:
        """Bind a queue pair's socket; 1 for zero-copy mode, 0 for copy mode."""
        token = self.engine.attach_socket(queue_pair, config)
        return await self._end_of("attach_socket", token, timeout_s=ATTACH_TIMEOUT_S)

    async def detach_socket(self, queue_pair: int) -> None:
        """Close a queue pair's socket."""
        await self._end_of("detach_socket", self.engine.detach_socket(queue_pair))

    async def start_vring(self, index: int, config: VringConfig) -> int:
        """Start a virtqueue; the number of buffers that were in flight when an earlier worker ended."""
        return await self._end_of("start_vring", self.engine.start_vring(index, config))

    async def stop_vring(self, index: int) -> int:
        """Stop a virtqueue and return its ring base."""
        return await self._end_of("stop_vring", self.engine.stop_vring(index))

    async def set_vring_enabled(self, index: int, enabled: bool) -> None:
        """Let a virtqueue move frames, or not."""
        await self._end_of("set_vring_enabled", self.engine.set_vring_enabled(index, enabled))

    async def set_vring_call(self, index: int, fd: int) -> None:
        """Replace a virtqueue's call eventfd."""
        await self._end_of("set_vring_call", self.engine.set_vring_call(index, fd))

    async def set_vring_err(self, index: int, fd: int) -> None:
        """Replace a virtqueue's err eventfd."""
        await self._end_of("set_vring_err", self.engine.set_vring_err(index, fd))

    async def set_vring_log(self, index: int, log_buffers: bool, log_used_address: int | None) -> None:
        """Log a running virtqueue's writes to guest memory, to the log that is mapped now."""
        await self._end_of("set_vring_log", self.engine.set_vring_log(index, log_buffers, log_used_address))

    def map_log(self, fd: int, size_bytes: int = 0, offset: int = 0) -> None:
        """Replace the migration log; -1 for none."""
        self.engine.map_log(fd, size_bytes=size_bytes, offset=offset)

    def set_log_fd(self, fd: int) -> None:
        """Replace the eventfd that tells of marked pages; -1 for none."""
        self.engine.set_log_fd(fd)

    def mark_all(self) -> None:
        """Mark all of guest memory in the migration log."""
        self.engine.mark_all()

    async def send_frame(self, queue_pair: int, frame: bytes) -> None:
        """Send one frame of ours to the wire."""
        await self._end_of("send_frame", self.engine.send_frame(queue_pair, frame))

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
        for deadline in self._deadlines.values():
            deadline.cancel()
        for future in self._pending.values():
            future.cancel()
        self._deadlines.clear()
        self._pending.clear()

    async def _end_of(self, operation: str, token: int, *, timeout_s: float | None = None) -> int:
        timeout_s = timeout_s or OPERATION_TIMEOUT_S
        future: asyncio.Future[int] = self._loop.create_future()
        self._pending[token] = future
        self._deadlines[token] = self._loop.call_later(
            timeout_s,
            self._on_hang,
            f"the data plane hangs: {operation} has not ended within {timeout_s:g} s; ending this worker",
        )
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not future.cancelled():
                future.exception()  # nobody is to be told of it any more
            raise cancelled
        return future.result()

    def _drain(self) -> None:
        try:
            os.read(self.engine.event_fd, 8)
        except BlockingIOError:
            return
        events = self.engine.drain_events()
        # Completions first: nothing that goes wrong with a trouble may leave somebody waiting.
        for event in events:
            if event.kind == "completed":
                self._complete(event)
        for event in events:
            if event.kind != "completed":
                self._on_trouble(event)

    def _complete(self, event: Event) -> None:
        self._deadlines.pop(event.token).cancel()
        future = self._pending.pop(event.token)
        if event.error is not None:
            future.set_exception(event.error)
        else:
            future.set_result(event.value)
