"""Getting AF_XDP sockets from the broker: asked for, bound by us, steered to by the broker, given back."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

from mpassthru.control import (
    BrokerMessage,
    ControlChannel,
    MemoryGranted,
    MemoryRefused,
    MemoryWanted,
    SocketBound,
    SocketFreed,
    SocketGranted,
    SocketMode,
    SocketRefused,
    SocketReleased,
    SocketSteered,
    SocketWanted,
    WorkerMessage,
    close_fds,
)
from mpassthru.errors import HostError, RefusedError

ANSWER_TIMEOUT_S = 5.0
FREED_TIMEOUT_S = 20.0
"""More than the broker takes before it gives up."""


_MEMORY = -1
"""What a question about memory is known by, among those about queue pairs."""

SocketAnswer = SocketGranted | SocketSteered | SocketFreed | SocketRefused | MemoryGranted | MemoryRefused


class SocketClient:
    """The worker's side of the socket messages, and of those about the memory that sockets lock.

    One question per queue pair, and one about memory, is open at a time, also if its asker was cancelled: its answer is
    not taken for that to the next.
    """

    def __init__(self, channel: ControlChannel[WorkerMessage, BrokerMessage]) -> None:
        self._channel = channel
        self._answers: dict[int, asyncio.Future[int]] = {}

    async def lock_memory(self, locked_bytes: int) -> None:
        """Ask to have so much memory locked in all; nothing may be before the answer.

        Raises:
            RefusedError: the budget does not allow it; what was granted before stays.
            HostError: the broker could not look at the budget, or does not answer.
        """
        await self._ask(_MEMORY, lambda: self._channel.send(MemoryWanted(locked_bytes=locked_bytes)))

    async def want(self, queue_pair: int, binding: int) -> int:
        """Ask for a socket.

        Args:
            queue_pair: Which.
            binding: Serial number of what it is to be bound to.

        Returns:
            The fd of a new AF_XDP socket, the caller's to close.

        Raises:
            HostError: the broker could not create one, or does not answer.
            RefusedError: the port is no longer bound to that.
        """
        message = SocketWanted(queue_pair=queue_pair, binding=binding)
        return await self._ask(queue_pair, lambda: self._channel.send(message))

    async def bound(self, queue_pair: int, mode: SocketMode) -> None:
        """Say that the socket is bound and wait until the queue's frames go to it.

        Raises:
            HostError: the broker could not put it into the XSKMAP, or does not answer.
        """
        await self._ask(queue_pair, lambda: self._channel.send(SocketBound(queue_pair=queue_pair, mode=mode)))

    def released(self, queue_pair: int) -> None:
        """Say that the socket is closed."""
        self._channel.send(SocketReleased(queue_pair=queue_pair))

    async def freed(self, queue_pair: int) -> None:
        """Say that the socket is closed, and wait until no NIC can write to its buffers any more. May be repeated.

        Raises:
            HostError: the kernel still holds the queue, or the broker does not answer.
        """
        message = SocketReleased(queue_pair=queue_pair, await_free=True)
        await self._ask(queue_pair, lambda: self._channel.send(message), timeout_s=FREED_TIMEOUT_S)

    def answered(self, message: SocketAnswer, fds: list[int]) -> None:
        """Take the broker's answer; fds that nobody waits for are closed."""
        subject = _MEMORY if isinstance(message, MemoryGranted | MemoryRefused) else message.queue_pair
        answer = self._answers.pop(subject, None)
        if answer is None:
            close_fds(fds)
            return
        match message:
            case SocketGranted():
                answer.set_result(fds[0])
            case SocketSteered() | SocketFreed() | MemoryGranted():
                answer.set_result(-1)
            case SocketRefused(errno=0, error=error) | MemoryRefused(errno=0, error=error):
                answer.set_exception(RefusedError(error))
            case SocketRefused(errno=number, error=error) | MemoryRefused(errno=number, error=error):
                answer.set_exception(HostError(number, error))

    async def _ask(self, subject: int, send: Callable[[], None], *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                while (earlier := self._answers.get(subject)) is not None:
                    await asyncio.wait({earlier})
                send()
                self._answers[subject] = answer
                await asyncio.wait({answer})
        except TimeoutError as error:
            answer.add_done_callback(_discard)
            about = "about locked memory" if subject == _MEMORY else f"for queue pair {subject}"
            raise HostError(errno.ETIMEDOUT, f"the broker does not answer {about} within {timeout_s:g} s") from error
        except asyncio.CancelledError:
            answer.add_done_callback(_discard)
            raise
        return answer.result()


def _discard(answer: asyncio.Future[int]) -> None:
    """Close the socket in an answer that nobody waits for any more."""
    if answer.exception() is None and answer.result() >= 0:
        os.close(answer.result())
